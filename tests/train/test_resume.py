"""What a run may differ in from the checkpoint it goes on from; each refusal names every difference."""

import re
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.config import RunConfig, load_config
from hybrid_scale.errors import RunError
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.train import resume
from tests.train.setup import make_config, write_inputs


def config_in(place: Path) -> RunConfig:
    return make_config(place, run={"directory": str(place / "run")})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def stored(place: Path, config: RunConfig, fingerprint: str = "F") -> Path:
    """A folder with the `trainer.json` of a run of `config`."""
    write_json(place / "trainer.json", {"step": 6, **resume.facts_of(config, fingerprint)})
    return place


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    """`section__key=value` set."""
    tree = config.model_dump(mode="json")
    for path, value in settings.items():
        *sections, key = path.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = value
    return RunConfig.model_validate(tree)


FREE: list[dict[str, Any]] = [
    {"training__log_every_steps": 7, "training__keep_checkpoints": 9, "training__engine": "deepspeed"},
    {"training__max_tokens_per_micro_batch": 77, "training__deepspeed": "other.json", "run__name": "b"},
    {"data__evaluate": ["x"], "evaluation__top_k": 50, "model__gradient_checkpointing": True, "training__stop_at": "2099-01-01"},
]
BARRED: list[tuple[dict[str, Any], list[str]]] = [
    ({"loss__temperature": 0.1}, [r"loss.temperature: 0.05 -> 0.1"]),
    (
        {"model__lora__rank": 8, "optimizer__learning_rate": 2e-3, "run__seed": 2, "training__log_every_steps": 3},
        [r"model.lora.rank: 4 -> 8", r"optimizer.learning_rate: 0.001 -> 0.002", r"run.seed: 1 -> 2"],
    ),
    ({"training__max_steps": 9}, [r"training.max_steps: 4 -> 9 \(the cosine schedule's learning rates depend on it\)"]),
    (
        {"training__max_steps": 3, "optimizer__schedule": "constant"},
        [r"optimizer.schedule: 'cosine' -> 'constant'", r"training.max_steps: 4 -> 3 \(it may only grow\)"],
    ),
]


@pytest.mark.parametrize("settings", FREE)
def test_settings_that_cant_bend_the_curve_may_differ(inputs, tmp_path, settings):
    config = config_in(inputs)
    now = changed(config, **settings)
    assert resume.check(stored(tmp_path, config), now, resume.facts_of(now, "F")) == 6
    run = RunDirectory(tmp_path / "run")
    run.create(config)
    run.create(now, continuing=True)
    assert run.config() == config
    run.adopt(now)
    assert run.config() == now
    assert load_config(tmp_path / "run" / "config.1.yaml") == config


@pytest.mark.parametrize(("settings", "said"), BARRED)
def test_other_settings_are_refused_one_by_one(inputs, tmp_path, settings, said):
    config = config_in(inputs)
    now = changed(config, **settings)
    run = RunDirectory(tmp_path / "run")
    run.create(config)
    folder = stored(tmp_path, config)
    for refused in (
        lambda: resume.check(folder, now, resume.facts_of(now, "F")),
        lambda: run.create(now, continuing=True),
    ):
        with pytest.raises(RunError) as caught:
            refused()
        found = [line for line in re.split(r"\n  |\n|; |: (?=\w+\.\w+: )|\. Choose", str(caught.value)) if " -> " in line]
        assert len(found) == len(said)
        assert all(re.search(pattern, str(caught.value)) for pattern in said)
    assert len(resume.forced(folder, now, resume.facts_of(now, "F"))) == len(said)
    forced = changed(now, training__resume_despite=["config"])
    assert resume.check(folder, forced, resume.facts_of(forced, "F")) == 6
    run.create(forced, continuing=True)


def test_a_constant_schedule_may_be_prolonged(inputs, tmp_path):
    config = changed(config_in(inputs), optimizer__schedule="constant")
    now = changed(config, training__max_steps=9)
    assert resume.check(stored(tmp_path, config), now, resume.facts_of(now, "F")) == 6


def test_other_data_or_another_base_model_is_refused(inputs, tmp_path):
    config = config_in(inputs)
    folder = stored(tmp_path, config)
    with pytest.raises(RunError, match=r"data fingerprint: F \(.*train\) -> G \(.*train\)"):
        resume.check(folder, config, resume.facts_of(config, "G"))
    weights = next((inputs / "model").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        facts = resume.facts_of(config, "F")
        with pytest.raises(
            RunError, match=rf"model {weights.name}: {len(content)}:\w+ -> {len(content)}:\w+\n.*despite=\[model\]"
        ):
            resume.check(folder, config, facts)
        forced = changed(config, training__resume_despite=["model"])
        assert resume.check(folder, forced, facts) == 6
    finally:
        weights.write_bytes(content)


def test_a_checkpoint_that_drew_equal_cross_pairs_twice_is_refused(inputs: Path, tmp_path: Path) -> None:
    """Earlier versions did and don't say so; data without such pairs are drawn in the same order as ever."""
    config = config_in(inputs)
    folder = stored(tmp_path, config)
    trainer = read_json(folder / "trainer.json")
    del trainer["data"]["repetitions_left_out"]
    write_json(folder / "trainer.json", trainer)
    assert resume.check(folder, config, resume.facts_of(config, "F", 0)) == 6
    with pytest.raises(RunError, match=r"cross pairs left out because others equal them: 0 -> 7,037\n.*despite=\[data\]"):
        resume.check(folder, config, resume.facts_of(config, "F", 7037))


@pytest.mark.parametrize(("kept", "lacking"), [((), "step, config, data, model"), (("step", "config", "data"), "model")])
def test_a_checkpoint_of_an_older_version_is_told(inputs: Path, tmp_path: Path, kept: tuple[str, ...], lacking: str) -> None:
    write_json(tmp_path / "trainer.json", dict.fromkeys(kept, 0))
    with pytest.raises(RunError, match=f"trainer.json: .*an older version wrote this checkpoint, without {lacking}. Go on with"):
        resume.check(tmp_path, config_in(inputs), {})
