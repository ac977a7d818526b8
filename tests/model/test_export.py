"""The adapter folder in PEFT and here, the model card, folders written whole or not at all, uploads."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModel,
)

from hybrid_scale.errors import ModelError, RunError
from hybrid_scale.model import export as exporting
from hybrid_scale.model.card import model_card
from hybrid_scale.model.export import export, new_folder, push
from hybrid_scale.model.trained import Merging, Trained
from tests.model.exports import TEXTS, TOLERANCE, distance, our_vectors, rest, trained, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("inputs") / "model")


def test_the_adapter_folder_loads_in_peft_and_here(base, tmp_path):
    run = trained(base, tmp_path)
    export(run, "adapter", tmp_path / "out", Merging("float32"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["inference_mode"]) == (str(base), None, True)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), str(tmp_path / "out"))
    expected = our_vectors(run, "query")
    with torch.no_grad():
        states = [plain(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in run.texts.encode("query", TEXTS)]
    assert distance(expected, torch.nn.functional.normalize(torch.stack(states), dim=-1)) <= TOLERANCE
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].replace("FOLDER", str(tmp_path / "out")).replace('["..."]', "texts"), scope | {"texts": TEXTS}, scope)
    assert distance(expected, scope["vectors"].detach()) <= TOLERANCE


def test_an_adapter_folder_of_a_full_run_is_refused(base, tmp_path):
    run = trained(base, tmp_path, lora=None)
    with pytest.raises(ModelError, match="the run trained all weights"):
        export(run, "adapter", tmp_path / "out", Merging("float32"))


# The card


def test_the_card_is_yaml_and_says_what_was_done(base, tmp_path):
    results = ({"task": "xquad", "metrics": {"map": 0.25, "mono_map": None}}, {"task": "mlqa", "metrics": {"map": 0.5}})
    facts = {
        "base_name": "org/base-7b",
        "languages": ("en", "no", "zh-Hant", "sr-Latn", "zh"),
        "fingerprint": "f1n9er",
        "scores": results,
        "license": "apache-2.0",
    }
    run = trained(base, tmp_path, facts, query_prompt="a | b\n")
    card = model_card(run, "sentence-transformers", Merging("bfloat16"))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "language": ["en", "no", "zh", "sr"],
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "base_model": "org/base-7b",
        "base_model_relation": "finetune",
        "tags": ["sentence-transformers", "feature-extraction"],
    }
    for line in (
        "| measure | xquad | mlqa |",
        "| map | 0.2500 | 0.5000 |",
        "| mono_map | - | - |",
        '| query prompt | "a \\| b\\n" |',
        "| longest query, passage in training (tokens) | 32, 64 |",
        "Fingerprint of the training data: `f1n9er`.",
    ):
        assert f"\n{line}\n" in body
    assert "rounded to bfloat16 once" in body
    assert "Queries are cut at 32" in body
    assert str(base) not in card
    plain = model_card(Trained(run.config, *rest(run)), "adapter", Merging("float32"))
    assert "## Scores" not in plain
    assert "base_model" not in yaml.safe_load(plain.split("---\n")[1]), "a folder's path is no name on the Hub"
    assert str(base) not in plain


# Folders and the Hub


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(RunError, match="an export never overwrites"), new_folder(tmp_path / name):
            raise AssertionError("not reached")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "broken") as beside:
        (beside / "absent").rename(beside / "half")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as beside:
        (beside / "whole").touch()
        assert list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_push_uploads_the_folder_and_never_shows_the_token(tmp_path, monkeypatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **given: Any) -> None:
            calls.append((name, given))

        def upload_folder(self, **given: Any) -> None:
            calls.append(("upload", given))
            if given["repo_id"] == "me/refused":
                raise OSError("403 for hf_secret")

    monkeypatch.setattr(exporting, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push(tmp_path, "me/model").endswith("/me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][1].items() >= {"repo_id": "me/model", "folder_path": tmp_path}.items()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelError, match="nobody else has this folder"):
        push(tmp_path, "me/model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match=r"--push: found 'me/refused'; the Hub refused: 403 for \(token\)") as caught:
        push(tmp_path, "me/refused")
    assert "hf_secret" not in str(caught.value)
