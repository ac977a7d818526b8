"""Readers against layouts written by hand; expectations worked out on paper. No shared data, no network."""

import gzip
import json
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Bad, Judgment, Pair, Passage, Query, Record
from hybrid_scale.data.sources import (
    beir,
    beir_sets,
    belebele,
    bitext,
    demo,
    domains,
    hub,
    miracl,
    mlqa_r,
    mmarco,
    mr_tydi,
    pairs,
    registry,
    xquad_r,
)
from hybrid_scale.errors import ConfigError, DataError
from launch import prepare

ROOT = Path(__file__).parents[2]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON objects, or lines of text as they are; gzipped when the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def of(kind: type, records: Iterable[Record]) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def messages(records: Iterable[Record]) -> list[str]:
    return [bad.message for bad in of(Bad, records)]


# ---------------------------------------------------------------------------------------------------------- LAReQA


def paragraph(context: str, breaks: list[list[int]], *questions: tuple[str, str, int]) -> dict[str, Any]:
    qas = [{"id": name, "question": text, "answers": [{"answer_start": start, "text": "?"}]} for name, text, start in questions]
    return {"context": context, "sentence_breaks": breaks, "qas": qas}


def write_lareqa(path: Path, *articles: list[dict[str, Any]]) -> None:
    write_lines(path, [{"data": [{"title": "t", "paragraphs": paragraphs} for paragraphs in articles]}])


@pytest.fixture
def lareqa(tmp_path: Path) -> Path:
    """en: two articles, three sentences, questions q1 (sentence 2) and q2; de: one paragraph, question q1 only (sentence 1)."""
    write_lareqa(
        tmp_path / "en.json",
        [paragraph("It is big. Born 1900.", [[0, 10], [11, 21]], ("q1", "When? ", 16))],
        [paragraph("Red wine.", [[0, 9]], ("q2", "Which colour?", 0))],
    )
    write_lareqa(tmp_path / "de.json.gz", [paragraph("Er kam 1900. Dann ging er.", [[0, 12], [13, 26]], ("q1", "Wann?", 7))])
    return tmp_path


def test_lareqa_candidates_queries_and_judgments(lareqa: Path) -> None:
    records = list(xquad_r.read(lareqa))
    assert [(p.id, p.lang, p.text) for p in of(Passage, records)] == [
        ("de:p0000:s00", "de", "Er kam 1900."),
        ("de:p0000:s01", "de", "Dann ging er."),
        ("en:p0000:s00", "en", "It is big."),
        ("en:p0000:s01", "en", "Born 1900."),
        ("en:p0001:s00", "en", "Red wine."),
    ]
    assert [(q.id, q.lang, q.text, q.group) for q in of(Query, records)] == [
        ("de:q1", "de", "Wann?", "q1"),
        ("en:q1", "en", "When?", "q1"),
        ("en:q2", "en", "Which colour?", "q2"),
    ]
    assert {(j.query, j.passage, j.score) for j in of(Judgment, records)} == {
        ("de:q1", "de:p0000:s00", 1),
        ("de:q1", "en:p0000:s01", 1),
        ("en:q1", "de:p0000:s00", 1),
        ("en:q1", "en:p0000:s01", 1),
        ("en:q2", "en:p0001:s00", 1),
    }
    assert len(of(Judgment, records)) == 5
    assert not of(Bad, records)


def test_lareqa_first_and_last_character_of_a_sentence(tmp_path: Path) -> None:
    write_lareqa(
        tmp_path / "en.json", [paragraph("Ab. Cd.", [[0, 3], [4, 7]], ("last", "?", 2), ("first", "?", 4), ("gap", "?", 3))]
    )
    records = list(xquad_r.read(tmp_path))
    assert {j.query: j.passage for j in of(Judgment, records)} == {"en:last": "en:p0000:s00", "en:first": "en:p0000:s01"}
    where = f"{tmp_path}/en.json: en:p0000: question gap"
    assert messages(records) == [f"{where}: answer_start: found 3; the answer starts in no sentence."]


def test_lareqa_published_sentences_win_over_cutting(tmp_path: Path) -> None:
    shifted = paragraph("aXYb. Cd.", [[0, 3], [4, 7]], ("q", "?", 0)) | {"sentences": ["ab.", "Cd."]}
    write_lareqa(tmp_path / "en.json", [shifted])
    assert [p.text for p in of(Passage, xquad_r.read(tmp_path))] == ["ab.", "Cd."]


def test_lareqa_context_and_languages(lareqa: Path) -> None:
    records = list(xquad_r.read(lareqa, languages=("de",), with_context=True))
    assert of(Passage, records)[0].text == "Er kam 1900.\nEr kam 1900. Dann ging er."
    assert [(j.query, j.passage) for j in of(Judgment, records)] == [("de:q1", "de:p0000:s00")]
    with pytest.raises(DataError, match=r"languages: found 'fr'; the data doesn't hold them\. Known: de, en\."):
        list(xquad_r.read(lareqa, languages=("de", "fr")))


