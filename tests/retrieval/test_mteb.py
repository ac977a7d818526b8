"""Our model inside mteb: a task held in memory, its scores against our evaluation of the same texts."""

from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.models_protocols import EncoderProtocol

from hybrid_scale.config import RunConfig
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import ModelError
from hybrid_scale.model.load import load_embedder
from hybrid_scale.retrieval.benchmark import score
from hybrid_scale.retrieval.mteb_encoder import MtebEncoder, embed_texts, from_config, from_exported
from launch import evaluate_mteb as door
from tests.train.setup import make_config, write_inputs

PASSAGES = [f"text {n} of g{n % 7}" + " more" * (n % 5) for n in range(30)]
QUERIES = [f"question about g{n} more" for n in range(12)]


class LocalTask(AbsTaskRetrieval):  # type: ignore[misc]
    """12 questions, 30 passages, two relevant ones each."""

    metadata = TaskMetadata(
        name="LocalTask",
        description="a task in memory",
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        dataset={"path": "none/none", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **kwargs: Any) -> None:
        corpus = datasets.Dataset.from_list([{"id": f"p{n}", "title": "", "text": text} for n, text in enumerate(PASSAGES)])
        queries = datasets.Dataset.from_list([{"id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)])
        relevant = {f"q{n}": {f"p{n}": 1, f"p{n + 7}": 1} for n in range(len(QUERIES))}
        split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = write_inputs(tmp_path_factory.mktemp("mteb"))
    return make_config(folder, model={"query_prompt": "question: ", "passage_prompt": "text: "})


@pytest.fixture(scope="module")
def ours(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our evaluation of the same texts."""
    records: list[Record] = [Passage("t", f"p{n}", "en", text) for n, text in enumerate(PASSAGES)]
    records += [Query("t", f"q{n}", "en", text, f"q{n}") for n, text in enumerate(QUERIES)]
    records += [Judgment("t", f"q{n}", f"p{n + more}", 1) for n in range(len(QUERIES)) for more in (0, 7)]
    directory = tmp_path_factory.mktemp("set") / "set"
    write_retrieval(records, directory, {"name": "test"})
    task = RetrievalSet(directory)
    embedder = load_embedder(config.model, config.run.seed).eval()
    return score(task, config, load_text_encoder(config), lambda batch: embedder(**batch))


def test_mteb_scores_a_run_as_we_do(config: RunConfig, ours: dict[str, Any], tmp_path: Path) -> None:
    model = from_config(config, None, "hybrid_scale/tiny", "base")
    assert isinstance(model, EncoderProtocol)
    lines = door.run_tasks(model, [LocalTask()], tmp_path)
    results = mteb.evaluate(model, LocalTask(), cache=None, show_progress_bar=False)
    found = results.task_results[0].scores["test"][0]
    assert found["ndcg_at_10"] == pytest.approx(ours["metrics"]["ndcg@10"], abs=1e-5)
    assert found["map_at_100"] == pytest.approx(ours["metrics"]["map"], abs=1e-5)
    assert lines == [f"{'LocalTask':32s} {'default':12s} {'test':12s} {found['main_score']:.4f}"]
    assert list(tmp_path.rglob("LocalTask.json"))


class Recorder:
    """Remembers what it was asked to embed."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def __call__(self, role: str, texts: list[str]) -> np.ndarray:
        self.asked.append((role, texts))
        vectors = np.random.default_rng(len(self.asked)).normal(size=(len(texts), 4))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_roles_of_texts() -> None:
    recorder = Recorder()
    model = MtebEncoder(recorder, "a/b", "1")
    mteb.evaluate(model, LocalTask(), cache=None, show_progress_bar=False)
    by_role: dict[str, list[str]] = {"query": [], "passage": []}
    for role, texts in recorder.asked:
        by_role[role] += [text.strip() for text in texts]
    assert sorted(by_role["query"]) == sorted(QUERIES)
    assert sorted(by_role["passage"]) == sorted(PASSAGES)
    model.encode([{"text": ["a"]}, {"text": ["b", "c"]}])
    assert recorder.asked[-1] == ("query", ["a", "b", "c"])
    with pytest.raises(ModelError, match="embeds text"):
        model.encode([{"image": [0]}])
    with pytest.raises(ModelError, match="ORGANISATION/NAME"):
        MtebEncoder(recorder, "b", "1")


def test_similarities_are_inner_products() -> None:
    model = MtebEncoder(Recorder(), "a/b", "1")
    first, second = np.eye(3, 4, dtype=np.float32), np.full((3, 4), 0.5, np.float32)
    np.testing.assert_array_equal(model.similarity(first, second), np.full((3, 3), 0.5))
    np.testing.assert_array_equal(model.similarity_pairwise(first, second), np.full(3, 0.5))
    assert model.similarity(first[0], second).shape == (1, 3)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_texts_keep_their_order_in_any_batch(config: RunConfig, tokens: int) -> None:
    embedder, encoder = load_embedder(config.model, config.run.seed).eval(), load_text_encoder(config)
    together = embed_texts(encoder, lambda batch: embedder(**batch), "passage", PASSAGES, tokens)
    for text, vector in zip(PASSAGES[::6], together[::6], strict=True):
        alone = embed_texts(encoder, lambda batch: embedder(**batch), "passage", [text], 10_000)
        np.testing.assert_allclose(vector, alone[0], atol=1e-5)


def test_an_exported_model_keeps_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exported:
        settings = {"max_tokens": 7, "dimensions": 4}  # noqa: RUF012

        def __init__(self, options: Any):
            self.options = options

        def queries(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 4), np.float32)

        def passages(self, texts: list[str]) -> np.ndarray:
            return np.zeros((len(texts), 4), np.float32)

    monkeypatch.setattr("hybrid_scale.retrieval.mteb_encoder.Encoder", Exported)
    model = from_exported("folder", "a/b", "1", batch=3)
    assert model.encode([{"text": ["a"]}], prompt_type=mteb.types.PromptType.query).all()
    assert not model.encode([{"text": ["a"]}], prompt_type=mteb.types.PromptType.document).any()
    assert (model.mteb_model_meta.max_tokens, model.mteb_model_meta.embed_dim) == (7, 4)


def test_results_of_other_weights_get_another_revision() -> None:
    """mteb keeps results by revision, and gives back those that are there."""
    base = {"config.json": "1:a", "model.safetensors": "2:b"}
    others = ({**base, "model.safetensors": "2:c"}, {**base, "trained": "d"}, {**base, "trained": "e"})
    assert len({door.digest_of(facts) for facts in (base, *others)}) == 4
    assert door.digest_of(dict(reversed(base.items()))) == door.digest_of(base)


def test_the_door_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--run", str(tmp_path), "--out", str(tmp_path / "out"), "--tasks"]
    assert door.main([*given, "NoSuchTaskAtAll"]) == 2
    assert "mteb refuses" in capsys.readouterr().err
    assert door.main([*given, "NFCorpus"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
