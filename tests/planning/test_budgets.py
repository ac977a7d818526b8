"""Token budgets that a config leaves to the planner: one answer for plans and trainers, no other curve, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.config import RunConfig, dump_config, load_config, parse_yaml, validate
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.errors import ConfigError
from hybrid_scale.model.load import count_parameters
from hybrid_scale.planning.forecast import Texts
from hybrid_scale.planning.hardware import GPUS, make_cluster, of_device
from hybrid_scale.planning.planner import as_planned, best_run, for_manifest, plan_run
from hybrid_scale.planning.search import BUDGETS, CAUTION
from hybrid_scale.runs import RunDirectory, barred, read_json
from hybrid_scale.train.batches import open_training_data
from hybrid_scale.train.replay import replay
from hybrid_scale.train.run import train
from hybrid_scale.train.settle import dry_run, plan_budgets, seen_gpu
from tests.planning.test_plan import TEXTS, config
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs
from tests.train.test_run import train_on_this_rank

AUTO = dict.fromkeys(BUDGETS, "auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("budgets"))


# The setting


def test_auto_is_kept_by_files_and_copies() -> None:
    run = config(training=AUTO)
    assert run.training.planned == BUDGETS
    assert "max_kept_tokens: auto" in dump_config(run)
    assert "planned" not in dump_config(run)
    assert validate(RunConfig, parse_yaml(dump_config(run), "x"), "x") == run
    assert RunConfig.model_validate_json(run.model_dump_json()) == run
    some = config(training={"max_kept_tokens": "auto", "planned": ["max_kept_tokens", "max_tokens_per_micro_batch"]})
    assert some.training.planned == ("max_tokens_per_micro_batch", "max_kept_tokens")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_steps": "auto"}, "training.max_steps: found 'auto'; input should be a valid integer"),
        ({"max_tokens_per_micro_batch": "Auto"}, "training.max_tokens_per_micro_batch: found 'Auto'; "),
        ({"planned": ["max_steps"]}, "training.planned.0: found 'max_steps'; "),
        ({"max_kept_tokens": "auto", "planned": 3}, "training.planned: found 3; "),
    ],
)
def test_other_settings_are_not_planned(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(training=training)
    assert message in str(refused.value)


def test_overrides_say_auto(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(config()))
    run = load_config(tmp_path / "run.yaml", ["training.max_tokens_per_micro_batch=auto"])
    assert run.training.planned == ("max_tokens_per_micro_batch",)


# The choice


@pytest.mark.parametrize(
    ("gpu", "nodes", "gpus"), [("h100", 1, 8), ("a100-40", 2, 8), ("4090", 1, 8), ("h200", 1, 1), ("h100", 8, 8)]
)
def test_all_open_is_the_best_run_with_this_checkpointing(gpu: str, nodes: int, gpus: int) -> None:
    """On the built-in interconnect; a 70B is fastest with checkpointing, which its config has."""
    cluster = make_cluster(gpu, nodes, gpus)
    chosen, best = plan_run(config(training=AUTO), cluster, TEXTS), best_run(config(), cluster, TEXTS)
    assert best is not None
    assert chosen.fits
    assert chosen.memory <= GPUS[gpu].memory * 0.97 * CAUTION
    assert chosen.config.training == best.config.training.model_copy(update={"shard_group": best.group})
    assert (chosen.seconds, chosen.lines) == (best.seconds, best.lines)


def test_a_stated_number_and_group_stay() -> None:
    cluster = make_cluster("h100")
    for stated in (
        {"max_tokens_per_micro_batch": 2048, "max_kept_tokens": "auto", "shard_group": 8},
        {"max_tokens_per_micro_batch": "auto", "max_kept_tokens": 20480, "shard_group": 2},
        {"max_tokens_per_micro_batch": "auto", "max_tokens_per_embedding_batch": 5000, "passes": "two_pass", "shard_group": 4},
    ):
        training = plan_run(config(training=stated), cluster, TEXTS).config.training
        assert all(getattr(training, name) == value for name, value in stated.items() if value != "auto")
        assert training.planned == ()
    two_pass = plan_run(config(training={**AUTO, "passes": "two_pass"}), cluster, TEXTS)
    assert (two_pass.schedule, two_pass.config.training.max_kept_tokens) == ("two_pass", None)


def test_direct_is_planned_directly_or_not_at_all() -> None:
    """8 x 4090 can't keep the graphs of a 70B's whole share; eight H100 can."""
    asked = config(training={**AUTO, "passes": "direct"})
    assert plan_run(asked, make_cluster("h100"), TEXTS).schedule == "direct"
    assert not plan_run(asked, make_cluster("4090"), TEXTS).fits


def test_the_choice_does_not_hang_on_the_interconnect() -> None:
    """A trainer doesn't know its own; only the seconds do."""
    fast, slow = (
        plan_run(config(training=AUTO), make_cluster("a100-40", 2, 8, kind), TEXTS) for kind in ("ib-ndr", "ethernet-25")
    )
    assert fast.config == slow.config
    assert fast.seconds.total < slow.seconds.total


