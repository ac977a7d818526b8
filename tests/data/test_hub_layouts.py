"""Local rebuilds of published layouts, read by `hub` and by name: configs, splits, columns and types as their cards say them.

Every retrieval set holds the same: passages 1 (T one) and 02 (two), a query 9, judged 02 with grade 1.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Bad, Judgment, Note, Pair, Passage, Query
from hybrid_scale.data.sources import beir_sets, hub, miracl, mr_tydi, pairs
from hybrid_scale.errors import DataError
from launch import prepare

Rows = list[dict[str, Any]]
PASSAGES: Rows = [{"_id": "1", "title": "T", "text": "one"}, {"_id": "02", "title": "", "text": "two"}]
QUERIES: Rows = [{"_id": "9", "text": "which"}, {"_id": "unjudged", "text": "what"}]
QRELS: Rows = [{"query-id": "9", "corpus-id": "02", "score": 1}]
NO_SCORE: Rows = [{"query-id": "9", "corpus-id": "02"}]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def data_set(folder: Path, tables: dict[tuple[str, str], Rows], kind: str = "parquet", types: str = "") -> str:
    """A repository with a README of configs: {(config, split): rows}. `types`: features as a card declares them."""
    configs: dict[str, list[str]] = {}
    folder.mkdir(parents=True)
    for (config, split), rows in tables.items():
        path = folder / config / f"{split}-00000-of-00001.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{path.name}")
    listed = [f"- config_name: {config}\n  data_files:\n" + "\n".join(files) for config, files in configs.items()]
    (folder / "README.md").write_text("---\n" + types + "configs:\n" + "\n".join(listed) + "\n---\n")
    return str(folder)


def check(records: Iterator[Any], lang: str = "en", before: str = "") -> list[str]:
    """The records are those of every layout; returns the notes."""
    found = list(records)
    assert [bad.message for bad in found if isinstance(bad, Bad)] == []
    passages = [(p.id, p.lang, p.text) for p in found if isinstance(p, Passage)]
    assert passages == [(f"{before}1", lang, "T one"), (f"{before}02", lang, "two")]
    assert [(q.id, q.lang, q.text, q.group) for q in found if isinstance(q, Query)] == [
        (f"{before}9", lang, "which", f"{before}9")
    ]
    judged = [(j.query, j.passage, j.score) for j in found if isinstance(j, Judgment)]
    assert judged == [(f"{before}9", f"{before}02", 1)]
    return [note.message for note in found if isinstance(note, Note)]


def retrieval(path: str, **options: Any) -> Iterator[Any]:
    return hub.read(path, kind="retrieval", **options)


def renamed(rows: Rows, **names: str) -> Rows:
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def mteb(**changed: Rows) -> dict[tuple[str, str], Rows]:
    tables = {"corpus": PASSAGES, "queries": QUERIES, "default": QRELS} | changed
    return {(name, "test" if name == "default" else name): rows for name, rows in tables.items()}


# ------------------------------------------------------------------------------------------------------------------- mteb


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("score", [1, 1.0, "1", "1.0"])
def test_mteb_scores_of_any_type(tmp_path: Path, kind: str, score: Any) -> None:
    path = data_set(tmp_path / "set", mteb(default=[QRELS[0] | {"score": score}]), kind)
    assert check(retrieval(path)) == []


def test_a_score_that_is_no_grade_is_refused(tmp_path: Path) -> None:
    rows = [QRELS[0] | {"score": score} for score in (0.5, float("nan"), None)]
    for number, row in enumerate(rows):
        bad = [r for r in retrieval(data_set(tmp_path / str(number), mteb(default=[row]))) if isinstance(r, Bad)]
        assert len(bad) == 1
        assert ".parquet (Parquet):1: score: found " in bad[0].message


def test_mteb_declared_types_do_not_change_text(tmp_path: Path) -> None:
    """The card says int64 for ids; the JSON says "02"."""
    types = "dataset_info:\n- config_name: corpus\n  features:\n  - name: _id\n    dtype: int64\n"
    assert check(retrieval(data_set(tmp_path / "set", mteb(), "jsonl", types))) == []


def test_mteb_id_or_underscore_id(tmp_path: Path) -> None:
    tables = mteb(corpus=renamed(PASSAGES, _id="id"), queries=renamed(QUERIES, _id="id"))
    assert check(retrieval(data_set(tmp_path / "set", tables))) == []
    both = mteb(corpus=[row | {"id": "other"} for row in PASSAGES])
    assert check(retrieval(data_set(tmp_path / "both", both), config="default")) == []


def test_mteb_qrels_config_and_one_split_of_another_name(tmp_path: Path) -> None:
    tables = {("corpus", "dev"): PASSAGES, ("query", "dev"): QUERIES, ("qrels", "dev"): QRELS}
    path = data_set(tmp_path / "set", tables)
    assert check(retrieval(path, split="dev")) == []
    assert check(retrieval(path)) == [f"hub:{path}:qrels has no split 'test': its only split 'dev' was taken"]
    path = data_set(tmp_path / "more", tables | {("qrels", "train"): QRELS})
    with pytest.raises(DataError, match=r"qrels: split: found 'test'; .* Known: dev, train\. Name one as --split\."):
        list(retrieval(path))


@pytest.mark.parametrize("spelling", ["{}-{}", "{1}-{0}", "{}_{}"])
def test_mteb_languages(tmp_path: Path, spelling: str) -> None:
    tables = {
        (spelling.format(code, table), "dev"): rows
        for code in ("sw", "th")
        for table, rows in (("corpus", PASSAGES), ("queries", QUERIES), ("qrels", QRELS))
    }
    path = data_set(tmp_path / "set", tables)
    assert check(retrieval(path, split="dev", config="th"), "en") == []
    assert check(hub.read(path, kind="retrieval", split="dev", config="th", lang="th"), "th") == []
    if spelling == "{}_{}":
        return
    assert check(retrieval(path, split="dev", languages=("sw",)), "sw", "sw:") == []
    assert check(retrieval(path, split="dev", languages=("swa",)), "sw", "sw:") == []
    with pytest.raises(DataError, match=r"found '2 parts'; a set in parts needs the name of one\. Known: sw, th\."):
        list(retrieval(path))
    with pytest.raises(DataError, match=r"languages: found 'fr'; the data doesn't hold them\. Known: sw, th\."):
        list(retrieval(path, languages=("fr",)))


def test_miracl_and_mr_tydi_by_name_from_mtebs_layout(tmp_path: Path) -> None:
    tables = {
        (f"sw-{table}", "dev"): rows
        for table, rows in (("corpus", PASSAGES), ("queries", QUERIES), ("qrels", [QRELS[0] | {"score": 1.0}]))
    }
    data_set(tmp_path / "mteb" / "MIRACLRetrieval", tables)
    assert check(miracl.read(Path("mteb/MIRACLRetrieval"), ("sw",)), "sw", "sw:") == []
    tables = {(name.replace("sw-", "swahili-"), "test"): rows for (name, _), rows in tables.items()}
    path = data_set(tmp_path / "tydi", tables)
    assert check(mr_tydi.read(path, ("sw",)), "sw", "sw:") == []


def test_mtebs_own_loader_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, texts and grades of every layout that mteb's loader takes, and of typed columns."""
    import datasets
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    typed = {
        "corpus": [{"_id": n, "title": "" if n % 2 else f"T{n}", "text": f"text {n}"} for n in range(6)],
        "queries": [{"_id": n, "text": f"query {n}"} for n in range(4)],
        "qrels": [{"query-id": n % 3, "corpus-id": n, "score": float(n % 2)} for n in range(6)],
    }
    named = renamed(typed["corpus"], _id="id"), renamed(typed["queries"], _id="id")
    as_text = [{key: str(int(value)) for key, value in row.items()} for row in typed["qrels"]]
    layouts = [
        (mteb(corpus=typed["corpus"], queries=typed["queries"], default=typed["qrels"]), None),
        (mteb(corpus=[row | {"id": str(row["id"])} for row in named[0]], queries=typed["queries"], default=as_text), None),
        ({("corpus", "dev"): typed["corpus"], ("query", "x"): typed["queries"], ("qrels", "dev"): typed["qrels"]}, None),
        ({(f"sw-{table}", "test"): rows for table, rows in typed.items()}, "sw"),
    ]
    for number, (tables, config) in enumerate(layouts):
        path = data_set(tmp_path / str(number), tables)
        theirs = RetrievalDatasetLoader(path, revision=None, config=config).load()  # type: ignore[arg-type]
        ours = list(retrieval(path, config=config or ""))
        assert not [record for record in ours if isinstance(record, Bad)]
        passages = {p.id: p.text for p in ours if isinstance(p, Passage)}
        assert passages == {row["id"]: f"{row['title']} {row['text']}".strip() for row in theirs["corpus"]}
        assert [(q.id, q.text) for q in ours if isinstance(q, Query)] == [(row["id"], row["text"]) for row in theirs["queries"]]
        qrels: dict[str, dict[str, int]] = {}
        for one in ours:
            if isinstance(one, Judgment):
                qrels.setdefault(one.query, {})[one.passage] = one.score
        assert qrels == theirs["relevant_docs"]
        assert len(qrels) == 3


