"""Whole runs: the same curve on any number of ranks, resume, an agreed stop, refusals."""

import contextlib
import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_scale import dist
from hybrid_scale.checkpoints import complete, latest
from hybrid_scale.config import OptimizerSettings, RunConfig
from hybrid_scale.errors import ConfigError, RunError
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train import resume
from hybrid_scale.train.batches import open_training_data
from hybrid_scale.train.run import train
from hybrid_scale.train.schedule import learning_rate
from hybrid_scale.train.settle import dry_run
from tests.ranks import run_ranks
from tests.train.kills import EXITS, Start
from tests.train.setup import make_config, write_inputs, zero


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("run"))


def train_on_this_rank(tree: str, evaluated: str = "") -> bool:
    """Train; optionally note when evaluation is due."""
    config = RunConfig.model_validate_json(tree)
    dist.start()

    def evaluate(config: RunConfig, run: RunDirectory, encoder: Any, engine: Any, step: int | None) -> None:
        if evaluated and dist.rank() == 0:
            with open(evaluated, "a") as file:
                file.write(f"{step}\n")

    train(config, evaluate)
    return True


def stop_after(config: RunConfig, step: int) -> None:
    """Train on two ranks, of which the first gets SIGTERM while `step` is logged."""
    start = Start(config, 2, 1, hold_at=step)
    start.wait_for_step(step)
    start.kill([0], signal.SIGTERM)
    assert start.codes() == [EXITS["stopped"]] * 2, start.output()


def what_training_says(tree: str) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train_on_this_rank(tree)
    return said.getvalue()


def losses(config: RunConfig) -> list[float]:
    return [record["loss"] for record in RunDirectory(config.run.directory).metrics()]


def adapter(config: RunConfig) -> dict[str, np.ndarray]:
    """Trained weights of the latest checkpoint: an adapter, or all weights."""
    folder = latest(RunDirectory(config.run.directory))
    assert folder is not None
    (path,) = (folder / "adapter").glob("*.safetensors")
    return load_file(path)


def run_config(folder: Path, place: Path, **sections: dict[str, Any]) -> RunConfig:
    training = {"max_steps": 6, **sections.pop("training", {})}
    return make_config(folder, **{"run": {"directory": str(place)}, "training": training, **sections})


PRECISIONS: dict[str, tuple[dict[str, Any], int, float, float]] = {
    "float32": ({}, 24, 1e-5, 1e-5),
    "nf4-bfloat16": ({"quantization": "nf4", "dtype": "bfloat16"}, 10, 0.1, 0.02),
}
"""Model settings, steps, and how far losses and adapter weights may be apart. Seen after 50: 4e-7 and 5e-8; .018 and .003."""

WAYS: list[tuple[int, int, dict[str, Any]]] = [
    (1, 0, {"max_tokens_per_micro_batch": 100_000}),
    (2, 3, {"max_tokens_per_micro_batch": 128, "passes": "two_pass"}),
    (4, 2, {"max_tokens_per_micro_batch": 96, "max_kept_tokens": 96}),
]
"""Ranks, ZeRO stage (0: plain), and how the batch is cut."""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_curve_on_any_number_of_ranks(folder, tmp_path, precision):
    """Many AdamW steps on 1, 2 and 4 ranks, other micro-batches, schedules and ZeRO stages each time: one curve."""
    model, steps, loss_tolerance, weight_tolerance = PRECISIONS[precision]
    configs = []
    for world, stage, cut in WAYS:
        training = {"max_steps": steps, **cut}
        if stage:
            training |= {"engine": "deepspeed", "deepspeed": zero(stage, tmp_path)}
        config = run_config(folder, tmp_path / f"w{world}", training=training, model={**model, "gradient_checkpointing": False})
        assert run_ranks(train_on_this_rank, world, config.model_dump_json()) == [True] * world
        configs.append(config)
    schedules = [{record["schedule"] for record in RunDirectory(config.run.directory).metrics()} for config in configs]
    assert schedules[:2] == [{"direct"}, {"two_pass"}]
    assert "kept" in schedules[2]
    for config in configs[1:]:
        assert losses(config) == pytest.approx(losses(configs[0]), abs=loss_tolerance)
        for name, weight in adapter(config).items():
            np.testing.assert_allclose(weight, adapter(configs[0])[name], atol=weight_tolerance)
    assert np.mean(losses(configs[0])[-5:]) < (0.8 if precision == "float32" else 0.95) * np.mean(losses(configs[0])[:5])


