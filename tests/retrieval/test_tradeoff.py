"""The index study: variants on vectors whose neighbours are known, measures by hand, the front by definition, the door."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval.evaluate import evaluate
from hybrid_scale.retrieval.index import Shard, search
from hybrid_scale.retrieval.tradeoff import run as tradeoff
from hybrid_scale.retrieval.tradeoff.corpus import Corpus
from hybrid_scale.retrieval.tradeoff.variants import defaults, parse
from launch import tradeoff as door

PASSAGES, DIMENSIONS = 400, 32
RUNNABLE = [name for name in defaults(PASSAGES, DIMENSIONS) if not name.startswith("gpu")]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    """40 queries in the middle of 40 tight clouds of ten passages each."""
    random = np.random.default_rng(3)
    centres = unit(random.normal(size=(40, DIMENSIONS)))
    passages = np.repeat(centres, 10, axis=0) + random.normal(0, 0.02, (PASSAGES, DIMENSIONS))
    return centres, unit(passages)


def write_set(directory: Path, passages: int = PASSAGES) -> RetrievalSet:
    """Question g in two languages; its relevant passages are the first two of cloud g."""
    records: list[Record] = [Passage("here", f"p{n:03}", "en", f"passage {n}") for n in range(passages)]
    for lang in ("en", "de"):
        for group in range(20):
            name = f"{lang}:{group}"
            records.append(Query("here", name, lang, f"question {name}", f"g{group}"))
            records += [Judgment("here", name, f"p{10 * group + offset:03}", 1) for offset in (0, 1)]
    write_retrieval(records, directory, {"name": "test"})
    return RetrievalSet(directory)


def queries_of(task: RetrievalSet, centres: np.ndarray) -> np.ndarray:
    """A query's vector is the centre of its question's cloud, a little off in German."""
    shift = np.random.default_rng(5).normal(0, 0.02, (20, DIMENSIONS))
    rows = [centres[int(name[3:])] + shift[int(name[3:])] * name.startswith("de") for name in task.queries.column("id")]
    return unit(np.stack(rows))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalSet:
    return write_set(tmp_path_factory.mktemp("study") / "clouds")


@pytest.fixture(scope="module")
def bench(task: RetrievalSet, clouds: tuple[np.ndarray, np.ndarray]) -> tradeoff.Bench:
    options = tradeoff.Options(k=10, resamples=499)
    return tradeoff.set_up(task, queries_of(task, clouds[0]), Shard(np.arange(PASSAGES), clouds[1]), options)


# ----------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_variant_finds_tight_clouds(clouds: tuple[np.ndarray, np.ndarray], name: str) -> None:
    """Chance is .025; the coarsest code of the list (pq:4, a byte for eight dimensions) must find well over half."""
    centres, passages = clouds
    variant = parse(name, PASSAGES, DIMENSIONS)
    index = variant.open(variant.build(Corpus(passages)), Corpus(passages))
    rows = index.search(centres, 10)
    found = np.mean([np.isin(row, np.arange(10 * number, 10 * number + 10)).mean() for number, row in enumerate(rows)])
    assert rows.shape == (40, 10)
    assert found > (0.98 if name.startswith(("flat", "sq:8")) or "rescore" in name else 0.6)


def test_sizes_are_those_of_the_formula(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    """Measured grows by the formula when the corpus grows: tables that don't grow cancel. HNSW's upper layers come on top."""
    passages = np.concatenate([clouds[1], unit(clouds[1] + 0.01)])
    for name in RUNNABLE:
        sizes = []
        for corpus in (clouds[1], passages):
            variant = parse(name, len(corpus), DIMENSIONS)
            sizes.append(variant.open(variant.build(Corpus(corpus)), Corpus(corpus)).bytes)
        grown = (sizes[1] - sizes[0]) / PASSAGES
        assert variant.bytes_per_vector <= grown + 1e-9, name
        assert grown <= variant.bytes_per_vector * (1.25 if name.startswith("hnsw") else 1) + 0.5, name


def test_exact_variants_equal_numpy(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    centres, passages = clouds
    for name in ("flat:fp32", "dims:32", "pca:32", "flat:fp32+rescore:3", "ivf:8:8", "hnsw:16:400"):
        variant = parse(name, PASSAGES, DIMENSIONS)
        rows = variant.open(variant.build(Corpus(passages)), Corpus(passages)).search(centres, 5)
        kept = passages.astype(np.float16).astype(np.float32) if "rescore" in name else passages
        expected = np.argsort(-(centres @ kept.T), axis=1, kind="stable")[:, :5]
        assert (rows == expected).mean() > 0.98, name


def test_first_dimensions_are_the_first(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    centres, passages = clouds
    variant = parse("dims:5", PASSAGES, DIMENSIONS)
    rows = variant.open(variant.build(Corpus(passages)), Corpus(passages)).search(centres, 7)
    expected = np.argsort(-(unit(centres[:, :5]) @ unit(passages[:, :5]).T), axis=1, kind="stable")[:, :7]
    assert (rows == expected).mean() > 0.98


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fat:fp32", "Did you mean 'flat'"),
        ("flat", "must read flat:TYPE"),
        ("flat:fp8", "must be one of fp32"),
        ("pq:5", "must divide the 32 dimensions"),
        ("ivf:8:9", "from 1 to 8"),
        ("ivf:500:1", "from 1 to 400"),
        ("binary+again:2", "rescore:F"),
        ("binary+rescore:0", "rescore:F"),
        ("dims:33", "from 1 to 32"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(name, PASSAGES, DIMENSIONS)


def test_what_can_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "256 vectors" in str(parse("pq:4", 255, DIMENSIONS).refusal)
    monkeypatch.delattr(faiss, "GpuIndexCagra", raising=False)
    assert "faiss-gpu-cuvs" in str(parse("gpu-cagra:64", PASSAGES, DIMENSIONS).refusal)
    monkeypatch.setattr(faiss, "GpuIndexFlatIP", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert parse("gpu-flat", PASSAGES, DIMENSIONS).refusal == "no GPU is visible"
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    assert parse("gpu-flat", PASSAGES, DIMENSIONS).refusal is None


# ----------------------------------------------------------------------------------------------------------- measures


def test_ranks_and_measures_by_hand() -> None:
    rows = np.array([[4, 2, 9], [7, -1, -1]])
    qrels = np.array([[0, 2, 1], [0, 5, 1], [1, 7, 1], [1, 0, 1]])
    assert tradeoff.ranks_in(rows, qrels).tolist() == [2, np.inf, 1, np.inf]


def test_the_exact_list_differs_in_nothing(bench: tradeoff.Bench) -> None:
    """Ties included: the certified list reversed among equals is still the certified list."""
    point = next(iter(tradeoff.study(bench, ["flat:fp32"])))
    assert point["recall@10"] == 1
    for quality in point["quality"].values():
        assert abs(quality["difference"]) < 1e-12
        assert quality["tost_p"] == 0
        assert quality["p"] == 1


def test_recall_counts_ties_as_found(bench: tradeoff.Bench) -> None:
    passages = np.repeat(np.eye(4, 8, dtype=np.float32), 5, axis=0)
    asked = np.eye(1, 8, dtype=np.float32)
    scores, _ = search(asked, Shard(np.arange(20), passages), 3)
    tied = tradeoff.Bench(
        Corpus(passages),
        np.arange(20),
        asked,
        scores[:, -1],
        np.zeros((0, 3), int),
        np.array(["g"]),
        np.array(["en"]),
        {},
        bench.options,
    )
    assert tied.recall(np.array([[4, 3, 2]])) == 1
    assert tied.recall(np.array([[4, 3, 5]])) == pytest.approx(2 / 3)
    assert tied.recall(np.array([[0, -1, -1]])) == pytest.approx(1 / 3)


def test_a_loss_is_measured_over_questions(bench: tradeoff.Bench) -> None:
    """A search that never finds anything for German loses half of the mean, with the questions as the clusters."""
    name = f"map@{bench.options.k}"
    blind = np.where(bench.language == "de", 0.0, bench.exact[name])
    found = tradeoff.compared(bench, name, blind)
    german = bench.exact[name][bench.language == "de"].mean()
    assert found["difference"] == pytest.approx(-german / 2, abs=1e-12)
    assert found["low"] <= found["difference"] <= found["high"] < 0
    assert found["p"] == 1 / 500  # 20 questions, all worse
    assert found["tost_p"] > 0.5


def test_questions_are_drawn_whole_and_always_the_same(task: RetrievalSet) -> None:
    some = tradeoff.studied(task, 7)
    groups = task.queries.column("group", some)
    assert len(some) == 14
    assert sorted(groups[:7]) == sorted(groups[7:])
    assert some.tolist() == tradeoff.studied(task, 7).tolist()
    assert len(tradeoff.studied(task, 0)) == len(tradeoff.studied(task, 99)) == 40


def points(*rows: tuple[float, float, float, float, float]) -> list[dict[str, Any]]:
    return [
        {
            "quality": {"m": {"difference": difference, "low": low, "high": high}},
            "bytes": {"measured": size},
            "query": {"cpu_ms": cost},
        }
        for difference, low, high, size, cost in rows
    ]


def test_the_front_by_hand() -> None:
    """Exact but large; smaller and a little worse; the same cost as that but worse within noise; the same, clearly worse."""
    ran = points((0, 0, 0, 100, 5), (-0.01, -0.02, 0, 50, 5), (-0.015, -0.03, -0.005, 50, 6), (-0.2, -0.3, -0.1, 50, 6))
    assert tradeoff.pareto(ran, "m") == ["front", "front", "overlaps", "behind"]
    assert tradeoff.pareto(points((0, 0, 0, 1, 1), (0, 0, 0, 1, 1)), "m") == ["front", "front"]


def test_set_up_refuses(task: RetrievalSet, clouds: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    queries, shard = queries_of(task, clouds[0]), Shard(np.arange(PASSAGES), clouds[1])
    for k in (9, PASSAGES + 1):
        with pytest.raises(DataError, match="from 10 to the 400 passages"):
            tradeoff.set_up(task, queries, shard, tradeoff.Options(k=k))
    own = write_set(tmp_path / "own")
    manifest = json.loads((own.directory / "manifest.json").read_text())
    (own.directory / "manifest.json").write_text(json.dumps({**manifest, "drop_own_id": True}))
    with pytest.raises(DataError, match="can't leave out"):
        tradeoff.set_up(RetrievalSet(own.directory), queries, shard, tradeoff.Options())


# ---------------------------------------------------------------------------------------------------------------- door


def write_folder(folder: Path, task: RetrievalSet, clouds: tuple[np.ndarray, np.ndarray]) -> Path:
    folder.mkdir()
    for kind, table, matrix in (("queries", task.queries, queries_of(task, clouds[0])), ("corpus", task.corpus, clouds[1])):
        np.save(folder / f"{kind}.npy", matrix)
        (folder / f"{kind}_ids.txt").write_text("".join(f"{name}\n" for name in table.column("id")))
    return folder


def test_the_door(
    task: RetrievalSet, clouds: tuple[np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_folder(tmp_path / "vec", task, clouds), tmp_path / "out"
    variants = ["flat:fp32", "sq:4", "binary+rescore:2"]
    given = [str(folder), str(task.directory), "--out", str(out), "--k", "10", "--variants", *variants]
    assert door.main(given) == 0
    result = json.loads((out / "tradeoff.json").read_text())
    assert [point["name"] for point in result["points"]] == variants
    assert (result["queries"], result["questions"], result["refused"]) == (40, 20, {})
    table = list(csv.DictReader((out / "tradeoff.csv").open()))
    assert len(table) == 3 * 2
    assert float(table[0]["bytes_formula"]) == 4 * DIMENSIONS
    assert {row["pareto"] for row in table} <= {"front", "overlaps", "behind"}
    assert all(0 <= float(row["p"]) <= float(row["p_holm"]) <= 1 for row in table)
    page = (out / "tradeoff.html").read_text()
    assert page.count("<svg") == 2 * 2  # two metrics, two costs
    assert "binary+rescore:2" in page
    assert result["points"][0]["quality"]["ndcg@10"]["verdict"] == "equivalent"
    assert door.main(given) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_a_variant_asked_for_by_name_must_run(
    task: RetrievalSet,
    clouds: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    given = [str(write_folder(tmp_path / "vec", task, clouds)), str(task.directory), "--out", str(tmp_path / "out")]
    assert door.main([*given, "--variants", "flat:fp32", "gpu-flat"]) == 2
    assert "gpu-flat" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_refused_variants_of_the_default_list_are_reported(bench: tradeoff.Bench, task: RetrievalSet) -> None:
    made = list(tradeoff.study(bench, ["flat:fp32", "gpu-cagra:64"]))
    result = tradeoff.finished(bench, task, made)
    refused = parse("gpu-cagra:64", PASSAGES, DIMENSIONS).refusal
    assert result["refused"] == ({"gpu-cagra:64": refused} if refused else {})
    assert len(result["points"]) + len(result["refused"]) == 2


# ------------------------------------------------------------------------------------------------------------- protocols


def in_two_languages(folder: Path, evaluation: str | None) -> tuple[RetrievalSet, np.ndarray, Shard]:
    """Unequal corpora and numbers of questions; a passage that the corpus lacks, a question without an answer, one whose answer
    is in the other language. Scores don't tie."""
    random = np.random.default_rng(17)
    sizes = {"bn": 30, "sw": 50}
    records: list[Record] = [
        Passage("t", f"{lang}{n}", lang, f"text {lang} {n}") for lang, size in sizes.items() for n in range(size)
    ]
    for lang, count in (("bn", 6), ("sw", 11)):
        for n in range(count):
            name = f"{lang}:q{n}"
            records.append(Query("t", name, lang, f"question {name}", name))
            wanted = random.permutation(sizes[lang])[:3]
            records += [Judgment("t", name, f"{lang}{at}", 0 if n == 1 else 1 + int(at) % 2) for at in wanted]
    records += [Judgment("t", "sw:q3", "sw999", 1)]
    if evaluation is not None:
        records += [Query("t", "bn:q9", "bn", "question elsewhere", "bn:q9"), Judgment("t", "bn:q9", "sw4", 1)]
    records.sort(key=lambda record: isinstance(record, Judgment))
    write_retrieval(records, folder, {"name": "test"})
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "evaluation": evaluation}))
    made = RetrievalSet(folder)
    vectors = [unit(random.normal(size=(len(table), DIMENSIONS))) for table in (made.queries, made.corpus)]
    return made, vectors[0], Shard(np.arange(80), vectors[1])


