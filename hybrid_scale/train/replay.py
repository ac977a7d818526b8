"""A step that failed, computed again on one process: which texts or trained tensors aren't finite. Updates nothing."""

from pathlib import Path

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.model.load import load_embedder
from hybrid_scale.planning.planner import as_planned
from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.train.batches import build_share, open_training_data, plan_step
from hybrid_scale.train.engine import PlainEngine
from hybrid_scale.train.failure import names_of
from hybrid_scale.train.gradcache import NotFinite, forward_backward
from hybrid_scale.train.guard import GradientGuard
from hybrid_scale.train.loss import Targets


def replay(config: RunConfig, folder: Path) -> str:
    """Compute a failed step again from its `failures/step_N` folder, on this process alone; nothing is updated.

    Returns what is not finite: texts, or else trained tensors. Raises RunError for a folder that holds no failure.
    """
    facts = read_json(folder / "batch.json")
    before = RunDirectory(folder.parent.parent).manifest_file
    config = as_planned(config, read_json(before) if before.is_file() else {})
    data = open_training_data(config, 1)
    engine = PlainEngine(load_embedder(config.model, config.run.seed, folder / "adapter"), config.optimizer)
    step = plan_step(data, config, 1, facts["step"])
    guard = GradientGuard(engine.trained)
    targets = Targets.of(step.batch, dist.device())
    title = f"step {facts['step'] + 1}, found on {facts['world_size']} ranks: {facts['what']} not finite on {facts['ranks']}"
    try:
        loss = forward_backward(engine, build_share(data, step, 0).to(dist.device()), step.plan, targets, config.loss)
    except NotFinite as error:
        names = names_of(data.pairs, step.batch, list(error.texts))
        return "\n".join([title, f"again, on one process: embeddings of {len(names)} texts are not finite:", *names])
    if bad := guard.not_finite():
        return "\n".join([title, f"again, on one process: loss {loss}; gradients not finite:", *bad[0]])
    suspects = "The weights and the batch are sound: suspect a device, or what differs between this process and the ranks."
    return f"{title}\nagain, on one process: everything is finite, loss {loss:.6g}. {suspects}"