def test_plain_squad_is_refused(tmp_path: Path) -> None:
    plain = paragraph("A.", [[0, 2]])
    del plain["sentence_breaks"]
    write_lareqa(tmp_path / "en.json", [plain])
    with pytest.raises(
        DataError,
        match=r"en\.json: found \"KeyError: 'sentence_breaks'\"; LAReQA's layout is .* Fetch the files from LAReQA: git clone",
    ):
        list(xquad_r.read(tmp_path))
    write_lareqa(tmp_path / "en.json")
    with pytest.raises(DataError, match=r"en\.json: found 'ValueError: no paragraph'"):
        list(xquad_r.read(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder of LAReQA's files is needed"):
        list(xquad_r.read(tmp_path / "empty"))


def test_mlqa_r_reports_what_it_skips(lareqa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [type(r) for r in mlqa_r.read(lareqa)] == [type(r) for r in xquad_r.read(lareqa)]
    assert prepare.main(["mlqa_r", "--path", str(lareqa), "--out", str(tmp_path / "out")]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert table == [["de", "1", "1"], ["en", "1", "2"]]  # en: 2 questions, one of them has an answer in de


# ------------------------------------------------------------------------------------------------- BEIR and MIRACL

QRELS_HEADER = "query-id\tcorpus-id\tscore"


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    write_lines(
        tmp_path / "corpus.jsonl.gz",
        [
            {"_id": 1, "title": "T", "text": "one"},
            {"_id": "2", "title": "", "text": "zwei", "lang": "de"},
            {"_id": "3", "title": "T3"},
        ],
    )
    write_lines(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in (1, 2, 3)])
    write_lines(tmp_path / "qrels" / "test.tsv", [QRELS_HEADER, "q1\t1\t1", "q2\t2\t0"])
    return tmp_path


def test_beir_titles_languages_and_judged_queries_only(beir_folder: Path) -> None:
    records = list(beir.read(beir_folder))
    assert [(p.id, p.lang, p.text) for p in of(Passage, records)] == [
        ("1", "en", "T one"),
        ("2", "de", "zwei"),
        ("3", "en", "T3"),
    ]
    assert [(q.id, q.group) for q in of(Query, records)] == [("q1", "q1"), ("q2", "q2")]
    assert [(j.query, j.passage, j.score) for j in of(Judgment, records)] == [("q1", "1", 1), ("q2", "2", 0)]


def test_beir_blank_titles_and_empty_passages(beir_folder: Path) -> None:
    """As published: a title of white space is none, a passage that says nothing stays; one without the fields is bad."""
    rows = [{"_id": "a", "title": " ", "text": "x"}, {"_id": "b", "title": "\t", "text": ""}, {"_id": "c", "text": " "}]
    path = write_lines(beir_folder / "corpus.jsonl", [*rows, {"_id": "d", "title": "", "body": "x"}])
    records = list(beir.read(beir_folder))
    assert [(p.id, p.text) for p in of(Passage, records)] == [("a", "x"), ("b", ""), ("c", "")]
    assert messages(records) == [f"{path}:4: text: found None; missing."]


def test_beir_language_filter_takes_its_judgments_along(beir_folder: Path) -> None:
    records = list(beir.read(beir_folder, languages=("en",)))
    assert [p.id for p in of(Passage, records)] == ["1", "3"]
    assert [(j.query, j.passage) for j in of(Judgment, records)] == [("q1", "1")]
    with pytest.raises(DataError, match=r"languages: found 'fr'; .* Known: de, en\."):
        list(beir.read(beir_folder, languages=("fr",)))


def test_beir_messages(beir_folder: Path) -> None:
    with pytest.raises(DataError, match=r"qrels/dev\.tsv: found 'no such file'; this file \(or the same with \.gz, "):
        list(beir.read(beir_folder, split="dev"))
    write_lines(beir_folder / "qrels" / "bad.tsv", ["q1\t1\t1"])
    with pytest.raises(DataError, match=r"bad\.tsv:1: found .*; the header must be query-id corpus-id score"):
        list(beir.read(beir_folder, split="bad"))
    path = write_lines(beir_folder / "qrels" / "rows.tsv", [QRELS_HEADER, "q1\t1", "q1\t1\thigh", "q1\t1\t1"])
    assert messages(beir.read(beir_folder, split="rows")) == [
        f"{path}:2: found 'q1\\t1'; a row has 3 columns (query-id corpus-id score), not 2.",
        f"{path}:3: score: found 'high'; must be a whole number.",
    ]


def test_broken_lines_name_file_and_line(beir_folder: Path) -> None:
    path = write_lines(
        beir_folder / "queries.jsonl", ['{"_id": "q1", "text": "a"}', '{"_id": "q2"', "[1]", '{"_id": "q3", "text": " "}']
    )
    assert messages(beir.read(beir_folder)) == [
        f"{path}:2: found '{{\"_id\": \"q2\"'; not JSON (Expecting ',' delimiter at column 13).",
        f"{path}:3: found [1]; a row is a JSON object.",
        f"{path}:4: text: found ' '; empty text.",
    ]


def test_miracl_flat_layout_prefixes_ids(tmp_path: Path) -> None:
    for lang in ("sw", "yo"):
        write_lines(tmp_path / f"{lang}.corpus.jsonl.gz", [{"docid": "7#0", "title": "T", "text": lang}])
        write_lines(tmp_path / f"{lang}.queries.jsonl.gz", [{"_id": "0", "text": "?"}])
        write_lines(tmp_path / f"{lang}.qrels.tsv", [QRELS_HEADER, "0\t7#0\t1"])
    records = list(miracl.read(tmp_path))
    assert [(p.id, p.text) for p in of(Passage, records)] == [("sw:7#0", "T sw"), ("yo:7#0", "T yo")]
    assert [(j.query, j.passage) for j in of(Judgment, records)] == [("sw:0", "sw:7#0"), ("yo:0", "yo:7#0")]
    assert [q.group for q in of(Query, miracl.read(tmp_path, languages=("yo",)))] == ["yo:0"]


def test_miracl_own_layout(tmp_path: Path) -> None:
    write_lines(tmp_path / "miracl-v1.0-sw/topics/topics.miracl-v1.0-sw-dev.tsv", ["0\tNani?"])
    write_lines(tmp_path / "miracl-v1.0-sw/qrels/qrels.miracl-v1.0-sw-dev.tsv", ["0 Q0 7#0 1", "0\tQ0\t7#1\t0"])
    with pytest.raises(
        DataError, match=r"miracl-corpus-v1\.0-sw: found \"no corpus of 'sw'\"; .* leave 'sw' out with --languages"
    ):
        list(miracl.read(tmp_path))
    for number in (0, 1):
        row = {"docid": f"7#{number}", "title": "T", "text": str(number)}
        write_lines(tmp_path / f"miracl-corpus-v1.0-sw/docs-{number}.jsonl.gz", [row])
    records = list(miracl.read(tmp_path))
    assert [p.id for p in of(Passage, records)] == ["sw:7#0", "sw:7#1"]
    assert [q.text for q in of(Query, records)] == ["Nani?"]
    assert [(j.passage, j.score) for j in of(Judgment, records)] == [("sw:7#0", 1), ("sw:7#1", 0)]


def test_miracl_without_corpus_or_topics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no MIRACL topics"):
        list(miracl.read(tmp_path))
    write_lines(tmp_path / "sw.queries.jsonl", [{"_id": "0", "text": "?"}])
    with pytest.raises(DataError, match=r"sw\.corpus\.jsonl: found \"no corpus of 'sw'\""):
        list(miracl.read(tmp_path))


# ----------------------------------------------------------------------------------------------------- training rows


def test_pairs_defaults_titles_and_negatives(tmp_path: Path) -> None:
    first = {
        "id": "a",
        "query": "q",
        "passage": "p",
        "title": "T",
        "query_lang": "en",
        "negatives": ["n", {"pid": "x", "text": "m"}],
    }
    second = {"id": "b", "group": "g", "pid": "P", "query": "q", "passage": "p2", "query_lang": "en", "passage_lang": "de"}
    paths = (write_lines(tmp_path / "1.jsonl", [first]), write_lines(tmp_path / "2.jsonl.gz", [second | {"negatives": ["n"]}]))
    one, two = of(Pair, pairs.read(paths))
    assert (one.group, one.pid, one.query_lang, one.passage_lang, one.passage) == ("a", "a", "en", "en", "T p")
    assert [text for _, text in one.negatives] == ["n", "m"]
    assert one.negatives[1][0] == "x"
    assert two.negatives[0] == one.negatives[0]  # equal texts share a pid across files
    assert (two.group, two.pid, two.passage_lang, two.cross_only) == ("g", "P", "de", False)
    assert [pair.id for pair in of(Pair, pairs.read(paths, languages=("en",)))] == ["a"]


def test_pairs_messages(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl", [{"id": "a", "query": "q", "passage": "p"}, {"id": "b", "query_lang": "en", "query": 1.5}]
    )
    assert messages(pairs.read((path,))) == [
        f"{path}:1: query_lang: found None; missing.",
        f"{path}:2: query: found 1.5; must be text.",
    ]
    assert [pair.query_lang for pair in of(Pair, pairs.read((path,), lang="en"))] == ["en"]
    negatives = {"id": "a", "query": "q", "passage": "p", "query_lang": "en", "negatives": ["fine", ""]}
    path = write_lines(tmp_path / "negatives.jsonl", [negatives, negatives | {"negatives": "n"}])
    assert messages(pairs.read((path,))) == [
        f"{path}:1: negatives[1]: text: found ''; empty text.",
        f"{path}:2: negatives: found 'n'; must be a list of texts or of objects with pid and text.",
    ]


def test_bitext_is_cross_only(tmp_path: Path) -> None:
    rows = [{"id": f"s:{lang}", "group": "s", "lang": lang, "text": lang.upper()} for lang in ("en", "de")]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = of(Pair, bitext.read((path,)))
    assert [(p.group, p.pid, p.query_lang, p.passage_lang, p.query, p.passage, p.cross_only) for p in found] == [
        ("s", "s:en", "en", "en", "EN", "EN", True),
        ("s", "s:de", "de", "de", "DE", "DE", True),
    ]
    with pytest.raises(DataError, match="found 'fr'"):
        list(bitext.read((path,), languages=("fr",)))


def test_pairs_take_sentences_of_a_bitext_too(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        [
            {"id": "p", "query": "q", "passage": "d", "query_lang": "en"},
            {"id": "s", "group": "g", "lang": "de", "text": "Satz"},
        ],
    )
    assert [(p.id, p.query, p.passage, p.cross_only) for p in of(Pair, pairs.read((path,)))] == [
        ("p", "q", "d", False),
        ("s", "Satz", "Satz", True),
    ]


@pytest.fixture
def mmarco_folder(tmp_path: Path) -> Path:
    for name, mark in (("english", "e"), ("german", "g")):
        write_lines(tmp_path / f"data/google/collections/{name}_collection.tsv", [f"{n}\t{mark}{n} text" for n in range(5)])
        write_lines(tmp_path / f"data/google/queries/train/{name}_queries.train.tsv", [f"{n}\t{mark}q{n}" for n in (10, 11)])
    write_lines(tmp_path / "data/triples.train.ids.small.tsv", ["10\t0\t1", "10\t0\t1", "10\t0\t2", "11\t3\t4"])
    return tmp_path


def test_mmarco_joins_ids_per_language(mmarco_folder: Path) -> None:
    found = of(Pair, mmarco.read(mmarco_folder, negatives=2))
    assert [(p.id, p.group, p.pid, p.query, p.passage, p.negatives) for p in found] == [
        ("10:0:de", "10", "de:0", "gq10", "g0 text", (("de:1", "g1 text"), ("de:2", "g2 text"))),
        ("11:3:de", "11", "de:3", "gq11", "g3 text", (("de:4", "g4 text"),)),
        ("10:0:en", "10", "en:0", "eq10", "e0 text", (("en:1", "e1 text"), ("en:2", "e2 text"))),
        ("11:3:en", "11", "en:3", "eq11", "e3 text", (("en:4", "e4 text"),)),
    ]
    assert [p.id for p in of(Pair, mmarco.read(mmarco_folder, languages=("en",), max_queries=1))] == ["10:0:en"]


def test_mmarco_messages(mmarco_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"collections: languages: found 'fr'; .* Known: de, en\."):
        list(mmarco.read(mmarco_folder, languages=("fr",)))
    triples = write_lines(mmarco_folder / "data/triples.train.ids.small.tsv", ["10\t0", "10\t9\t1"])
    collection = mmarco_folder / "data/google/collections/english_collection.tsv"
    assert messages(mmarco.read(mmarco_folder, languages=("en",))) == [
        f"{triples}:1: found '10\\t0'; a row has 3 columns (query positive negative), not 2.",
        f"{triples}:2: en: found 'passage 9'; {collection} holds no text for it.",
    ]


def test_mmarco_names_the_line_at_fault(mmarco_folder: Path) -> None:
    """A tab too many, an id twice with another text (the same text again is none); texts with carriage returns are whole."""
    path = write_lines(
        mmarco_folder / "data/google/collections/english_collection.tsv",
        ["0\ta\rb", "1\tx\ty", "2\tc", "2\tc ", "3\td", "3\te", "4\tf"],
    )
    queries = write_lines(
        mmarco_folder / "data/google/queries/train/english_queries.train.tsv", ["10\tq", "11\tr", "11\ts", "99"]
    )
    records = list(mmarco.read(mmarco_folder, ("en",)))
    triples = mmarco_folder / "data/triples.train.ids.small.tsv"
    assert messages(records) == [
        f"{queries}:3: id: found '11'; this id already names another text, at {queries}:2. Keep one of the two.",
        f"{queries}:4: found '99'; a row has 2 columns (id text), not 1.",
        f"{path}:2: found '1\\tx\\ty'; a row has 2 columns (id text), not 3.",
        f"{path}:6: id: found '3'; this id already names another text, at {path}:5. Keep one of the two.",
        f"{triples}:1: en: found 'passage 1'; {path} holds no text for it.",
    ]
    assert [(p.query, p.passage) for p in of(Pair, records)] == [("r", "d")]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    path.write_bytes(pointer)
    with pytest.raises(DataError, match=r"english_collection\.tsv: found 'a Git LFS pointer'"):
        list(mmarco.read(mmarco_folder, ("en",)))


# -------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_hub_maps_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "q0", "context": "c0"}, {"question": "q1", "context": "c1"}])
    columns = {"query": "question", "passage": "context", "query_lang": "=fr"}
    found = of(Pair, hub.read("json", data_files=str(path), columns=columns))
    assert [(p.where, p.id, p.group, p.query_lang, p.query, p.passage) for p in found] == [
        (f"{path}:1", "train:0", "train:0", "fr", "q0", "c0"),
        (f"{path}:2", "train:1", "train:1", "fr", "q1", "c1"),
    ]
    assert len(of(Pair, hub.read("json", data_files=str(path), columns=columns, max_rows=1))) == 1
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: columns: query: found 'ask'; no such column\. Known: question, context\."
    ):
        list(hub.read("json", data_files=str(path), columns={"query": "ask"}))


@pytest.mark.usefixtures("offline")
def test_hub_retrieval_from_a_local_folder(tmp_path: Path) -> None:
    names = {"corpus": ("corpus", "corpus"), "queries": ("queries", "queries"), "default": ("test", "qrels")}
    configs = [
        f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {file}.jsonl"
        for config, (split, file) in names.items()
    ]
    folder = tmp_path / "mteb"
    write_lines(folder / "README.md", ["---\nconfigs:\n" + "\n".join(configs) + "\n---"])
    write_lines(folder / "corpus.jsonl", [{"_id": "d1", "title": "T", "text": "x"}, {"_id": "d2", "title": "", "text": "y"}])
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "?"}, {"_id": "unjudged", "text": "?"}])
    write_lines(folder / "qrels.jsonl", [{"query-id": "q1", "corpus-id": "d1", "score": 1}])
    records = list(hub.read(str(folder), kind="retrieval", lang="de"))
    assert [(p.id, p.lang, p.text) for p in of(Passage, records)] == [("d1", "de", "T x"), ("d2", "de", "y")]
    assert [q.id for q in of(Query, records)] == ["q1"]
    assert [(j.query, j.passage, j.score) for j in of(Judgment, records)] == [("q1", "d1", 1)]