def test_more_memory_never_gives_a_slower_plan() -> None:
    plans = [plan_run(config(training={**AUTO, "gpu_memory_gib": gib}), make_cluster("h100"), TEXTS) for gib in range(20, 100, 8)]
    times = [plan.seconds.total for plan in plans]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_small_batches_get_room_for_uneven_steps() -> None:
    """64 rows: a step's tokens vary by a fifth, so a direct schedule is planned with more room than their mean."""
    small = config(sampler={"global_batch": 64, "pool_rows": 16}, model={"base": "Qwen/Qwen2.5-0.5B"}, training=AUTO)
    plan = plan_run(small, make_cluster("h100", 1, 1), TEXTS)
    kept = plan.config.training.max_kept_tokens
    assert kept is not None
    assert 1.1 * plan.tokens < kept < 1.3 * plan.tokens


def test_a_gpu_as_its_driver_names_it() -> None:
    """Rates of the table's row, memory as reported in whole GiB; an unknown one is known by its memory."""
    found = of_device("NVIDIA H100 80GB HBM3", 79.19 * 2**30)
    assert (found.name, found.memory, found.flops) == ("h100", 79 * 2.0**30, GPUS["h100"].flops)
    assert of_device("NVIDIA H100 80GB HBM3", 79.85 * 2**30) == found
    other = of_device("Frobnicator 9000", 33.3 * 2**30)
    assert (other.name, other.memory, other.generation) == ("Frobnicator 9000", 33 * 2.0**30, "unknown")
    assert of_device("processor", 1.5 * 2**30).memory == 1.5 * 2**30


def test_what_a_manifest_says_is_put_back() -> None:
    run = config(training=AUTO)
    plan = plan_run(run, make_cluster("a100-40", 2, 8), TEXTS)
    manifest = json.loads(json.dumps({"planned": for_manifest(plan)}))
    assert as_planned(run, manifest) == plan.config
    assert as_planned(run, {}) == run
    assert as_planned(config(), manifest) == config()


# The trainer


def test_the_trainers_answer_is_the_plans(folder: Path) -> None:
    """Same memory, same texts, from the model's own config.json and skeleton and the length tables of its data."""
    for gib, world in ((1.9, 1), (2.5, 8)):
        run = make_config(folder, model={"quantization": "nf4"}, training={**AUTO, "gpu_memory_gib": gib})
        data = open_training_data(run, world)
        gpu = seen_gpu(run)
        trained = plan_budgets(run, data, count_parameters(run.model), gpu, world, world)
        assert trained is not None
        cluster = make_cluster("h100", 1, world)
        planned = plan_run(run, cluster)
        assert (planned.texts.query, planned.texts.passage) == (trained.texts.query, trained.texts.passage)
        assert planned.config == trained.config
        assert planned.lines == trained.lines


