"""Baselines against formulas written out here, a sorted list, NumPy's SVD, and the door end to end."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from hybrid_scale import dist
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import DataError, ModelError
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.retrieval.baselines import run as baselines
from hybrid_scale.retrieval.baselines.bm25 import K1, B, Bm25, Tokenizer, rank_by_scores
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard
from hybrid_scale.retrieval.language_removal import Removal, fit_and_remove, parse
from hybrid_scale.retrieval.lengths import UNCUT
from hybrid_scale.retrieval.published_encoder import Encoder, EncoderOptions, encode_set
from hybrid_scale.retrieval.vectors import open_embeddings
from launch import baselines as door
from tests.ranks import run_ranks
from tests.retrieval.worlds import write_embeddings, write_task

TEXTS = ["the red fox", "a red red dog runs", "blue sky", "the fox and the dog", "red"]


def write_texts(directory: Path, own_ids: bool = False) -> RetrievalSet:
    """Five passages and three queries; with `own_ids` query 0 is passage p0 and the set drops it."""
    name = "p0" if own_ids else "q0"
    records: list[Record] = [Passage("here", f"p{n}", "en", text) for n, text in enumerate(TEXTS)]
    for query, text in ((name, "red fox"), ("q1", "dog, DOG"), ("q2", "unheard")):
        records.append(Query("here", query, "en", text, query))
    records += [Judgment("here", name, "p1", 1), Judgment("here", "q1", "p3", 2), Judgment("here", "q2", "p2", 1)]
    write_retrieval(records, directory, {"name": "test"})
    if own_ids:
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps({**manifest, "drop_own_id": True}))
    return RetrievalSet(directory)


# --------------------------------------------------------------------------------------------------------------- BM25


def test_bm25_is_lucenes_formula(tmp_path: Path) -> None:
    """Sum over the query's words of ln(1 + (N - df + .5) / (df + .5)) * tf / (tf + k1 (1 - b + b length / mean length))."""
    task = write_texts(tmp_path / "set")
    words = [text.split() for text in TEXTS]
    mean_length = np.mean([len(w) for w in words])

    def score(query: list[str], passage: list[str]) -> float:
        total = 0.0
        for word in query:
            df, tf = sum(word in w for w in words), passage.count(word)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + K1 * (1 - B + B * len(passage) / mean_length))
        return total

    index = Bm25(task)
    for number, query in enumerate((["red", "fox"], ["dog", "dog"], ["unheard"])):
        np.testing.assert_allclose(index.scores(number), [score(query, w) for w in words], atol=1e-6)


def test_bm25_result_by_hand(tmp_path: Path) -> None:
    """Reciprocal ranks of the one relevant passage; q2 matches nothing, so the passage number decides and p2 is third."""
    result = baselines.bm25(write_texts(tmp_path / "set"), tmp_path / "out.parquet")
    index = Bm25(RetrievalSet(tmp_path / "set"))
    order = sorted(range(5), key=lambda n: (-index.scores(0)[n], n))
    ranks = [1 + order.index(1), 1 + sorted(range(5), key=lambda n: (-index.scores(1)[n], n)).index(3), 3]
    assert result["metrics"]["map"] == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=1e-12)
    assert result["metrics"]["ndcg@10"] == pytest.approx(np.mean([1 / math.log2(1 + rank) for rank in ranks]), abs=1e-12)
    assert result["baseline"]["settings"]["k1"] == 0.9


