"""The export door on runs that were really trained: LoRA, QLoRA and all weights; which step, which scores; refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.run import train
from launch import export as door
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs

TEXTS = ["", "Where is it?", "東京は日本の首都です。", "मौसम", "cut " * 100, "Ça alors !"]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "qlora": {"quantization": "nf4"}, "full": {"lora": None}}


def train_on_this_rank(tree: str) -> bool:
    dist.start()
    train(RunConfig.model_validate_json(tree), lambda *_: None)
    return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    """Three steps of each kind, every step kept; the LoRA run has scores of steps 2 and 3."""
    folder = write_inputs(tmp_path_factory.mktemp("door"))
    configs = {}
    for kind, model in KINDS.items():
        config = make_config(
            folder,
            run={"directory": str(folder / kind), "name": f"tiny-{kind}"},
            model={**model, "pooling": "mean"},
            optimizer={"learning_rate": 0.02, "schedule": "constant"},
            training={"max_steps": 3, "save_every_steps": 1, "keep_checkpoints": 3},
        )
        assert run_ranks(train_on_this_rank, 1, config.model_dump_json()) == [True]
        configs[kind] = config
    run = RunDirectory(configs["lora"].run.directory)
    run.evaluations.mkdir(exist_ok=True)
    for step, value in ((2, 0.25), (None, 0.75)):
        result = {"task": "tiny", "metrics": {"map": value}}
        run.evaluation_file("tiny", step).write_text(json.dumps(result))
    return configs


def our_vectors(config: RunConfig, step: int) -> np.ndarray:
    weights = RunDirectory(config.run.directory).checkpoints / f"step_{step:08d}" / "adapter"
    embedder, encoder = (
        load_embedder(config.model, 0, weights).eval(),
        for_evaluation(load_text_encoder(config), config.evaluation),
    )
    with torch.no_grad():
        return embedder(**encoder.collate(encoder.encode("query", TEXTS))).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_run_in_sentence_transformers(runs, tmp_path, kind, capsys):
    """The latest step by default, another by --step; a 4-bit run merged into its own weights."""
    config = runs[kind]
    found = {}
    for step, given in ((3, []), (1, ["--step", "1"])):
        given += ["--merge-into", "nf4"] if kind == "qlora" else []
        assert door.main([config.run.directory, "--to", str(tmp_path / str(step)), *given]) == 0
        assert f"step {step} as sentence-transformers" in capsys.readouterr().out
        found[step] = SentenceTransformer(str(tmp_path / str(step)), device="cpu").encode_query(TEXTS)
        assert np.abs(found[step] - our_vectors(config, step)).max() <= 1e-5
    assert np.abs(found[3] - found[1]).max() > 1e-3


def test_another_base_than_the_trained_one_is_refused(runs, tmp_path, capsys):
    config = runs["lora"]
    shutil.copytree(config.model.base, tmp_path / "base")
    shutil.copytree(config.run.directory, tmp_path / "run")
    run = RunDirectory(str(tmp_path / "run"))
    tree = yaml.safe_load(run.config_file.read_text())
    tree["model"]["base"] = str(tmp_path / "base")
    run.config_file.write_text(yaml.safe_dump(tree))
    given = [str(tmp_path / "run"), "--format", "adapter", "--to"]
    assert door.main([*given, str(tmp_path / "same")]) == 0
    path = tmp_path / "base" / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(weights)
    capsys.readouterr()
    assert door.main([*given, str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another base than" in line
    assert "model.safetensors: " in line
    assert not (tmp_path / "other").exists()


def test_several_formats_and_the_scores_of_the_step(runs, tmp_path):
    run = runs["lora"].run.directory
    given = ["--format", "adapter", "merged", "--base", "org/tiny", "--license", "mit", "--dtype", "bfloat16"]
    assert door.main([run, "--to", str(tmp_path / "last"), *given]) == 0
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["adapter", "merged"]
    card = (tmp_path / "last" / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"], front["license"]) == ("org/tiny", "adapter", "mit")
    assert front["language"] == ["en", "de", "zh"]
    assert "| map | 0.7500 |" in card
    assert str(tmp_path.parent) not in (tmp_path / "last" / "adapter" / "hybrid_scale.yaml").read_text()
    fingerprint = json.loads((Path(runs["lora"].data.train) / "manifest.json").read_text())["fingerprint"]
    assert f"`{fingerprint}`" in card
    assert json.loads((tmp_path / "last" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for step, line in ((2, "| map | 0.2500 |"), (1, "")):
        assert door.main([run, "--to", str(tmp_path / str(step)), "--format", "adapter", "--step", str(step)]) == 0
        card = (tmp_path / str(step) / "README.md").read_text()
        assert (line in card) if line else ("## Scores" not in card)


def test_what_a_user_can_do_wrong_ends_with_2(runs, tmp_path, capsys):
    run = runs["full"].run.directory
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for given, said in (
        ([run, "--to", str(tmp_path / "full")], "an export never overwrites"),
        (
            [run, "--to", str(tmp_path / "out"), "--step", "7"],
            "found 7; no whole checkpoint (there is none); complete are those of steps [1, 2, 3]",
        ),
        ([run, "--to", str(tmp_path / "out"), "--format", "adapter"], "the run trained all weights"),
        ([str(tmp_path / "absent"), "--to", str(tmp_path / "out")], "config.yaml"),
    ):
        assert door.main(given) == 2
        assert said in capsys.readouterr().err
    for push in (["--push", "no-user"], ["--push", "me/x", "--format", "adapter", "merged"]):
        with pytest.raises(SystemExit):
            door.main([run, "--to", str(tmp_path / "out"), *push])
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_damaged_step_is_not_exported(runs, tmp_path, capsys):
    """One bit of the adapter flipped, COMPLETE untouched: refused by --step; without it the step before is taken."""
    run = shutil.copytree(runs["lora"].run.directory, tmp_path / "run")
    path = run / "checkpoints" / "step_00000003" / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    given = ["--to", str(tmp_path / "out"), "--format", "adapter"]
    assert door.main([str(run), *given, "--step", "3"]) == 2
    assert "found 3; no whole checkpoint (adapter/adapter_model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert door.main([str(run), *given]) == 0
    assert "step 2 as adapter" in capsys.readouterr().out


def test_push_comes_after_a_whole_export_and_only_when_asked(runs, tmp_path, monkeypatch):
    pushed = []

    def push(folder: Path, name: str) -> str:
        pushed.append((name, sorted(path.name for path in folder.glob("*.json"))))
        return "address"

    monkeypatch.setattr(door, "push", push)
    assert door.main([runs["full"].run.directory, "--to", str(tmp_path / "a"), "--format", "merged"]) == 0
    assert pushed == []
    assert door.main([runs["full"].run.directory, "--to", str(tmp_path / "b"), "--format", "merged", "--push", "me/x"]) == 0
    assert pushed == [("me/x", ["config.json", "tokenizer.json", "tokenizer_config.json"])]