# ------------------------------------------------------------------------------------------------------------------- BeIR


def test_beir_with_judgments_in_a_data_set_of_their_own(tmp_path: Path) -> None:
    tables = {(name, name): rows for name, rows in (("corpus", PASSAGES), ("queries", QUERIES))}
    data_set(tmp_path / "BeIR" / "scifact", tables, "jsonl.gz")
    qrels = tmp_path / "BeIR" / "scifact-qrels"
    qrels.mkdir()
    for split in ("train", "test"):
        (qrels / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n9\t02\t1\n")
    assert check(retrieval("BeIR/scifact", qrels="BeIR/scifact-qrels")) == []
    assert check(beir_sets.read("scifact", "BeIR/scifact")) == []
    (tmp_path / "BeIR").rename(tmp_path / "copies")
    assert check(beir_sets.read("scifact", "copies/scifact")) == []


def test_beir_with_judgments_in_a_file_beside(tmp_path: Path) -> None:
    """As translations of BEIR are: no config of judgments, but qrels/test.tsv."""
    tables = {(name, name): rows for name, rows in (("corpus", PASSAGES), ("queries", QUERIES))}
    path = data_set(tmp_path / "set", tables, "jsonl")
    with pytest.raises(DataError, match=r"no config default or qrels or relevance'; a retrieval set needs its qrels\. Known:"):
        list(retrieval(path))
    (tmp_path / "set" / "qrels").mkdir()
    (tmp_path / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n9\t02\t1\n")
    assert check(retrieval(path)) == []


def test_beirs_files_without_a_card(tmp_path: Path) -> None:
    """By `hub` from a repository that holds BEIR's folder as it is, and by name from such a folder."""
    for name, rows in (("corpus", PASSAGES), ("queries", QUERIES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n9\t02\t1\n")
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nunjudged\t02\t1\n")
    assert check(retrieval(str(tmp_path))) == []
    assert check(beir_sets.read("scifact", str(tmp_path))) == []


def test_a_beir_set_by_name_from_a_copy_of_mtebs(tmp_path: Path) -> None:
    path = data_set(tmp_path / "scifact", mteb(default=[QRELS[0] | {"score": 1.0}]))
    assert check(beir_sets.read("scifact", path)) == []
    tables = {(f"scifact-{name.replace('default', 'qrels')}", split): rows for (name, split), rows in mteb().items()}
    assert check(beir_sets.read("scifact", data_set(tmp_path / "many", tables), config="scifact")) == []


def test_titles_that_pandas_wrote_as_no_number(tmp_path: Path) -> None:
    rows = [PASSAGES[0], PASSAGES[1] | {"title": float("nan")}]
    assert check(retrieval(data_set(tmp_path / "set", mteb(corpus=rows), "jsonl"))) == []


# -------------------------------------------------------------------------------------------------- sentence-transformers


def test_sentence_transformers_splits_by_subset_and_no_scores(tmp_path: Path) -> None:
    tables = {
        (table, subset): rows
        for table, rows in (("corpus", PASSAGES), ("queries", QUERIES), ("qrels", NO_SCORE))
        for subset in ("NanoSciFact", "NanoNQ")
    }
    path = data_set(tmp_path / "set", tables)
    assert check(retrieval(path, split="NanoNQ")) == []
    with pytest.raises(DataError, match=r"found 'test'; .* Known: NanoSciFact, NanoNQ"):
        list(retrieval(path))


def test_sentence_transformers_lists_of_relevant_ids(tmp_path: Path) -> None:
    relevance = [{"query-id": "9", "positive-corpus-ids": ["02"], "bm25-ranked-ids": ["1", "02"]}]
    tables = {("corpus", "train"): PASSAGES, ("queries", "train"): QUERIES, ("relevance", "train"): relevance}
    path = data_set(tmp_path / "set", tables)
    assert check(retrieval(path)) == [f"hub:{path}:relevance has no split 'test': its only split 'train' was taken"]


def test_one_config_a_set_with_its_tables_as_splits(tmp_path: Path) -> None:
    tables = {
        (config, split): rows
        for config in ("NanoNQ_fr", "NanoNQ_en")
        for split, rows in (("corpus", PASSAGES), ("queries", QUERIES), ("qrels", QRELS))
    }
    assert check(retrieval(data_set(tmp_path / "set", tables), config="NanoNQ_fr", lang="fr"), "fr") == []


def test_sentence_transformers_pairs_and_triplets(tmp_path: Path) -> None:
    triplets = [{"anchor": "q", "positive": "p", "negative": "n"}, {"anchor": "q2", "positive": "p2", "negative": "n"}]
    answers = [{"question": "q", "answer": "p"}]
    many = [{"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}]
    path = data_set(tmp_path / "set", {("triplet", "train"): triplets, ("pair", "train"): answers, ("hard", "train"): many})
    found = [pair for pair in hub.read(path, config="triplet", lang="de") if isinstance(pair, Pair)]
    assert [(p.id, p.query, p.passage, [text for _, text in p.negatives], p.query_lang) for p in found] == [
        ("train:0", "q", "p", ["n"], "de"),
        ("train:1", "q2", "p2", ["n"], "de"),
    ]
    assert found[0].negatives[0][0] == found[1].negatives[0][0], "equal texts share a pid"
    assert [(p.query, p.passage) for p in hub.read(path, config="pair") if isinstance(p, Pair)] == [("q", "p")]
    (hard,) = [p for p in hub.read(path, config="hard") if isinstance(p, Pair)]
    assert [text for _, text in hard.negatives] == ["n", "m"]


# --------------------------------------------------------------------------------------------------- MIRACL, Cohere, Tevatron

JUDGED: Rows = [
    {
        "query_id": "9",
        "query": "which",
        "positive_passages": [{"docid": "02", "title": "", "text": "two"}],
        "negative_passages": [],
    }
]


def test_miracl_as_published(tmp_path: Path) -> None:
    """miracl/miracl-corpus with a config a language and the split train; miracl/miracl with the judged passages of a query."""
    corpus = data_set(tmp_path / "miracl-corpus", {(code, "train"): renamed(PASSAGES, _id="docid") for code in ("sw", "yo")})
    topics = data_set(tmp_path / "miracl", {(code, split): JUDGED for code in ("sw", "yo") for split in ("train", "dev")})
    options = {"queries": topics, "config": "sw", "lang": "sw"}
    assert check(retrieval(corpus, split="dev", **options), "sw") == []
    negatives = [{"docid": "1", "title": "T", "text": "one"}]
    more = data_set(tmp_path / "more", {("sw", "dev"): [JUDGED[0] | {"negative_passages": negatives}]})
    records = list(retrieval(corpus, split="dev", queries=more, config="sw"))
    assert [(j.passage, j.score) for j in records if isinstance(j, Judgment)] == [("02", 1), ("1", 0)]


def test_cohere_as_published(tmp_path: Path) -> None:
    """Two data sets of one config, with the encoder's vectors beside the text."""
    corpus = data_set(
        tmp_path / "miracl-sw-corpus-22-12",
        {("default", "train"): [row | {"emb": [0.5, 1.5]} for row in renamed(PASSAGES, _id="docid")]},
    )
    queries = data_set(
        tmp_path / "miracl-sw-queries-22-12", {("default", split): [JUDGED[0] | {"emb": [0.5]}] for split in ("train", "dev")}
    )
    assert check(retrieval(corpus, split="dev", queries=queries, lang="sw"), "sw") == []


def test_several_sets_in_one_repository(tmp_path: Path) -> None:
    """As Cohere/beir-embed-english-v3 is described: scifact-corpus (train), scifact-queries and scifact-qrels (test)."""
    tables = {
        (f"{name}-{table}", split): rows
        for name in ("scifact", "nfcorpus")
        for table, split, rows in (("corpus", "train", PASSAGES), ("queries", "test", QUERIES), ("qrels", "test", QRELS))
    }
    path = data_set(tmp_path / "set", tables)
    assert check(retrieval(path, config="scifact")) == []


def test_training_rows_of_miracl_mr_tydi_and_tevatron(tmp_path: Path) -> None:
    two = {"docid": "d2", "title": "T", "text": "two"}
    row = {
        "query_id": 7,
        "query": "q",
        "positive_passages": [{"docid": "d1", "text": "one"}, two],
        "negative_passages": [{"docid": "d3", "title": "", "text": "no"}],
    }
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"query_id": 8, "positive_passages": []}) + "\n")
    one, second, bad = pairs.read((path,), lang="sw")
    assert isinstance(one, Pair)
    assert isinstance(second, Pair)
    assert (one.id, one.group, one.pid, one.query, one.passage, one.query_lang) == ("7:0", "7", "d1", "q", "one", "sw")
    assert (second.id, second.group, second.pid, second.passage, second.body) == ("7:1", "7", "d2", "T two", "two")
    assert one.negatives == second.negatives == (("d3", "no"),)
    assert isinstance(bad, Bad)
    assert bad.message == f"{path}:2: positive_passages: found []; must hold a passage."


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos": ["p"], "neg": ["n", "m"]},
        {"query": "q", "response": "p", "rejected_response": ["n", "m"]},
        {
            "messages": [{"role": "system", "content": "task"}, {"role": "user", "content": "q"}],
            "positive_messages": [[{"role": "user", "content": "p"}]],
            "negative_messages": [[{"role": "user", "content": "n"}], [{"role": "user", "content": "m"}]],
        },
    ],
)
def test_training_rows_of_bge_and_of_qwens_embedding_models(row: dict[str, Any], tmp_path: Path) -> None:
    """FlagEmbedding's lists; SWIFT's rows in their two spellings."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (pair,) = pairs.read((path,), lang="zh")
    assert isinstance(pair, Pair)
    assert (pair.id, pair.query, pair.passage) == ("rows.jsonl:1", "q", "p")
    assert [text for _, text in pair.negatives] == ["n", "m"]


def test_a_pair_that_is_labelled_no_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": "q", "response": "p", "label": label}) + "\n" for label in (0.2, 1.0)))
    bad, good = pairs.read((path,), lang="zh")
    assert isinstance(bad, Bad)
    assert bad.message.startswith(f"{path}:1: label: found 0.2; must be 1 or absent")
    assert isinstance(good, Pair)


# --------------------------------------------------------------------------------------------------------- types and faults


def test_csv_and_tsv_keep_their_text(tmp_path: Path) -> None:
    cells = [("007", "null"), ("1e5", "NA"), ("2020-01-01", "nan"), ("True", "1.10")]
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t"), ("rows.tsv.gz", "\t")):
        text = "".join(
            separator.join(row) + "\n"
            for row in [("id", "passage", "query", "query_lang", "pid")]
            + [(name, word, f"q {name}", "en", "") for name, word in cells]
        )
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        found = list(hub.read("csv", data_files=str(tmp_path / name)))
        assert [(p.id, p.passage, p.pid) for p in found if isinstance(p, Pair)] == [(*row, row[0]) for row in cells]


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"id,query,passage\n007,q,NA\n"))
    (tmp_path / "rows.dump").write_text('{"id": "007", "query": "q", "passage": "NA"}\n')
    parquet.write_table(pa.table({"id": ["007"], "query": ["q"], "passage": ["NA"]}), tmp_path / "rows.parquet")
    for name in ("rows.csv.gz", "rows.dump", "rows.parquet"):
        assert [(p.id, p.passage) for p in hub.read(str(tmp_path / name)) if isinstance(p, Pair)] == [("007", "NA")]
    (tmp_path / "rows.csv").write_text("id;query;passage\n007;q;NA\n")
    with pytest.raises(DataError, match=r"rows\.csv:1: found 'id;query;passage'; columns must be parted by ','\. Convert"):
        list(hub.read(str(tmp_path / "rows.csv")))


def test_json_keeps_its_text_over_shards_of_two_types(tmp_path: Path) -> None:
    rows = [
        {"id": "007", "query": "2020-01-01", "passage": "12:30", "negatives": []},
        {"id": 8, "query": "q", "passage": "null", "negatives": [{"pid": "x", "text": "1"}], "more": {"a": [1]}},
        {"id": "2009-11-08", "query": "q", "passage": "true", "negatives": None, "more": "text"},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    found = [pair for pair in hub.read("json", data_files=str(tmp_path / "*.jsonl")) if isinstance(pair, Pair)]
    assert [(p.id, p.query, p.passage) for p in found] == [
        ("007", "2020-01-01", "12:30"),
        ("8", "q", "null"),
        ("2009-11-08", "q", "true"),
    ]


def test_a_list_under_a_key_of_one_json_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.json\n  field: data\n---\n")
    (folder / "a.json").write_text(json.dumps({"version": 1, "data": [{"id": "007", "query": "q", "passage": "p"}]}))
    assert [(p.id, p.passage) for p in hub.read(str(folder)) if isinstance(p, Pair)] == [("007", "p")]
    (folder / "a.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(DataError, match=r"a\.json: data: found 'NoneType'; must be a list of objects"):
        list(hub.read(str(folder)))


def faulty(kind: str, folder: Path) -> list[str]:
    """Options of a reading that can't succeed."""
    row = b'{"id": "a", "query": "q", "passage": "p"}\n'
    name = "rows.parquet" if "parquet" in kind else "rows.jsonl"
    contents = {
        "cut gzip": gzip.compress(row * 500)[:60],
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "latin": b'{"id": "\xe9"}\n',
        "empty parquet": b"",
        "cut parquet": b"PAR1" + b"\0" * 99,
        "pointer for parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "web page for parquet": b"<!doctype html><p>login",
    }
    if kind in contents:
        (folder / name).write_bytes(contents[kind])
    form = "parquet" if "parquet" in kind else "json"
    return [
        "--path",
        "no/such" if kind == "no set" else form,
        *(() if kind in ("no set", "no file") else ("--option", f"data_files={folder / name}")),
    ]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cut gzip", "rows.jsonl: found 'Compressed file ended before"),
        ("empty", "no row"),
        ("pointer", "rows.jsonl: found 'a Git LFS pointer'"),
        ("latin", "rows.jsonl:1: found b'\\xe9'"),
        ("empty parquet", "rows.parquet"),
        ("cut parquet", "damaged Parquet"),
        ("pointer for parquet", "rows.parquet: found 'a Git LFS pointer'"),
        ("web page for parquet", "rows.parquet: found 'a web page'"),
        ("absent", "rows.jsonl"),
        ("no set", "hub:no/such"),
        ("no file", "hub: path: found 'json'; this format needs files. Give --option data_files=FILE"),
    ],
)
def test_every_fault_is_one_line(kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare.main(["hub", *faulty(kind, tmp_path), "--out", str(out)]) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not out.exists()


def test_prepared_from_a_hub_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: a set in mteb's layout whose qrels name a passage that isn't there, and pairs in two splits."""
    qrels = [*QRELS, {"query-id": "9", "corpus-id": "gone", "score": 1}]
    path = data_set(tmp_path / "set", mteb(default=[row | {"score": float(row["score"])} for row in qrels]))
    assert prepare.main(["hub", "--path", path, "--option", "kind=retrieval", "--out", str(tmp_path / "out")]) == 0
    assert RetrievalSet(tmp_path / "out").missing_ids == ["gone"]
    assert "note: a judged passage that the corpus lacks counts as relevant and is never found" in capsys.readouterr().out
    rows = [{"id": f"{n}", "query": "q", "passage": f"p{n}", "query_lang": "en", "split": name} for n, name in enumerate(SPLITS)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options, ids, note in (
        ([], ["0", "1", "2", "3"], "rows of all splits were taken, by their field `split`: test 1, train 2, 1 rows name none"),
        (
            ["--split", "train"],
            ["0", "1"],
            "rows of split 'train' were taken; the rows name these splits: test 1, train 2, 1 rows",
        ),
    ):
        out = tmp_path / f"pairs{len(options)}"
        assert prepare.main(["pairs", "--path", str(file), "--out", str(out), *options]) == 0
        assert Pairs(out).queries.column("id") == ids
        assert f"note: {note}" in capsys.readouterr().out
        assert Pairs(out).manifest["notes"][0].startswith(note)
    assert prepare.main(["pairs", "--path", str(file), "--out", str(tmp_path / "none"), "--split", "dev"]) == 2
    assert "split: found 'dev'; no row names this split. Known: test 1, train 2." in capsys.readouterr().err


SPLITS = ("train", "train", "test", None)


def test_columns_that_no_table_has(tmp_path: Path) -> None:
    path = data_set(tmp_path / "set", mteb(corpus=renamed(PASSAGES, text="body")))
    assert check(retrieval(path, columns={"text": "body"})) == []
    with pytest.raises(DataError, match=r"columns: title: found 'heading'; no table has this column"):
        list(retrieval(path, columns={"text": "body", "title": "heading"}))