def test_bm25_drops_a_querys_own_passage(tmp_path: Path) -> None:
    with_own = baselines.bm25(write_texts(tmp_path / "a"), tmp_path / "a.parquet")
    without = baselines.bm25(write_texts(tmp_path / "b", own_ids=True), tmp_path / "b.parquet")
    assert without["own_ids_dropped"] == 1
    order = sorted(range(5), key=lambda n: (-Bm25(RetrievalSet(tmp_path / "a")).scores(0)[n], n))
    place = 1 + order.index(1)
    assert order[0] == 0
    gain = 1 / (place - 1) - 1 / place
    assert without["metrics"]["map"] - with_own["metrics"]["map"] == pytest.approx(gain / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "language", "stem", "tokens"),
    [
        ("The Fox's dens", "en", False, ["the", "fox", "s", "dens"]),
        ("running dogs", "en", True, ["run", "dog"]),
        ("laufende Hunde", "de", True, ["laufend", "hund"]),
        ("日本語 x", "ja", True, ["日本", "本語", "x"]),
        ("漢字", "zh-Hant", False, ["漢字"]),
        ("running", "sw", True, ["running"]),
        ("running dogs", "eng_Latn", True, ["run", "dog"]),
        ("咖啡x", "zh_TW", False, ["咖啡", "啡x"]),
        ("zhōngguó", "zh-Latn", False, ["zhōngguó"]),
        ("မြန်မာ", "mya_Mymr", False, [*map("".join, itertools.pairwise("မြန်မာ"))]),
        ("हिन्दी में काम", "hi", False, ["हिन्दी", "में", "काम"]),
        ("മലയാളം, ಕನ್ನಡ", "ml", False, ["മലയാളം", "ಕನ್ನಡ"]),
        ("كِتَابٌ كتـــاب", "ar", False, ["كتاب", "كتاب"]),
        ("שָׁלוֹם", "he", False, ["שלום"]),
        ("Cafe\u0301 CAFÉ", "fr", False, ["café", "café"]),
        ("ISPARTA İzmir ılık", "tr", False, ["ısparta", "izmir", "ılık"]),
        ("İzmir IZMIR", "en", False, ["izmir", "izmir"]),
        ("co\u00adoperate می\u200cخواهم", "fa", False, ["cooperate", "میخواهم"]),
        ("ﬁne ＡＢＣ１", "en", False, ["fine", "abc1"]),
        ("end.Start a_b 3.14 👍\ufe0f !", "en", False, ["end", "start", "a_b", "3", "14"]),
        ("น\u0e4d\u0e32", "th", False, ["น\u0e33"]),
    ],
)
def test_tokens(text: str, language: str, stem: bool, tokens: list[str]) -> None:
    """By hand from Unicode's tables: marks stay with their letters, and equal words have one form."""
    assert Tokenizer(stem)(text, language) == tokens


def test_bm25_of_a_corpus_without_a_word(tmp_path: Path) -> None:
    records: list[Record] = [Passage("here", f"p{n}", "en", text) for n, text in enumerate(("!!", "👍", "..."))]
    records += [Query("here", "q", "en", "red", "q"), Judgment("here", "q", "p1", 1)]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    task = RetrievalSet(tmp_path / "set")
    assert Bm25(task).scores(0).tolist() == [0, 0, 0]
    assert baselines.bm25(task, tmp_path / "out.parquet")["metrics"]["map"] == 0.5  # ties go to the lower number


def test_ranks_of_a_scorer_are_those_of_a_sorted_list() -> None:
    random = np.random.default_rng(1)
    scores = random.integers(0, 4, (6, 40)).astype(np.float32)  # heavy ties
    language, judged = random.integers(0, 3, 40), np.array([(q, p) for q in range(6) for p in random.permutation(40)[:5]])
    own = np.array([-1, 3, -1, 39, 0, -1])
    above, best, numbers = rank_by_scores(lambda q: scores[q].copy(), judged, language, 3, own, 10)
    for query in range(6):
        order = [p for p in sorted(range(40), key=lambda p: (-scores[query, p], p)) if p != own[query]]
        assert numbers[query].tolist() == order[:10]
        assert best[query].tolist() == scores[query, order[:10]].tolist()
        for (_, passage), counts in zip(judged[judged[:, 0] == query], above[judged[:, 0] == query], strict=True):
            if passage != own[query]:
                before = order[: order.index(passage)]
                assert counts.tolist() == [sum(language[p] == c for p in before) for c in range(3)]


# ------------------------------------------------------------------------------------------------------------ removal


