"""Run tasks of mteb on a trained run, an untrained base or an exported model.

    python launch/evaluate_mteb.py --run runs/qwen2.5-7b-hybrid --tasks NFCorpus MIRACLRetrievalHardNegatives --out mteb
    python launch/evaluate_mteb.py --exported exported/qwen2.5-7b-hybrid --tasks NFCorpus --out mteb

--run takes the latest checkpoint of a run directory. mteb fetches the tasks' data from the Hub. OUT holds its results in its own
layout; scores are printed as TASK SUBSET SPLIT MAIN_SCORE. (mteb's ranking isn't sharded or certified: for the sets that
launch/prepare.py reads, launch/evaluate.py is the measure.)
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from hybrid_scale import dist
from hybrid_scale.base_files import fetch
from hybrid_scale.checkpoints import chosen as checkpoint_of
from hybrid_scale.checkpoints import digest_of_weights
from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import RunConfig, load_config
from hybrid_scale.errors import ModelError, RunError, describe
from hybrid_scale.model.acceptance import accept
from hybrid_scale.model.digests import check_trained_on, model_digests
from hybrid_scale.model.weight_files import say
from hybrid_scale.planning.planner import as_planned
from hybrid_scale.retrieval.mteb_encoder import MtebEncoder, from_config, from_exported
from hybrid_scale.runs import RunDirectory, check_writable, read_json

ORGANISATION = "hybrid_scale"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="run directory: its latest checkpoint")
    source.add_argument("--config", type=Path, help="YAML of a run: its base model, untrained")
    source.add_argument("--exported", help="folder that launch/export.py wrote, or any sentence-transformers model")
    parser.add_argument("--tasks", nargs="+", required=True, help="mteb's names of tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder of mteb's results")
    return read_arguments(parser, given)


def encoder(chosen: argparse.Namespace) -> MtebEncoder:
    """Raises RunError: a run without a checkpoint."""
    if chosen.exported:
        return from_exported(chosen.exported, f"{ORGANISATION}/{Path(chosen.exported).name}", "exported")
    if chosen.config:
        config = load_config(chosen.config)
        revision = f"base-{digest_of({**accepted(config), **lengths_of(config)})}"
        return from_config(config, None, f"{ORGANISATION}/{chosen.config.stem}", revision)
    run = RunDirectory(chosen.run)
    checkpoint, config = checkpoint_of(run), as_planned(run.config(), read_json(run.manifest_file))
    base, weights = accepted(config), digest_of_weights(checkpoint)
    say(*filter(None, [check_trained_on(checkpoint, config, base)]))
    revision = f"{checkpoint.name}-{digest_of({**base, 'trained': weights, **lengths_of(config)})}"
    return from_config(config, checkpoint / "adapter", f"{ORGANISATION}/{chosen.run.name}", revision)


def accepted(config: RunConfig) -> dict[str, str]:
    """The digests of a run's base, which is accepted and on this machine. Raises ModelError where it isn't accepted."""
    fetch(config.model)
    say(*accept(config))
    return model_digests(config.model)


def lengths_of(config: RunConfig) -> dict[str, str]:
    """At which lengths the evaluation cuts, as the config states them: results of other lengths are others."""
    stated = config.evaluation
    return {"lengths": f"{stated.max_query_tokens} {stated.max_passage_tokens}"}


def digest_of(facts: dict[str, str]) -> str:
    """A short name of weights, by which mteb keeps their results apart from those of others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def run_tasks(model: MtebEncoder, tasks: Any, out: Path) -> list[str]:
    """Lines `TASK SUBSET SPLIT MAIN_SCORE`; results are kept in `out`, and finished ones aren't computed again."""
    import mteb

    results = mteb.evaluate(model, tasks, cache=mteb.ResultCache(out), show_progress_bar=False)
    return [
        f"{result.task_name:32s} {score['hf_subset']:12s} {split:12s} {score['main_score']:.4f}"
        for result in results.task_results
        for split, scores in result.scores.items()
        for score in scores
    ]


def tasks_named(names: list[str]) -> Any:
    """Raises ModelError: mteb isn't there, or has no such task."""
    try:
        import mteb
    except ImportError:
        raise ModelError(describe("mteb", "not installed", "its tasks need it", "pip install .[eval]")) from None
    try:
        return mteb.get_tasks(tasks=names)
    except (KeyError, ValueError) as error:
        raise ModelError(describe("--tasks", " ".join(names), f"mteb refuses: {error}")) from None


def main(given: list[str] | None = None) -> int:
    """Exit code: see dist.run_door."""
    chosen = arguments(given)

    def work() -> None:
        if dist.world_size() != 1:
            raise RunError(describe("evaluate_mteb", f"{dist.world_size()} ranks", "mteb runs in one process", "Start one."))
        tasks = tasks_named(chosen.tasks)
        check_writable(chosen.out / "results")
        print("\n".join(run_tasks(encoder(chosen), tasks, chosen.out)))

    return dist.run_door(work)


if __name__ == "__main__":
    sys.exit(main())
