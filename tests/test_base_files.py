"""Where a base's files are read from: one commit a process, fetched once, whatever `main` becomes; what can't be had is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale import base_files
from hybrid_scale.base_files import INDEX, SINGLE, fetch, locate
from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError, RunError
from hybrid_scale.model.digests import changes, check_trained_on, model_digests
from tests.model.bases import run_over, write_base


class Hub:
    """A repository `acme/tiny` of several commits in a folder; notes what is asked of it."""

    def __init__(self, cache: Path):
        self.cache, self.main, self.asked = cache, "a" * 40, []  # type: ignore[var-annotated]
        self.files = {self.main: {"config.json": b"{}", "model.safetensors": b"w1", "tokenizer.json": b"{}"}}

    def move(self, **files: bytes) -> None:
        before, self.main = self.files[self.main], chr(ord(self.main[0]) + 1) * 40
        self.files[self.main] = before | {name.replace("__", "."): content for name, content in files.items()}

    def snapshot_download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        if name != "acme/tiny":
            raise OSError("Repository\n  not found")
        commit = revision or self.main
        self.asked.append((commit, tuple(allow_patterns)))
        folder = self.cache / commit
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in self.files[commit].items():
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (folder / file).write_bytes(content)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache")
    monkeypatch.setattr(base_files, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(base_files, "_folders", {})
    monkeypatch.setattr(base_files, "_whole", set())
    return made


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process."""
    monkeypatch.setattr(base_files, "_folders", {})
    monkeypatch.setattr(base_files, "_whole", set())


TINY = ModelSettings(base="acme/tiny")


def test_what_is_small_comes_first_and_weights_once(hub):
    folder = locate(TINY, weights=False)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    fetch(TINY)
    assert (locate(TINY) / SINGLE).read_bytes() == b"w1"
    assert [patterns for _, patterns in hub.asked] == [base_files.SMALL, (SINGLE,)]


def test_a_process_reads_one_commit_whatever_main_becomes(hub, monkeypatch):
    first = locate(TINY, weights=False)
    hub.move(model__safetensors=b"w2")
    assert (locate(TINY) / SINGLE).read_bytes() == b"w1"
    assert locate(TINY) == first
    again(monkeypatch)
    assert (locate(TINY) / SINGLE).read_bytes() == b"w2"


def test_a_digest_is_of_what_was_loaded(hub, monkeypatch):
    """The first start downloads, the second finds all there: equal. A README moves `main` and changes nothing; weights do."""
    first = model_digests(TINY)
    assert set(first) == {"config.json", "model.safetensors", "tokenizer.json"}
    again(monkeypatch)
    assert model_digests(TINY) == first
    hub.move(README__md=b"news", generation_config__json=b"{}")
    again(monkeypatch)
    assert changes(first, model_digests(TINY)) == []
    hub.move(model__safetensors=b"w2")
    again(monkeypatch)
    (line,) = changes(first, model_digests(TINY))
    assert line.startswith("model model.safetensors: 2:")


def test_shards_are_those_of_the_index(hub):
    where = {"x": "one.safetensors", "y": "two.safetensors"}
    weights = {"one.safetensors": b"1", "two.safetensors": b"2", "consolidated.safetensors": b"both"}
    hub.files[hub.main] = {"config.json": b"{}", INDEX: json.dumps({"weight_map": where}).encode(), **weights}
    assert sorted(path.name for path in locate(TINY).glob("*.safetensors")) == ["one.safetensors", "two.safetensors"]
    assert "consolidated.safetensors" not in model_digests(TINY)


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_code_of_the_hub_needs_a_commit(hub, revision):
    settings = ModelSettings(base="acme/tiny", trust_remote_code=True, revision=revision)
    with pytest.raises(ModelError, match=r"model.revision: found .*; with trust_remote_code it must be a commit"):
        locate(settings)
    assert hub.asked == []


def test_code_comes_with_its_commit_and_counts(hub, monkeypatch):
    hub.files[hub.main]["modeling.py"] = b"print()"
    settings = ModelSettings(base="acme/tiny", trust_remote_code=True, revision=hub.main)
    assert (locate(settings) / "modeling.py").is_file()
    assert "modeling.py" in model_digests(settings)
    again(monkeypatch)
    assert "modeling.py" not in model_digests(TINY)


def test_what_cant_be_had_is_one_line(hub, tmp_path):
    with pytest.raises(ModelError, match=r"model.base: found 'acme/none@v2'; .*can't be had from the Hub: Repository not found"):
        locate(ModelSettings(base="acme/none", revision="v2"))
    with pytest.raises(ModelError, match="there is no such folder"):
        locate(ModelSettings(base=str(tmp_path / "none")))


def test_a_connection_cut_within_a_file_is_one_line(hub, monkeypatch):
    """Such errors of the Hub's library are neither OSError nor ValueError."""
    assert not issubclass(base_files.FAILURES[-1], OSError | ValueError)

    def download(*_: object, **__: object) -> str:
        raise base_files.FAILURES[-1]("peer closed connection\nwithout a whole body")

    monkeypatch.setattr(base_files, "snapshot_download", download)
    with pytest.raises(ModelError, match="can't be had from the Hub: peer closed connection without a whole body"):
        locate(TINY)


# Whose base a checkpoint is


def note(folder: Path, digests: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "trainer.json").write_text(json.dumps({"model": digests}))
    return folder


def test_another_base_is_refused_or_said(tmp_path):
    config = run_over(write_base(tmp_path / "base", "llama"))
    now = model_digests(config.model)
    checkpoint = note(tmp_path / "step_1", now)
    assert check_trained_on(checkpoint, config, now) is None
    other = {**now, "model.safetensors": "5:abc"}
    with pytest.raises(RunError, match=r"another base than .*step_1 was trained on: model model.safetensors: .* -> 5:abc"):
        check_trained_on(checkpoint, config, other)
    despite = config.model_copy(update={"training": config.training.model_copy(update={"resume_despite": ("model",)})})
    assert "another base" in str(check_trained_on(checkpoint, despite, other))


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"config.json": "1:a"}, {"config.json": "1:a", "merges.txt": "9:m"}, []),  # the first checkpoints noted no .txt
        ({"config.json": "1:a", "merges.txt": "9:n"}, {"config.json": "1:a", "merges.txt": "9:m"}, ["merges.txt"]),
        ({"config.json": "1:a", "generation_config.json": "1:g"}, {"config.json": "1:a"}, []),
        ({"model.safetensors": "1:a"}, {"model-1.safetensors": "1:a"}, ["model-1.safetensors", "model.safetensors"]),
        ({"tokenizer.json": "1:a"}, {"tokenizer.json": "1:b"}, ["tokenizer.json"]),
    ],
)
def test_which_files_count(before, now, named):
    assert [line.split()[1].rstrip(":") for line in changes(before, now)] == named