def removed(vectors: np.ndarray, language: np.ndarray, languages: int, removal: Removal, shared: bool = False) -> np.ndarray:
    return np.concatenate(list(fit_and_remove(vectors, language, languages, removal, shared)))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def cones() -> tuple[np.ndarray, np.ndarray]:
    """50 unit vectors of 3 languages, each around its own axis."""
    random = np.random.default_rng(7)
    language = np.arange(50) % 3
    return unit(random.normal(0, 0.3, (50, 8)) + np.eye(3, 8)[language]).astype(np.float16), language


def test_language_mean_by_numpy(cones: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, language = cones
    exact = vectors.astype(np.float64)
    expected = unit(np.stack([v - exact[language == c].mean(0) for v, c in zip(exact, language, strict=True)]))
    np.testing.assert_allclose(removed(vectors, language, 3, Removal("language_mean")), expected, atol=1e-6)


@pytest.mark.parametrize("directions", [1, 3])
def test_lir_by_numpys_svd(cones: tuple[np.ndarray, np.ndarray], directions: int) -> None:
    vectors, language = cones
    found = removed(vectors, language, 3, Removal("lir", directions))
    for c in range(3):
        rows = vectors[language == c].astype(np.float64)
        axes = np.linalg.svd(rows, full_matrices=False)[2][:directions]
        np.testing.assert_allclose(found[language == c], unit(rows - rows @ axes.T @ axes), atol=1e-5)
        assert np.abs(found[language == c] @ axes.T).max() < 1e-5


def test_a_language_of_one_text_keeps_nothing_and_bad_names_are_refused(cones: tuple[np.ndarray, np.ndarray]) -> None:
    vectors, language = cones[0][:4], np.array([0, 0, 0, 1])
    for removal in (parse("language_mean"), parse("lir")):
        assert not removed(vectors, language, 2, removal)[3].any()
    assert parse("lir:4") == Removal("lir", 4)
    for wrong in ("lir:0", "lir:x", "lir:", "pca"):
        with pytest.raises(DataError, match="post-processing"):
            parse(wrong)
    with pytest.raises(DataError, match="fewer than the 8 dimensions"):
        fit_and_remove(vectors, language, 2, Removal("lir", 8), False)


def removed_on_a_rank(vectors: np.ndarray, language: np.ndarray, method: str) -> np.ndarray:
    dist.start()
    mine = np.arange(len(vectors)) % dist.world_size() == dist.rank()
    return removed(vectors[mine], language[mine], 3, parse(method), shared=True)


@pytest.mark.distributed
def test_the_fit_is_the_same_on_two_ranks(cones: tuple[np.ndarray, np.ndarray]) -> None:
    for method in ("language_mean", "lir:2"):
        parts = run_ranks(removed_on_a_rank, 2, *cones, method)
        whole = removed(*cones, 3, parse(method))
        np.testing.assert_allclose(np.concatenate(parts), np.concatenate([whole[::2], whole[1::2]]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ encoders


@pytest.fixture(scope="module")
def plain_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with its tokenizer, as a plain Hugging Face folder."""

    folder = tmp_path_factory.mktemp("encoder")
    write_tokenizer([*TEXTS, "query: red fox dog unheard"], folder, 300)
    write_model(folder, 300, hidden=32, layers=2, heads=4)
    return folder


def by_transformers(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Unit vectors, a text at a time, without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append((hidden.mean(0) if pooling == "mean" else hidden[-1] if pooling == "lasttoken" else hidden[0]).numpy())
    return unit(np.stack(rows))


@pytest.mark.parametrize("pooling", [None, "lasttoken", "cls"])
def test_an_encoder_gives_what_transformers_gives(plain_encoder: Path, tmp_path: Path, pooling: str | None) -> None:
    task = write_texts(tmp_path / "set")
    options = EncoderOptions(str(plain_encoder), query_prompt="query: ", pooling=pooling, batch=2)
    encoder = Encoder(options)
    queries, numbers, blocks = encode_set(task, encoder)
    passages = np.concatenate(list(blocks))
    asked = [f"query: {text}" for text in task.queries.column("text")]
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(queries, by_transformers(plain_encoder, asked, pooling or "mean"), atol=1e-5)
    np.testing.assert_allclose(passages, by_transformers(plain_encoder, TEXTS, pooling or "mean"), atol=1e-5)
    assert encoder.settings["prompts"]["query"] == "query: "


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("multilingual-e5-small", {}, "--query-prompt 'query: ' --passage-prompt 'passage: '"),
        ("e5_base_v2", {"query_prompt": "query: "}, "Give --passage-prompt 'passage: '."),
        ("multilingual-e5-large-instruct", {}, "Give --query-prompt 'query: '."),
        ("e5-small", {"query_prompt": "query: ", "passage_prompt": "passage: "}, None),
        ("e5000-model", {}, None),
    ],
)
def test_e5_without_its_prompts_is_said(
    plain_encoder: Path, tmp_path: Path, name: str, given: dict[str, str], missing: str | None
) -> None:
    (tmp_path / name).symlink_to(plain_encoder)
    said = Encoder(EncoderOptions(str(tmp_path / name), **given)).missing_prompts()  # type: ignore[arg-type]
    assert said is None if missing is None else missing in str(said)


def test_encoders_that_can_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be opened"):
        Encoder(EncoderOptions(str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="must be one of mean"):
        Encoder(EncoderOptions("x", pooling="median"))


# ---------------------------------------------------------------------------------------------------------------- door


def test_the_door_writes_what_evaluation_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path / "little")
    folder = write_embeddings(tmp_path / "vec", task)
    out = tmp_path / "out"
    given = [str(task.directory), "--out", str(out), "--bm25", "--embeddings", str(folder), "--remove", "language_mean", "lir:2"]
    assert door.main(given) == 0
    results = {path.parent.parent.name: json.loads(path.read_text()) for path in out.glob("*/eval/little.json")}
    assert set(results) == {"bm25", "vec", "vec+language_mean", "vec+lir-2"}
    queries, shard = open_embeddings(folder, task)
    plain = evaluate(task, queries, shard)
    assert results["vec"] == {**plain, "baseline": results["vec"]["baseline"], "text_lengths": None}
    assert results["bm25"]["text_lengths"] == UNCUT
    for result in results.values():
        assert set(result) == {*plain, "baseline", "text_lengths"}
        assert set(result["metrics"]) == set(plain["metrics"])
        table = parquet.read_table(out / result["baseline"]["name"] / "eval" / "little.parquet").to_pandas()
        union = table[table.pool == "union"]
        assert result["metrics"]["map"] == pytest.approx(union["map"].mean(), abs=1e-12)
    fitted = results["vec+lir-2"]["baseline"]["fitted_on"]
    assert "transductive" in fitted["what"]
    assert fitted["passages"] == {"en": 12, "de": 12, "sw": 12}
    removal, names = Removal("lir", 2), ("en", "de", "sw")
    asked, held = (np.array([names.index(lang) for lang in table.column("lang")]) for table in (task.queries, task.corpus))
    corpus = removed(np.asarray(shard.vectors), held[shard.numbers], 3, removal)
    expected = evaluate(task, removed(queries, asked, 3, removal), Shard(shard.numbers, corpus))
    assert results["vec+lir-2"]["metrics"] == expected["metrics"]
    assert capsys.readouterr().out.count("multi_map") == 4
    assert door.main(given) == 2
    assert "results are never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "give --bm25"), (["--embeddings", "a", "b"], "one folder per data set"), (["--bm25", "--remove", "pca"], "must be")],
)
def test_the_door_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    write_texts(tmp_path / "set")
    assert door.main([str(tmp_path / "set"), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_saved_vectors_are_read_back(plain_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_texts(tmp_path / "set")
    kept = tmp_path / "vec"
    assert (
        door.main(
            [str(task.directory), "--out", str(tmp_path / "a"), "--encoder", str(plain_encoder), "--save-vectors", str(kept)]
        )
        == 0
    )
    folder = kept / plain_encoder.name / "set"
    queries, shard = open_embeddings(folder, task)
    again, _, blocks = encode_set(task, Encoder(EncoderOptions(str(plain_encoder))))
    passages = np.concatenate(list(blocks))
    np.testing.assert_allclose(queries, again, atol=1e-3)
    np.testing.assert_allclose(shard.vectors, passages, atol=1e-3)
