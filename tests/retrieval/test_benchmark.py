"""A model over a retrieval set: sharded encoding and search against one text at a time and a plain sort."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.model.load import load_embedder
from hybrid_scale.retrieval.benchmark import evaluate_run, score
from hybrid_scale.runs import RunDirectory
from tests.ranks import run_ranks
from tests.train.setup import make_config, write_inputs

LANGUAGES = ("en", "de", "zh")
GROUPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("benchmark"))
    names = [(g, lang) for g in range(GROUPS) for lang in LANGUAGES]
    records: list[Any] = [Passage("t", f"{lang}:{g}", lang, f"text of g{g} {lang}" + " more" * (g % 5)) for g, lang in names]
    records += [Query("t", f"{lang}:{g}", lang, f"question {lang} about g{g}", f"g{g}") for g, lang in names]
    records += [Judgment("t", f"{lang}:{g}", f"{other}:{g}", 1) for g, lang in names for other in LANGUAGES]
    write_retrieval(records, folder / "test", {"name": "synthetic"})
    return folder


def score_on_this_rank(tree: str, directory: str) -> dict[str, Any]:
    config = RunConfig.model_validate_json(tree)
    dist.start()
    embedder = load_embedder(config.model, config.run.seed).eval()
    result = score(RetrievalSet(directory), config, load_text_encoder(config), lambda batch: embedder(**batch))
    return {key: value for key, value in result.items() if key != "seconds"}


def reference_map(config: RunConfig, task: RetrievalSet) -> tuple[float, float]:
    """(multi, mono) mAP from one text at a time, float64 scores and a full sort."""
    embedder, encoder = load_embedder(config.model, config.run.seed).eval(), load_text_encoder(config)

    def vectors(role: Any, texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([embedder(**encoder.collate(encoder.encode(role, [t]))).numpy() for t in texts]).astype(float)

    scores = vectors("query", task.queries.column("text")) @ vectors("passage", task.corpus.column("text")).T
    corpus_lang, query_lang = np.array(task.corpus.column("lang")), np.array(task.queries.column("lang"))
    relevant = np.zeros(scores.shape, bool)
    relevant[task.qrels[:, 0], task.qrels[:, 1]] = True

    def average_precision(row: int, pool: np.ndarray) -> float:
        order = pool[np.argsort(-scores[row, pool], kind="stable")]
        hits = np.flatnonzero(relevant[row, order]) + 1
        return float(np.mean(np.arange(1, len(hits) + 1) / hits))

    rows = range(len(scores))
    multi = np.mean([average_precision(row, np.arange(scores.shape[1])) for row in rows])
    mono = np.mean([average_precision(row, np.flatnonzero(corpus_lang == query_lang[row])) for row in rows])
    return float(multi), float(mono)


def test_any_number_of_ranks_gives_the_plain_result(folder):
    exact = {"embedding_dtype": "float32"}
    config = make_config(folder, training={"max_tokens_per_embedding_batch": 100}, evaluation=exact)
    multi, mono = reference_map(config, RetrievalSet(folder / "test"))
    for world in (1, 2, 4):
        results = run_ranks(score_on_this_rank, world, config.model_dump_json(), str(folder / "test"))
        assert all(result == results[0] for result in results)
        assert results[0]["metrics"]["multi_map"] == pytest.approx(multi, abs=1e-12)
        assert results[0]["metrics"]["mono_map"] == pytest.approx(mono, abs=1e-12)


def test_more_ranks_than_texts_in_a_round(folder):
    """One large micro-batch: three of four ranks embed a dummy."""
    config = make_config(folder, training={"max_tokens_per_embedding_batch": 100_000})
    one = run_ranks(score_on_this_rank, 1, config.model_dump_json(), str(folder / "test"))
    four = run_ranks(score_on_this_rank, 4, config.model_dump_json(), str(folder / "test"))
    assert four[0]["metrics"] == pytest.approx(one[0]["metrics"], abs=1e-12)


def test_files_of_a_run(folder, tmp_path):
    config = make_config(folder, run={"directory": str(tmp_path)}, data={"evaluate": [str(folder / "test")]})
    embedder = load_embedder(config.model, 0).eval()
    run = RunDirectory(tmp_path)
    for step in (5, None):
        evaluate_run(config, run, load_text_encoder(config), lambda batch: embedder(**batch), step)
    assert sorted(path.name for path in run.evaluations.iterdir()) == ["test.json", "test.parquet", "test.step-5.json"]
    assert json.loads((run.evaluations / "test.step-5.json").read_text())["step"] == 5


def test_a_run_scores_a_set_in_parts_as_one(folder, tmp_path):
    """One JSON file and one table in `eval/`, the mean of what its parts score alone."""
    for part in ("gis", "tex"):
        shutil.copytree(folder / "test", tmp_path / "forums" / part)
        manifest = tmp_path / "forums" / part / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "part_of": "forums", "part": part}))
    sets = [str(tmp_path / "forums"), str(folder / "test")]
    config = make_config(folder, run={"directory": str(tmp_path / "run")}, data={"evaluate": sets})
    embedder, run = load_embedder(config.model, 0).eval(), RunDirectory(tmp_path / "run")
    for step in (5, None):
        evaluate_run(config, run, load_text_encoder(config), lambda batch: embedder(**batch), step)
    names = ["forums.json", "forums.parquet", "forums.step-5.json", "test.json", "test.parquet", "test.step-5.json"]
    assert sorted(path.name for path in run.evaluations.iterdir()) == names
    whole, alone = (json.loads(run.evaluation_file(name).read_text()) for name in ("forums", "test"))
    assert whole["metrics"] == pytest.approx(alone["metrics"], abs=1e-12)
    assert whole["parts"] == {"gis": alone["metrics"], "tex": alone["metrics"]}
    assert (whole["step"], whole["queries"]) == (None, 2 * alone["queries"])