@pytest.mark.parametrize(
    ("evaluation", "measure", "apart"),
    [("miracl", "ndcg@10", True), ("mr_tydi", "mrr@10", True), (None, "ndcg@10", True), ("beir/scifact", "ndcg@10", False)],
)
def test_the_flat_index_scores_what_the_evaluation_does(
    tmp_path: Path, evaluation: str | None, measure: str, apart: bool
) -> None:
    made, queries, shard = in_two_languages(tmp_path / "set", evaluation)
    wanted = evaluate(made, queries, shard)
    bench = tradeoff.set_up(made, queries, shard, tradeoff.Options(k=10, resamples=99))
    result = tradeoff.finished(bench, made, list(tradeoff.study(bench, ["flat:fp32", "sq:8"])))
    assert result["certified"][measure] == pytest.approx(wanted["metrics"][measure], rel=0, abs=1e-12)
    flat = result["points"][0]
    assert flat["quality"][measure]["value"] == pytest.approx(wanted["metrics"][measure], rel=0, abs=1e-12)
    assert flat["recall@10"] == 1
    assert flat["bytes"]["measured"] == pytest.approx(4 * DIMENSIONS, abs=4)
    assert result["protocol"] == wanted["protocol"]
    assert len(bench.pools) == (2 if apart else 0)
    if apart:
        assert abs(wanted["union"]["metrics"][measure] - wanted["metrics"][measure]) > 0.01, "the union would be told apart"
        indexes = [parse("sq:8", 30, DIMENSIONS).build(pool.corpus) for pool in bench.pools]
        opened = [
            parse("sq:8", 30, DIMENSIONS).open(index, pool.corpus) for index, pool in zip(indexes, bench.pools, strict=True)
        ]
        found = tradeoff.searched(bench, opened)
        spoken = np.array(made.corpus.column("lang"))[found]
        assert (spoken == bench.language[:, None]).all()
        with pytest.raises(DataError, match="from 10 to the 30 passages of the language that has the fewest"):
            tradeoff.set_up(made, queries, shard, tradeoff.Options(k=31))


