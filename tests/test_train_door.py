"""The training door: what it refuses before a step is made, and that one run directory has one training."""

import sys
from pathlib import Path

import pytest
import yaml

from hybrid_scale.data.records import Judgment, Passage, Query
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.runs import RunDirectory
from launch import tiny_model, train
from tests.train.setup import config_tree, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("door"))
    for name in ("set", "other/set"):
        records = [Passage("w", "p", "en", "text"), Query("w", "q", "en", "words", "q"), Judgment("w", "q", "p", 1)]
        write_retrieval(records, folder / name, {"name": "test"})
    (folder / "run.yaml").write_text(yaml.safe_dump(config_tree(folder)))
    return folder


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", str(folder / "run.yaml"), *arguments])
    return train.main()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.evaluate=[FOLDER/set, FOLDER/absent]"], "absent: found 'no manifest.json'"),
        (["data.evaluate=[FOLDER/train]"], "a prepared 'retrieval' directory is needed here"),
        (["data.evaluate=[FOLDER/set, FOLDER/other/set]"], "data.evaluate: found ['set']; results are kept by the folder's name"),
        (
            ["data.evaluate=[FOLDER/set]", "training.keep_best=sets:map"],
            "no such set is scored during training. Did you mean",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_sets_are_opened_before_the_training(folder, monkeypatch, tmp_path, capsys, overrides, said, dry):
    overrides = [text.replace("FOLDER", str(folder)) for text in overrides]
    run = [f"run.directory={tmp_path / 'run'}", *(["--dry-run"] if dry else [])]
    assert start(monkeypatch, folder, *overrides, *run) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_second_training_is_refused(folder, monkeypatch, tmp_path, capsys):
    first = RunDirectory(tmp_path / "run")
    first.hold()
    assert start(monkeypatch, folder, f"run.directory={first.path}") == 2
    assert "another training is writing this run. Wait until it has ended" in capsys.readouterr().err
    assert [path.name for path in first.path.iterdir()] == [".lock"]


def test_ranks_of_a_dry_run(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, folder, "--dry-run", "--ranks", "0")
    assert ended.value.code == 2
    assert "at least 1 is needed" in capsys.readouterr().err


def test_a_model_is_never_overwritten(folder, monkeypatch, capsys):
    before = (folder / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(sys, "argv", ["tiny_model.py", str(folder / "train"), "--out", str(folder / "model")])
    assert tiny_model.main() == 2
    assert "model: found 'a non-empty folder'; a model is never overwritten. Choose another --out." in capsys.readouterr().err
    assert (folder / "model" / "model.safetensors").read_bytes() == before