@pytest.mark.parametrize("engine", ["plain", "zero3-nf4", "zero3-full", "zero2"])
def test_resume_is_bit_exact_at_equal_world_size(folder, tmp_path, engine):
    """Stopped by SIGTERM after step 2 on two ranks, then continued: every loss and every weight as without the stop."""
    sections: dict[str, dict[str, Any]] = {"model": {"lora": {"rank": 4, "dropout": 0.1}, "gradient_checkpointing": False}}
    sections["training"] = {"max_steps": 4}
    if engine != "plain":
        sections["model"]["quantization"] = "nf4" if engine == "zero3-nf4" else "none"
        sections["training"] |= {"engine": "deepspeed", "deepspeed": zero(2 if engine == "zero2" else 3, tmp_path)}
    if engine == "zero3-full":
        sections["model"]["lora"] = None
    whole = run_config(folder, tmp_path / "whole", **{k: dict(v) for k, v in sections.items()})
    parts = run_config(folder, tmp_path / "parts", **{k: dict(v) for k, v in sections.items()})
    assert run_ranks(train_on_this_rank, 2, whole.model_dump_json()) == [True, True]
    stop_after(parts, 2)
    stopped = RunDirectory(parts.run.directory).status()
    assert (stopped["status"], stopped["step"], stopped["reason"]) == ("preempted", 2, "SIGTERM on rank 0")
    assert run_ranks(train_on_this_rank, 2, parts.model_dump_json()) == [True, True]
    assert RunDirectory(parts.run.directory).status()["status"] == "done"
    assert losses(parts) == losses(whole)
    for name, weight in adapter(parts).items():
        assert np.array_equal(weight, adapter(whole)[name]), name


def test_resume_on_another_number_of_ranks(folder, tmp_path):
    """Two ranks under ZeRO-3, then four: the curve continues to float32 rounding (DeepSpeed's own checkpoint refuses this)."""
    sections = {"training": {"max_steps": 4, "engine": "deepspeed", "deepspeed": zero(3, tmp_path)}}
    whole = run_config(folder, tmp_path / "whole", **{k: dict(v) for k, v in sections.items()})
    parts = run_config(folder, tmp_path / "parts", **{k: dict(v) for k, v in sections.items()})
    run_ranks(train_on_this_rank, 2, whole.model_dump_json())
    stop_after(parts, 2)
    assert run_ranks(train_on_this_rank, 4, parts.model_dump_json()) == [True] * 4
    assert losses(parts) == pytest.approx(losses(whole), abs=5e-5)
    records = RunDirectory(parts.run.directory).metrics()
    seen = [record["total_real_tokens"] for record in records]
    assert seen == np.cumsum([record["real_tokens"] for record in records]).tolist(), "tokens go on from the stop"
    assert seen == [record["total_real_tokens"] for record in RunDirectory(whole.run.directory).metrics()]


def test_when_things_happen(folder, tmp_path):
    """Evaluation every 2 steps, before and after; checkpoints every 2, two kept; the manifest and metrics say what ran."""
    config = run_config(
        folder,
        tmp_path / "run",
        training={"evaluate_every_steps": 2, "save_every_steps": 2, "log_every_steps": 5, "trackers": ["tensorboard"]},
        evaluation={"before_training": True},
    )
    noted = tmp_path / "evaluated"
    run_ranks(train_on_this_rank, 1, config.model_dump_json(), str(noted))
    assert noted.read_text().split() == ["0", "2", "4", "None"]
    run = RunDirectory(config.run.directory)
    assert [path.name for path in complete(run)] == ["step_00000004", "step_00000006"]
    manifest = json.loads(run.manifest_file.read_text())
    assert manifest["world_size"] == 1
    assert manifest["data"]["fingerprint"] == json.loads((folder / "train" / "manifest.json").read_text())["fingerprint"]
    record = run.metrics()[-1]
    assert [each["step"] for each in run.metrics()] == [2, 4, 5, 6], "every fifth, the last, and where something is scored"
    assert record["pairs"] == 16
    assert record["real_tokens"] <= record["padded_tokens"] <= record["lockstep_tokens"]
    assert list(run.path.rglob("events.out.tfevents*"))
    lines = run.metrics_file.read_text()
    said = run_ranks(what_training_says, 1, config.model_dump_json())[0]  # a finished run, started again
    assert "all 6 steps of this run and its evaluation are done; nothing is left to do" in said
    assert len(said.splitlines()) == 1
    assert (noted.read_text().split(), run.metrics_file.read_text()) == (["0", "2", "4", "None"], lines)