def test_training_with_planned_budgets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Budgets of two memories give the losses of stated ones; what was chosen is said and written, what was asked stays asked."""
    losses = {}
    for name, training in {
        "stated": {},
        "large": {**AUTO, "gpu_memory_gib": 4},
        "small": {**AUTO, "gpu_memory_gib": 1.7},
    }.items():
        run = make_config(folder, run={"directory": str(tmp_path / name)}, training={"max_steps": 3, **training})
        train(run, lambda *_: None)
        place = RunDirectory(tmp_path / name)
        losses[name] = [record["loss"] for record in place.metrics()]
        manifest, said = read_json(place.manifest_file), capsys.readouterr().err
        if training:
            settings = manifest["planned"]["settings"]
            assert all(isinstance(settings[key], int) for key in BUDGETS)
            assert f"{settings['max_tokens_per_micro_batch']:,} a micro-batch" in said
            assert place.config() == run
            assert as_planned(run, manifest).training.planned == ()
        else:
            assert "planned" not in manifest
    assert losses["large"] == pytest.approx(losses["stated"], rel=1e-5)
    assert losses["small"] == pytest.approx(losses["stated"], rel=1e-5)


def test_a_run_goes_on_with_another_clusters_budgets(folder: Path, tmp_path: Path) -> None:
    """The same memory resolves to the same numbers; other memory or stated numbers are no other run."""
    run = make_config(folder, run={"directory": str(tmp_path)}, training={"max_steps": 2, **AUTO, "gpu_memory_gib": 4})
    train(run, lambda *_: None)
    first = read_json(RunDirectory(tmp_path).manifest_file)["planned"]
    train(run, lambda *_: None)
    assert read_json(RunDirectory(tmp_path).manifest_file)["planned"] == first
    for training in ({**AUTO, "gpu_memory_gib": 1.7}, {"max_tokens_per_micro_batch": 96}):
        other = make_config(folder, run={"directory": str(tmp_path)}, training={"max_steps": 2, **training})
        assert barred(run, other) == []
        train(other, lambda *_: None)


def test_ranks_agree_on_their_budgets(folder: Path, tmp_path: Path) -> None:
    """Two ranks: the first one plans for both, and the curve is that of stated budgets on one."""
    losses = []
    for ranks, training in ((1, {}), (2, {**AUTO, "gpu_memory_gib": 4})):
        run = make_config(folder, run={"directory": str(tmp_path / str(ranks))}, training={"max_steps": 2, **training})
        if ranks == 1:
            train(run, lambda *_: None)
        else:
            run_ranks(train_on_this_rank, ranks, run.model_dump_json())
        losses.append([record["loss"] for record in RunDirectory(run.run.directory).metrics()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert read_json(tmp_path / "2" / "manifest.json")["planned"]["cluster"] == "2 x processor (4.0 GiB)"


def test_dry_run_plans_too(folder: Path) -> None:
    text = dry_run(make_config(folder, training={**AUTO, "gpu_memory_gib": 4}), 4)
    assert "planned for 4 x processor (4.0 GiB)" in text
    assert "max_tokens_per_micro_batch: auto" not in text


def test_a_failure_is_replayed_with_the_budgets_of_its_run(folder: Path, tmp_path: Path) -> None:
    """On a machine without a GPU, where nothing can be planned."""
    asked = {"run": {"directory": str(tmp_path)}, "training": {"max_steps": 1, **AUTO}}
    settings = {"max_tokens_per_micro_batch": 96, "max_kept_tokens": 96, "max_tokens_per_embedding_batch": 96}
    (tmp_path / "manifest.json").write_text(json.dumps({"planned": {"settings": settings}}))
    run = make_config(folder, run={"directory": str(tmp_path)}, training={"max_steps": 1})
    train(run, lambda *_: None)
    failure = tmp_path / "failures" / "step_1"
    failure.mkdir(parents=True)
    (failure / "batch.json").write_text(json.dumps({"step": 0, "world_size": 1, "what": "loss", "ranks": [0]}))
    (failure / "adapter").symlink_to(next((tmp_path / "checkpoints").glob("*/adapter")))
    assert "everything is finite" in replay(make_config(folder, **asked), failure)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({}, "training.gpu_memory_gib: found None; training.max_tokens_per_micro_batch: auto needs a GPU's memory"),
        ({"gpu_memory_gib": 1.0}, "training.max_tokens_per_micro_batch: found 'auto'; does not fit: needs .* It fits with a "),
    ],
)
def test_what_can_not_be_planned_is_refused(folder: Path, training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dry_run(make_config(folder, training={**AUTO, **training}), 1)


def test_texts_of_a_plan_are_those_of_the_data(folder: Path) -> None:
    run = make_config(folder, training={**AUTO, "gpu_memory_gib": 4})
    data = open_training_data(run, 1)
    assert len(Pairs(run.data.train).queries) == len(data.query_lengths)
    plan = plan_budgets(run, data, count_parameters(run.model), seen_gpu(run), 1, 1)
    assert plan is not None
    assert plan.texts == Texts(data.query_lengths.mean(), data.passage_lengths.mean(), f"measured: {run.data.train}")