@pytest.mark.usefixtures("offline")
def test_hub_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"can't be opened\. Check id, config, split"):
        list(hub.read(str(tmp_path / "absent")))
    with pytest.raises(DataError, match="kind: found 'rows'; must be pairs or retrieval"):
        list(hub.read("json", kind="rows"))


# ------------------------------------------------------------------------------------------------- sets by name and language


def write_hub_set(folder: Path, *prefixes: str, split: str = "test") -> Path:
    """A local folder as mteb stores a set: for each prefix a corpus of two passages, one query, one judgment."""
    configs = []
    for prefix in prefixes:
        tables = {
            f"{prefix}corpus": [{"_id": "1", "title": "T", "text": "one"}, {"_id": "2", "title": "", "text": f"two {prefix}"}],
            f"{prefix}queries": [{"_id": "1", "text": f"which {prefix}"}],
            f"{prefix}qrels" if prefix else "default": [{"query-id": "1", "corpus-id": "2", "score": 1}],
        }
        for config, rows in tables.items():
            write_lines(folder / f"{config}.jsonl", rows)
            name = config if not prefix and config != "default" else split
            files = f"\n  data_files:\n  - split: {name}\n    path: {config}.jsonl"
            configs.append(f"- config_name: {config}{files}")
    write_lines(folder / "README.md", ["---", "configs:", *configs, "---"])
    return folder


