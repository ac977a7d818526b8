"""launch/evaluate.py on a run that was really trained: stores, restart, the best checkpoint, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.retrieval.benchmark import evaluate_run
from hybrid_scale.retrieval.language_means import KEY
from hybrid_scale.runs import RunDirectory, read_json
from hybrid_scale.train.run import train
from launch.evaluate import main
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs

LANGUAGES, GROUPS = ("en", "de"), 20
POINT = "step_00000002-q512-p512"


def train_on_this_rank(tree: str) -> bool:
    dist.start()
    train(
        RunConfig.model_validate_json(tree),
        lambda config, run, encoder, engine, step: evaluate_run(config, run, encoder, engine.embed, step),
    )
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set`, a retrieval set, and `run`, two steps with a checkpoint and an evaluation each."""
    folder = write_inputs(tmp_path_factory.mktemp("door"))
    names = [(group, lang) for group in range(GROUPS) for lang in LANGUAGES]
    records: list[Record] = [Passage("t", f"{lang}:{g}", lang, f"text of g{g} {lang}" + " more" * (g % 5)) for g, lang in names]
    records += [Query("t", f"{lang}:{g}", lang, f"question {lang} about g{g}", f"g{g}") for g, lang in names]
    records += [Judgment("t", f"{lang}:{g}", f"{other}:{g}", 1) for g, lang in names for other in LANGUAGES]
    write_retrieval(records, folder / "set", {"name": "synthetic"})
    config = make_config(
        folder,
        data={"evaluate": [str(folder / "set")]},
        optimizer={"learning_rate": 0.01},
        evaluation={"subtract_language_means": True},
        training={"max_steps": 2, "save_every_steps": 1, "evaluate_every_steps": 1, "keep_best": "set:multi_map"},
    )
    assert run_ranks(train_on_this_rank, 1, config.model_dump_json()) == [True]
    return folder