def test_other_data_or_config_is_refused_on_resume(folder, tmp_path):
    config = run_config(folder, tmp_path / "run")
    run_ranks(train_on_this_rank, 1, config.model_dump_json())
    place = latest(RunDirectory(config.run.directory))
    assert place is not None
    fingerprint = open_training_data(config, 1).pairs.fingerprint
    facts = resume.facts_of(config, fingerprint)
    assert resume.check(place, config, facts) == 6
    with pytest.raises(RunError, match=r"data fingerprint: .* -> another"):
        resume.check(place, config, resume.facts_of(config, "another"))
    with pytest.raises(RunError, match=r"loss.temperature: 0.05 -> 0.1"):
        resume.check(place, run_config(folder, tmp_path / "run", loss={"temperature": 0.1}), facts)


def test_what_a_run_was_forced_over_is_kept(folder, tmp_path):
    """Two forced continuations, each with its difference in the manifest; a third start differs in nothing and adds nothing."""
    schedule = {"learning_rate": 1e-3, "schedule": "constant", "max_gradient_norm": 0.0}
    said = ""
    for steps, temperature in ((2, 0.05), (3, 0.1), (4, 0.2), (5, 0.2)):
        training = {"max_steps": steps, "resume_despite": ["config"]}
        config = run_config(folder, tmp_path / "run", training=training, loss={"temperature": temperature}, optimizer=schedule)
        said += run_ranks(what_training_says, 1, config.model_dump_json())[0]
    assert json.loads(RunDirectory(config.run.directory).manifest_file.read_text())["resumed_despite"] == [
        {"after_step": 2, "differences": ["config: loss.temperature: 0.05 -> 0.1"]},
        {"after_step": 3, "differences": ["config: loss.temperature: 0.1 -> 0.2"]},
    ]
    found = re.findall(r"resume_despite: the run goes on after step (\d) over\n  (.*)", said)
    assert found == [("2", "config: loss.temperature: 0.05 -> 0.1"), ("3", "config: loss.temperature: 0.1 -> 0.2")]


def test_an_incomplete_checkpoint_is_no_checkpoint(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", training={"save_every_steps": 2})
    run_ranks(train_on_this_rank, 1, config.model_dump_json())
    run = RunDirectory(config.run.directory)
    (run.checkpoints / "step_00000006" / "COMPLETE").unlink()
    found = latest(run)
    assert found is not None
    assert found.name == "step_00000004"


def test_a_failure_is_recorded_with_its_reason(folder, tmp_path):
    config = run_config(folder, tmp_path / "run", data={"train": str(tmp_path / "absent")})
    with pytest.raises(AssertionError, match="not a prepared data directory"):
        run_ranks(train_on_this_rank, 1, config.model_dump_json())
    status = RunDirectory(config.run.directory).status()
    assert status["status"] == "failed"
    assert "not a prepared data directory" in status["reason"]


def test_more_ranks_than_rows(folder):
    config = make_config(folder, sampler={"global_batch": 4, "arm": "cross", "pool_rows": 1})
    with pytest.raises(ConfigError, match=r"sampler.global_batch: found 4; 8 ranks need at least a row each"):
        open_training_data(config, 8)


def test_deepspeed_without_a_launcher_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = run_config(folder, tmp_path / "run", training={"engine": "deepspeed", "deepspeed": zero(3, tmp_path)})
    with pytest.raises(ConfigError, match="accelerate launch --use_deepspeed"):
        train(config, lambda *_: None)
    assert not (tmp_path / "run").exists()


def test_direct_is_refused_where_it_doesnt_fit(folder):
    config = make_config(folder, training={"passes": "direct", "max_tokens_per_micro_batch": 96})
    with pytest.raises(ConfigError, match=r"'direct'; step 0 needs the graphs of \d+ tokens at once, 96 are allowed"):
        dry_run(config, 1)


def test_dry_run_says_the_derived_numbers(folder):
    text = dry_run(make_config(folder, model={"quantization": "nf4"}), 2)
    # 2 layers of q, o [32x32], k, v [16x32], gate, up [96x32], down [32x96]; embedding 400 x 32, norms 5 x 32
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 96 * 32)
    lora = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 96))
    assert f"{linear + 400 * 32 + 5 * 32 + lora:,} ({linear:,} in 4 bits), {lora:,} trained" in text
    assert "mono rows per global batch                       8" in text
    assert "steps per epoch" in text


def test_learning_rates_by_hand():
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(step, settings, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = OptimizerSettings(learning_rate=1.0, schedule="cosine")
    assert [learning_rate(step, cosine, 4) for step in (0, 2)] == pytest.approx([1.0, 0.5])