def test_beir_sets_follow_the_published_protocol() -> None:
    """18 public sets of BEIR without the four that aren't public: 13 and NQ, and CQADupStack in its 12 parts."""
    assert len([name for name, chosen in beir_sets.SETS.items() if not chosen.part_of]) == 14
    assert sum(chosen.part_of == "cqadupstack" for chosen in beir_sets.SETS.values()) == 12
    assert {name for name, chosen in beir_sets.SETS.items() if chosen.split != "test"} == {"msmarco"}
    dropping = {name for name, chosen in beir_sets.SETS.items() if chosen.drop_own_id}
    assert dropping == {"arguana", "fever", "fiqa", "msmarco", "quora"}
    with pytest.raises(ConfigError, match="Did you mean 'scifact'"):
        beir_sets.read("scifacts")


def test_beir_set_from_a_folder_takes_the_sets_split(beir_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert list(beir_sets.read("scifact", str(beir_folder))) == list(beir.read(beir_folder, "test"))
    (beir_folder / "qrels" / "test.tsv").rename(beir_folder / "qrels" / "dev.tsv")
    assert of(Judgment, beir_sets.read("msmarco", str(beir_folder)))
    with pytest.raises(DataError, match=r"test\.tsv"):
        list(beir_sets.read("scifact", str(beir_folder)))
    forums = tmp_path_factory.mktemp("forums")
    shutil.copytree(beir_folder, forums / "gis")
    (forums / "gis" / "qrels" / "dev.tsv").rename(forums / "gis" / "qrels" / "test.tsv")
    assert of(Query, beir_sets.read("cqadupstack-gis", str(forums)))


def test_beir_set_from_the_hubs_layout(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_hub_set(tmp_path / "copy", "")
    monkeypatch.setitem(beir_sets.SETS, "scifact", beir_sets.BeirSet(str(folder)))
    records = list(beir_sets.read("scifact"))
    assert [(p.id, p.text) for p in of(Passage, records)] == [("1", "T one"), ("2", "two")]
    assert [(j.query, j.passage) for j in of(Judgment, records)] == [("1", "2")]


def test_languages_of_a_hub_set_keep_their_ids_apart(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = Path.is_dir  # mteb/... shall be an id of the Hub, not a folder in MIRACL's own layout
    monkeypatch.setattr(Path, "is_dir", lambda path: not path.as_posix().startswith("mteb/") and real(path))
    write_hub_set(tmp_path / "mteb" / "copy", "sw-", "th-", split="dev")
    records = list(miracl.read(Path("mteb/copy"), ("sw", "th")))
    assert [p.id for p in of(Passage, records)] == ["sw:1", "sw:2", "th:1", "th:2"]
    assert [(q.id, q.group) for q in of(Query, records)] == [("sw:1", "sw:1"), ("th:1", "th:1")]
    assert [(j.query, j.passage) for j in of(Judgment, records)] == [("sw:1", "sw:2"), ("th:1", "th:2")]
    write_hub_set(tmp_path / "mteb" / "tydi", "swahili-")
    assert [q.text for q in of(Query, mr_tydi.read("mteb/tydi", ("sw",)))] == ["which swahili-"]
    with pytest.raises(DataError, match="languages"):
        list(miracl.read(Path("mteb/copy"), ("xx",)))


def test_mr_tydi_own_layout(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "mrtydi-v1.1-swahili"
    docs = [{"id": "7#0", "contents": "Title\n\nThe text."}, {"id": "7#1", "contents": "\n\nNo title."}]
    write_lines(folder / "collection" / "docs.jsonl.gz", docs)
    write_lines(folder / "topic.test.tsv", ["0\tnini?"])
    write_lines(folder / "qrels.test.txt", ["0\tQ0\t7#1\t1"])
    records = list(mr_tydi.read(str(tmp_path)))
    assert [(p.id, p.lang, p.text) for p in of(Passage, records)] == [
        ("sw:7#0", "sw", "Title The text."),
        ("sw:7#1", "sw", "No title."),
    ]
    assert [(q.id, q.text) for q in of(Query, records)] == [("sw:0", "nini?")]
    assert [(j.query, j.passage, j.score) for j in of(Judgment, records)] == [("sw:0", "sw:7#1", 1)]
    with pytest.raises(DataError, match="languages"):
        list(mr_tydi.read(str(tmp_path), ("ja",)))
    with pytest.raises(DataError, match="own layout"):
        list(mr_tydi.read(str(folder)))


@pytest.fixture
def belebele_folder(tmp_path: Path) -> Path:
    """Two languages, the links in another order: link a has two questions, link b one."""
    row = lambda link, which, lang: {  # noqa: E731
        **{"link": link, "question_number": which, "flores_passage": f"passage {link} {lang}"},
        **{"question": f"question {link}{which} {lang}", "mc_answer1": "x", "correct_answer_num": "1"},
    }
    places = [("a", 1), ("a", 2), ("b", 1)]
    write_lines(tmp_path / "eng_Latn.jsonl", [row(*place, "en") for place in places])
    write_lines(tmp_path / "zho_Hant.jsonl.gz", [row(*place, "zh") for place in reversed(places)])
    return tmp_path


def test_belebele_is_parallel(belebele_folder: Path) -> None:
    records = list(belebele.read(str(belebele_folder)))
    assert {(p.id, p.lang, p.text) for p in of(Passage, records)} == {
        ("en:p000", "en", "passage a en"),
        ("en:p001", "en", "passage b en"),
        ("zh-Hant:p000", "zh-Hant", "passage a zh"),
        ("zh-Hant:p001", "zh-Hant", "passage b zh"),
    }
    groups = {(q.group, q.text) for q in of(Query, records)}
    assert ("p000:q2", "question a2 en") in groups
    assert ("p000:q2", "question a2 zh") in groups
    judged = {(j.query, j.passage) for j in of(Judgment, records)}
    assert len(judged) == 3 * 2 * 2
    assert ("zh-Hant:p001:q1", "en:p001") in judged


def test_belebele_languages(belebele_folder: Path) -> None:
    for name in ("zh-Hant", "zho_Hant"):
        assert {q.lang for q in of(Query, belebele.read(str(belebele_folder), (name,)))} == {"zh-Hant"}
    with pytest.raises(DataError, match="languages"):
        list(belebele.read(str(belebele_folder), ("de",)))
    with pytest.raises(ConfigError, match="own names"):
        list(belebele.read(languages=("en",)))
    (belebele_folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: found 'no such files'; Belebele's <variant>\.jsonl"):
        list(belebele.read(str(belebele_folder / "empty")))
    for name in ("eng_Latn", "en", "EN", "en-US"):
        assert {q.lang for q in of(Query, belebele.read(str(belebele_folder), (name,)))} == {"en"}


# ----------------------------------------------------------------------------------------------------------- in-domain


@pytest.mark.parametrize(
    ("contains", "evaluation", "verdict", "sources"),
    [
        (["nq"], "beir/nq", True, ("nq",)),
        (["mmarco"], "beir/msmarco", True, ("msmarco",)),
        (["miracl"], "mr_tydi", True, ("miracl", "mr_tydi", "tydiqa")),
        (["mr_tydi"], "miracl", True, ("mr_tydi", "tydiqa")),
        (["duorc", "mmarco"], "beir/nq", False, ()),
        (["squad", "nq"], "xquad_r", True, ("squad",)),
        (None, "beir/nq", None, ()),
    ],
)
def test_in_domain(contains: list[str] | None, evaluation: str, verdict: bool | None, sources: tuple[str, ...]) -> None:
    training = {"contains": contains}
    assert domains.in_domain(training, evaluation) == domains.InDomain(verdict, sources)
    known = {"in_domain_of": list(domains.IN_DOMAIN_OF[evaluation])}
    assert domains.in_domain(training, known) == domains.InDomain(verdict, sources)
    unknown: dict[str, Any] = {}
    assert domains.in_domain(training, unknown) == domains.in_domain(unknown, known) == domains.InDomain(None, ())


def test_sources_of_ones_own_make_a_set_in_domain() -> None:
    stated = domains.facts("beir", {}, (), ["x-monoqa"])
    assert stated == {"evaluation": None, "in_domain_of": ["x-monoqa"]}
    assert domains.in_domain({"contains": ["squad", "x-monoqa"]}, stated) == domains.InDomain(True, ("x-monoqa",))
    assert domains.in_domain({"contains": ["squad"]}, stated) == domains.InDomain(False, ())
    assert domains.facts("xquad_r", {}, (), ["x-own"])["in_domain_of"] == ["squad", "x-own", "xquad"], "the table's stay"
    with pytest.raises(ConfigError, match="A source of your own is x-NAME"):
        domains.expanded(["monoqa"])
    with pytest.raises(ConfigError, match="only an evaluation set is in-domain"):
        domains.check_contains("pairs", {}, (), ["x-monoqa"])


def test_the_table_names_every_reader_of_a_known_set() -> None:
    """A set that launch/prepare.py can make by name has a row, whose sources can be declared."""
    options = {"beir_set": [{"name": name} for name in beir_sets.SETS]}
    for source in set(domains.RETRIEVAL_ONLY) - {"beir"}:
        for given in options.get(source, [{}]):
            found = domains.facts(source, given, ())
            assert found["in_domain_of"] == list(domains.IN_DOMAIN_OF[found["evaluation"]])
            assert set(found["in_domain_of"]) <= domains.SOURCES
    assert domains.facts("beir", {}, ()) == {"evaluation": None, "in_domain_of": None}


def test_prepare_writes_what_belongs_to_the_set(beir_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["beir_set", "--option", "name=quora", "--path", str(beir_folder), "--out", str(tmp_path / "quora")]
    assert prepare.main(given) == 0
    found = RetrievalSet(tmp_path / "quora").manifest
    assert (found["drop_own_id"], found["evaluation"], found["in_domain_of"]) == (True, "beir/quora", ["quora"])
    given = ["beir_set", "--option", "name=cqadupstack-tex", "--path", str(beir_folder), "--out", str(tmp_path / "tex")]
    assert prepare.main(given) == 0
    found = RetrievalSet(tmp_path / "tex").manifest
    assert (found["part_of"], found["evaluation"], "drop_own_id" in found) == ("cqadupstack", "beir/cqadupstack", False)
    rows = write_lines(tmp_path / "rows.jsonl", [{"id": "1", "query": "q", "passage": "p", "query_lang": "en"}])
    for more, contains in (([], None), (["--contains", "mmarco", "nq"], ["mmarco", "msmarco", "nq"])):
        out = tmp_path / f"pairs{len(more)}"
        assert prepare.main(["pairs", "--path", str(rows), "--out", str(out), *more]) == 0
        assert Pairs(out).manifest["contains"] == contains
    capsys.readouterr()
    for arguments, message in (
        (["pairs", "--path", str(rows), "--contains", "ngq"], "isn't in the table"),
        (["beir", "--path", str(beir_folder), "--contains", "nq"], "must never be training data"),
    ):
        assert prepare.main([*arguments, "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


# -------------------------------------------------------------------------------------------------------------- demo


def test_demo_is_parallel_and_has_several_scripts() -> None:
    train = of(Pair, demo.read("train"))
    assert {pair.query_lang for pair in train} == set(demo.LOCALES)
    assert len(demo.LOCALES) >= 6
    assert set(Counter(pair.group for pair in train).values()) == {len(demo.LOCALES)}
    assert all(pair.query_lang == pair.passage_lang for pair in train)
    scripts = {unicodedata.name(letter).split()[0] for pair in train for letter in pair.passage if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "KATAKANA"} <= scripts


def test_demo_test_queries_have_one_relevant_passage_per_language() -> None:
    records = list(demo.read("test"))
    language = {passage.id: passage.lang for passage in of(Passage, records)}
    judged: dict[str, list[str]] = {}
    for judgment in of(Judgment, records):
        judged.setdefault(judgment.query, []).append(language[judgment.passage])
    assert judged.keys() == {query.id for query in of(Query, records)}
    assert all(sorted(languages) == sorted(demo.LOCALES) for languages in judged.values())


def test_demo_texts_are_unique_and_nothing_leaks() -> None:
    train, test = of(Pair, demo.read("train")), list(demo.read("test"))
    passages = [pair.passage for pair in train] + [passage.text for passage in of(Passage, test)]
    queries = [pair.query for pair in train] + [query.text for query in of(Query, test)]
    assert len(set(passages)) == len(passages)
    assert len(set(queries)) == len(queries)
    assert not {pair.group for pair in train} & {query.group for query in of(Query, test)}


def test_demo_held_out_names_are_known_from_training() -> None:
    train, test = demo.split_facts()
    for lang in demo.LOCALES:
        known = {names[lang] for fact in train for names in (fact.subject_names, fact.answer_names)}
        assert all(fact.subject_names[lang] in known and fact.answer_names[lang] in known for fact in test)
    assert 0.15 <= len(test) / (len(train) + len(test)) <= 0.20
    assert 900 <= len(train) + len(test) <= 1300
    assert demo.statistics()["test"] == len(test)


def test_demo_is_deterministic() -> None:
    """In two processes, so with two seeds of Python's string hash."""
    code = "from hybrid_scale.data.sources import demo; print(*[fact.id for facts in demo.split_facts() for fact in facts])"
    runs = {subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout for _ in range(2)}
    assert len(runs) == 1


def test_demo_languages_and_splits() -> None:
    some, everything = of(Pair, demo.read("train", languages=("ja", "en"))), of(Pair, demo.read("train"))
    assert some == sorted(
        (pair for pair in everything if pair.query_lang in ("ja", "en")),
        key=lambda pair: [other.id for other in some].index(pair.id),
    )
    with pytest.raises(DataError, match="demo: languages: found 'tlh'"):
        list(demo.read("train", languages=("tlh",)))
    with pytest.raises(DataError, match="demo: split: found 'dev'; must be train or test"):
        list(demo.read("dev"))


def test_demo_drops_ambiguous_facts() -> None:
    def fact(code: str, name: str) -> demo.Fact:
        names = dict.fromkeys(demo.LOCALES, code) | {"ja": name}
        return demo.Fact("currency", f"territory:{code}", "currency:X", names, dict.fromkeys(demo.LOCALES, "x"))

    kept = demo.unambiguous([fact("a", "same"), fact("b", "Same"), fact("c", "own")])
    assert [one.id for one in kept] == ["currency:c"]


# ---------------------------------------------------------------------------------------------- registry and door


def test_options_are_typed_by_the_readers_signature() -> None:
    assert registry.options("xquad_r", {"path": ["x"], "languages": "de, en", "with_context": "true"}) == {
        "path": Path("x"),
        "languages": ("de", "en"),
        "with_context": True,
    }
    assert registry.options("pairs", {"path": ["a", "b"]}) == {"paths": (Path("a"), Path("b"))}
    given = {"path": "a/b", "columns": "query=question,query_lang==en", "max_rows": "3"}
    assert registry.options("hub", given) == {
        "path": "a/b",
        "columns": {"query": "question", "query_lang": "=en"},
        "max_rows": 3,
    }


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        ("xquadr", {}, "source: found 'xquadr'; no such source. Did you mean 'xquad_r'?"),
        ("beir", {}, "source beir: found 'no path'; this source needs it. Give --path."),
        ("pairs", {}, "source pairs: found 'no paths'; this source needs it. Give --path."),
        ("beir_set", {}, "source beir_set: found 'no name'; this source needs it. Give --option name=VALUE."),
        ("xquad", {"languages": " ,"}, "source xquad: languages: found ' ,'; names nothing. Leave it out to take all."),
        ("beir", {"path": ["a", "b"]}, "source beir: path: found ['a', 'b']; takes one value."),
        ("demo", {"splits": "test"}, "source demo: found 'splits'; no such option. Did you mean 'split'?"),
        ("xquad_r", {"path": "x", "with_context": "yes"}, "source xquad_r: with_context: found 'yes'; must be true or false."),
        ("hub", {"path": "x", "max_rows": "-1"}, "source hub: max_rows: found '-1'; must be a whole number, 0 or more."),
        ("hub", {"path": "x", "columns": "query"}, "source hub: columns: found 'query'; must read ours=theirs,ours==constant."),
    ],
)
def test_option_messages(source: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        registry.options(source, given)
    assert str(error.value) == message


def test_prepare_writes_pairs_and_retrieval_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        assert prepare.main(["demo", "--split", split, "--languages", "en,ja,ru", "--out", str(tmp_path / split)]) == 0
    train, test = demo.split_facts()
    assert len(Pairs(tmp_path / "train")) == 3 * len(train)
    assert len(RetrievalSet(tmp_path / "test").qrels) == 9 * len(test)
    out = capsys.readouterr().out
    assert "ja -> ja" in out
    assert "every query has a relevant passage in every language" in out
    manifest = Pairs(tmp_path / "train").manifest
    assert manifest["source"] == {"name": "demo", "split": "train", "languages": ["en", "ja", "ru"]}
    assert manifest["contains"] == RetrievalSet(tmp_path / "test").manifest["in_domain_of"] == ["demo"]


def test_prepare_counts_cross_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Group g: two en rows and one de row: en x de, de x en, each twice; group h has one language."""
    rows = [("a", "g", "en"), ("b", "g", "en"), ("c", "g", "de"), ("d", "h", "en")]
    path = write_lines(
        tmp_path / "rows.jsonl", [{"id": i, "group": g, "query_lang": lang, "query": i, "passage": i} for i, g, lang in rows]
    )
    assert prepare.main(["pairs", "--path", str(path), "--out", str(tmp_path / "out")]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "cross pairs" in line] == ["4"]


def test_prepare_fails_with_a_message_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ['{"id": "a", "query_lang": "en", "query": "q", "passage": "p"}', "{"])
    arguments = ["pairs", "--path", str(path), "--out", str(tmp_path / "out")]
    assert prepare.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"{path}:2: found '{{'; not JSON")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert prepare.main([*arguments, "--rejects", str(tmp_path / "bad.jsonl")]) == 0
    assert json.loads((tmp_path / "bad.jsonl").read_text())["where"] == f"{path}:2"
    assert prepare.main(arguments) == 2
    assert "prepared data is never overwritten" in capsys.readouterr().err
    assert prepare.main([*arguments[:-1], str(tmp_path / "other"), "--option", "lang"]) == 2
    assert capsys.readouterr().err == "--option: found 'lang'; must read key=value.\n"
    assert prepare.main([*arguments[:-1], str(tmp_path / "other"), "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_prepare_counts_tokens_with_the_runs_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hybrid_scale.model.tiny import write_tokenizer

    rows = [{"id": n, "query_lang": "en", "query": f"a{n}", "passage": "b " * 9} for n in "xy"]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    write_tokenizer(["a b x y"] * 9, tmp_path / "tiny", vocabulary=300)
    config = {"model": {"base": str(tmp_path / "tiny")}, "data": {"train": "x"}, "training": {"max_steps": 1}}
    write_lines(tmp_path / "run.yaml", [config])  # JSON is YAML
    out = tmp_path / "out"
    assert prepare.main(["pairs", "--path", str(path), "--out", str(out), "--config", str(tmp_path / "run.yaml")]) == 0
    assert "tokens of passages" in capsys.readouterr().out
    assert list(out.glob("*length*"))
    config["model"]["base"] = str(tmp_path / "absent")
    write_lines(tmp_path / "run.yaml", [config])
    other = tmp_path / "other"
    assert prepare.main(["pairs", "--path", str(path), "--out", str(other), "--config", str(tmp_path / "run.yaml")]) == 2
    assert not other.exists(), "a tokenizer that can't be loaded must be noticed before the data is read"


def test_sources_load_neither_torch_nor_datasets() -> None:
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, hybrid_scale.data.sources.registry; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