def scored(folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "out.json"
    assert main([str(folder / "set"), *options, "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def stamps(store: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(store.glob("*/part_*"))}


def test_a_run_is_encoded_once_and_scores_as_in_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(folder / "run")
    result = scored(folder, "--run", str(run.path))
    store = run.embeddings / "set" / POINT
    before = stamps(store)
    assert before
    assert result["metrics"] == pytest.approx(read_json(run.evaluation_file("set"))["metrics"], abs=0.02)
    assert scored(folder, "--run", str(run.path)) == result
    assert stamps(store) == before
    assert result.pop("in_domain") == {"verdict": None, "sources": []}
    moved = read_json(run.evaluation_file("set"))[KEY]["metrics"]
    assert result.pop(KEY)["metrics"] == pytest.approx(moved, abs=0.02)
    assert KEY not in read_json(run.evaluation_file("set", 1)), "during training the plain scores alone"
    assert result["text_lengths"] == read_json(run.evaluation_file("set"))["text_lengths"]
    given = scored(folder, "--embeddings", str(store))
    assert (given.pop("similarity"), given.pop("passage_lengths")) == ("inner_product", None)
    assert given == result
    (store / "corpus" / "part_00000.npy").write_bytes(b"")
    capsys.readouterr()
    again = scored(folder, "--run", str(run.path))
    assert again == {**result, "in_domain": again["in_domain"], KEY: again[KEY]}
    assert "part_00000.npy has 0 bytes for 16 vectors: truncated" in capsys.readouterr().err
    assert (folder / "out.parquet").is_file()


def test_stored_vectors_need_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loading a large model takes longer than the search; and vectors of another model are refused before it is loaded."""
    run = RunDirectory(folder / "run")
    result = scored(folder, "--run", str(run.path))

    def loaded(*given: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("hybrid_scale.retrieval.scored_model.load_embedder", loaded)
    assert scored(folder, "--run", str(run.path)) == result
    store = str(run.embeddings / "set" / POINT)
    common = [str(folder / "set"), "--config", str(run.config_file), "--store", store, "--out", str(folder / "other.json")]
    assert main(common) == 2
    assert "these are embeddings of something else: model.trained: " in capsys.readouterr().err
    (run.embeddings / "set" / POINT / "corpus" / "part_00000.json").unlink()
    with pytest.raises(AssertionError, match="the model was loaded"):
        main([str(folder / "set"), "--run", str(run.path), "--out", str(folder / "other.json")])


def test_a_run_on_a_set_in_parts(folder: Path, tmp_path: Path) -> None:
    """Stores and numbers of each part are those that the part has alone."""
    run = RunDirectory(folder / "run")
    for part in ("gis", "tex"):
        shutil.copytree(folder / "set", tmp_path / "forums" / part)
        manifest = tmp_path / "forums" / part / "manifest.json"
        manifest.write_text(json.dumps({**read_json(manifest), "part_of": "forums", "part": part}))
    out = tmp_path / "forums.json"
    assert main([str(tmp_path / "forums"), "--run", str(run.path), "--out", str(out)]) == 0
    whole, alone = read_json(out), scored(folder, "--run", str(run.path))
    assert whole["parts"] == {"gis": alone["metrics"], "tex": alone["metrics"]}
    assert whole["in_domain"] == alone["in_domain"]
    stores = run.embeddings / "forums"
    assert sorted(path.relative_to(stores).as_posix() for path in stores.glob("*/*/corpus")) == [
        f"{POINT}/gis/corpus",
        f"{POINT}/tex/corpus",
    ]


def test_the_best_checkpoint(folder: Path) -> None:
    run = RunDirectory(folder / "run")
    best = read_json(run.checkpoints / "best")
    result = scored(folder, "--run", str(run.path), "--best")
    assert (run.embeddings / "set" / f"{best['folder']}-q512-p512" / "corpus" / "manifest.json").is_file()
    assert result["metrics"]["multi_map"] == pytest.approx(best["value"], abs=0.02)


def test_other_lengths_are_other_vectors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten tokens cut every query; they get a store and a result of their own, and the first one stays."""
    run = RunDirectory(folder / "run")
    whole = scored(folder, "--run", str(run.path))
    assert whole["text_lengths"] == text_limits(512, 512, 0, 0)
    kept = stamps(run.embeddings / "set" / POINT)
    cut = scored(folder, "--run", str(run.path), "--max-query-tokens", "10", "--max-passage-tokens", "12")
    assert cut["text_lengths"] == text_limits(10, 12, 40, cut["text_lengths"]["passages_at_limit"])
    assert cut["metrics"] != whole["metrics"]
    assert "warning: set: texts cut at 10 (queries) and 12 (passages) tokens: 40 queries (100.0%)" in capsys.readouterr().out
    assert stamps(run.embeddings / "set" / POINT) == kept
    with pytest.raises(SystemExit):
        main([str(folder / "set"), "--embeddings", "x", "--max-query-tokens", "9", "--out", str(folder / "out.json")])


def text_limits(query: int, passage: int, queries: int, passages: int) -> dict[str, int]:
    limits = {"max_query_tokens": query, "max_passage_tokens": passage}
    return {**limits, "queries_at_limit": queries, "passages_at_limit": passages}


def test_what_the_door_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = RunDirectory(folder / "run"), str(tmp_path / "out.json")
    common = [str(folder / "set"), "--run", str(run.path), "--out", out]
    steps = sorted(run.checkpoints.glob("step_*"))
    assert main([*common, "--store", str(tmp_path / "store")]) == 0
    kept = stamps(tmp_path / "store")
    (steps[-1] / "COMPLETE").rename(tmp_path / "COMPLETE")  # now the step before is the latest
    try:
        assert main([*common, "--store", str(tmp_path / "store")]) == 2
        assert "these are embeddings of something else: model.trained: " in capsys.readouterr().err
        assert stamps(tmp_path / "store") == kept
    finally:
        (tmp_path / "COMPLETE").rename(steps[-1] / "COMPLETE")
    best = (run.checkpoints / "best").read_text()
    (run.checkpoints / "best").unlink()
    assert main([*common, "--best"]) == 2
    assert "no best checkpoint" in capsys.readouterr().err
    (run.checkpoints / "best").write_text(best)
    with pytest.raises(SystemExit):
        main([str(folder / "set"), "--config", "c.yaml", "--best", "--out", out])


def test_an_untrained_base_is_kept_in_the_runs_folder(folder: Path) -> None:
    result = scored(folder, "--config", str(RunDirectory(folder / "run").config_file))
    assert (folder / "run" / "embeddings" / "set" / "base-q512-p512" / "queries" / "part_00000.npy").is_file()
    assert result["queries"] == 40