# --------------------------------------------------------------------------------------------------------------- memory


def test_samples_and_blocks_of_a_corpus(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    passages = clouds[1].astype(np.float16)
    corpus, row = Corpus(passages), 4 * DIMENSIONS
    np.testing.assert_array_equal(corpus.sample(), passages.astype(np.float32))
    np.testing.assert_array_equal(corpus.sample(100 * row), passages[::4].astype(np.float32))
    assert [len(block) for block in corpus.blocks(150 * row)] == [150, 150, 100]
    np.testing.assert_array_equal(np.concatenate(list(corpus.blocks(7 * row))), passages.astype(np.float32))
    np.testing.assert_allclose(corpus.mean(), passages.astype(np.float64).mean(0), atol=1e-7)
    np.testing.assert_array_equal(corpus.rows(np.array([[3, -1]])), passages[[[3, 0]]])


def test_the_order_of_rows_does_not_matter(
    bench: tradeoff.Bench, task: RetrievalSet, clouds: tuple[np.ndarray, np.ndarray]
) -> None:
    order = np.random.default_rng(8).permutation(PASSAGES)
    mixed = tradeoff.set_up(task, queries_of(task, clouds[0]), Shard(order, clouds[1][order]), bench.options)
    one, other = (next(iter(tradeoff.study(each, ["sq:8+rescore:2"]))) for each in (bench, mixed))
    assert one["recall@10"] == other["recall@10"]
    assert one["quality"] == other["quality"]


def test_an_index_beyond_the_memory_is_refused(bench: tradeoff.Bench, task: RetrievalSet, clouds: Any, tmp_path: Path) -> None:
    gib = 400 * DIMENSIONS * 2.5 / 2**30  # fp32 takes 4 bytes a number, sq:8 one, whose vectors to rescore with are elsewhere
    small = tradeoff.Options(k=10, memory_gib=gib)
    found = {p["name"]: p.get("refused") for p in tradeoff.study(replace(bench, options=small), ["flat:fp32", "sq:8+rescore:4"])}
    assert found["sq:8+rescore:4"] is None
    assert "GiB of memory" in str(found["flat:fp32"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--k", "-1", "k: found -1"), ("--margin", "0", "margin: found 0.0"), ("--questions", "-2", "questions: found -2")],
)
def test_numbers_are_checked_before_vectors_are_read(
    task: RetrievalSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert door.main([str(tmp_path / "none"), str(task.directory), "--out", str(tmp_path / "out"), option, value]) == 2
    assert message in capsys.readouterr().err
