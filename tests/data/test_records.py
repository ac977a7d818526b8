"""Writing and opening checked records: what is stored, what is refused, and in which words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.data.records import (
    Bad,
    Judgment,
    Pair,
    Pairs,
    Passage,
    Query,
    Record,
    Rejects,
    RetrievalSet,
    TextTable,
    families,
    read_jsonl,
    read_lines,
    text_field,
    write,
    write_pairs,
    write_retrieval,
)
from hybrid_scale.errors import DataError

SOURCE = {"name": "test"}


def pair(name: str, group: str = "", pid: str = "", lang: str = "en", passage: str = "", **other: object) -> Pair:
    """A row whose unset fields follow from its id."""
    pid = pid or name
    row = Pair(f"f:{name}", name, group or name, pid, lang, lang, f"q {name}", passage or f"p {pid}")
    return replace(row, **other)  # type: ignore[arg-type]


def refusal(records: list[Record], directory: Path) -> str:
    with pytest.raises(DataError) as error:
        write(records, directory, SOURCE)
    assert not directory.exists(), "a failed write left something behind"
    assert not list(directory.parent.glob(".*.part"))
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ pairs


def test_rows_are_stored_by_group_with_their_texts(tmp_path: Path) -> None:
    rows = [
        pair("a", "g1", negatives=(("n1", "no"), ("n2", "nein"))),
        pair("b", "g2", lang="de"),
        pair("c", "g1", lang="de", cross_only=True, negatives=(("n2", "nein"),)),
    ]
    manifest = write_pairs(rows, tmp_path / "out", SOURCE)
    data = Pairs(tmp_path / "out")
    assert (manifest["rows"], manifest["groups"], manifest["passages"], manifest["languages"]) == (3, 2, 5, ["en", "de"])
    assert data.queries.column("id", data.query) == ["a", "c", "b"]
    assert data.passages.column("text", data.passage) == ["p a", "p c", "p b"]
    assert [data.languages[code] for code in data.query_lang] == ["en", "de", "de"]
    assert data.cross_only.tolist() == [False, True, False]
    assert data.group.tolist() == [0, 0, 1]
    starts = data.negative_offsets[1:-1]
    assert [data.passages.column("id", part) for part in np.split(data.negatives, starts)] == [["n1", "n2"], ["n2"], []]


def test_equal_texts_become_one_passage(tmp_path: Path) -> None:
    manifest = write_pairs([pair("a", passage="same"), pair("b", passage="same"), pair("c")], tmp_path / "out", SOURCE)
    data = Pairs(tmp_path / "out")
    assert manifest["passages"] == 2
    assert manifest["passage_ids_with_a_known_text"] == 1
    assert data.passage[0] == data.passage[1]
    assert data.family[0] == data.family[1] != data.family[2]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=25))
def test_families_are_the_connected_rows(rows: list[tuple[int, int]]) -> None:
    """Against merging sets until nothing changes."""
    group, passage = (np.asarray(column) for column in zip(*rows, strict=True))
    rows_family, passage_family = families(group, passage, 9)
    expected = list(range(len(rows)))
    for _ in rows:
        for i, (g, p) in enumerate(rows):
            tied = [j for j, other in enumerate(rows) if other[0] == g or other[1] == p]
            lowest = min(expected[j] for j in [i, *tied])
            for j in tied:
                expected[j] = lowest
    same = rows_family[:, None] == rows_family[None, :]
    assert np.array_equal(same, np.asarray(expected)[:, None] == np.asarray(expected)[None, :])
    assert np.array_equal(passage_family[passage], rows_family)
    alone = sorted(set(range(9)) - set(passage.tolist()))  # nobody's positive
    assert len(set(passage_family[alone].tolist())) == len(alone)
    assert not set(passage_family[alone].tolist()) & set(rows_family.tolist())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair("a"), pair("a")], "f:a: id: found 'a'; duplicate id, first at f:a."),
        ([pair("a", pid="p", passage="x"), pair("b", pid="p", passage="y")],
         "f:b: pid: found 'p'; this pid already names a passage with another text."),
        ([pair("a", pid="p", passage="x"), pair("b", negatives=(("p", "y"),))],
         "f:b: pid: found 'p'; this pid already names a passage with another text."),
        ([pair("a"), Bad("f:9", "f:9: broken.")], "f:9: broken."),
        ([pair("a"), Query("f:2", "q", "en", "t", "q")], "f:2: found 'Query'; a training source yields pairs only."),
        ([], "source {'name': 'test'}: found 'no good rows, 0 rejected'; a training set needs a pair."),
    ],
)  # fmt: skip
def test_refused_pairs(rows: list[Record], message: str, tmp_path: Path) -> None:
    assert refusal(rows, tmp_path / "out") == message


def test_rejects_are_listed_and_counted(tmp_path: Path) -> None:
    rejects = Rejects(tmp_path / "lists" / "bad.jsonl")
    rows = [Bad("f:1", "f:1: broken."), pair("a"), pair("a"), pair("b", pid="a", passage="other")]
    manifest = write(rows, tmp_path / "out", SOURCE, rejects)
    assert (manifest["rows"], manifest["rejected_rows"]) == (1, 3)
    listed = [json.loads(line) for line in (tmp_path / "lists" / "bad.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in listed] == ["f:1", "f:a", "f:b"]
    assert listed[0]["message"] == "f:1: broken."


def test_all_rows_bad(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 'no good rows, 1 rejected'"):
        write([Bad("f:1", "f:1: broken.")], tmp_path / "out", SOURCE, Rejects(tmp_path / "bad.jsonl"))
    assert "f:1: broken." in (tmp_path / "bad.jsonl").read_text()


def test_prepared_data_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_pairs([pair("a")], tmp_path / "out", SOURCE)  # an empty folder is fine
    before = Pairs(tmp_path / "out").fingerprint
    with pytest.raises(DataError, match="out: found 'a non-empty folder'; prepared data is never overwritten"):
        write_pairs([pair("b")], tmp_path / "out", SOURCE)
    assert Pairs(tmp_path / "out").fingerprint == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found 'a file'"):
        write_pairs([pair("b")], tmp_path / "file", SOURCE)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    made = [write_pairs([pair("a"), pair(name)], tmp_path / str(n), SOURCE) for n, name in enumerate("bbc")]
    assert made[0]["fingerprint"] == made[1]["fingerprint"] != made[2]["fingerprint"]


# -------------------------------------------------------------------------------------------------------- retrieval


def corpus(*ids: str) -> list[Record]:
    return [Passage(f"c:{name}", name, "en", f"text {name}") for name in ids]


def queries(*ids: str) -> list[Record]:
    return [Query(f"q:{name}", name, "en", f"text {name}", name) for name in ids]


def test_retrieval_set_in_any_order(tmp_path: Path) -> None:
    records = [Judgment("j:1", "q2", "d1", 2), *queries("q1", "q2"), Judgment("j:2", "q1", "d2", 0), *corpus("d1", "d2")]
    manifest = write(records, tmp_path / "out", SOURCE)
    data = RetrievalSet(tmp_path / "out")
    assert data.qrels.tolist() == [[0, 1, 0], [1, 0, 2]]
    assert data.corpus.column("text") == ["text d1", "text d2"]
    assert data.queries.column("group") == ["q1", "q2"]
    assert manifest["queries_without_relevant"] == 1
    assert data.name == "out"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([*corpus("d", "d"), *queries("q")], "c:d: _id: found 'd'; duplicate passage id."),
        ([*corpus("d"), *queries("q", "q")], "q:q: _id: found 'q'; duplicate query id."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "q", "x", 1)],
         "j:1: found 'x'; the qrels name a passage that the corpus does not hold."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "x", "d", 1)],
         "j:1: found 'x'; the qrels name a query that the queries do not hold."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "q", "d", 1), Judgment("j:2", "q", "d", 1)],
         "j:2: found ('q', 'd'); this query and passage are judged twice."),
        (corpus("d"), "source {'name': 'test'}: found 'no good queries'; a retrieval set needs queries."),
        ([*corpus("d"), *queries("q")], "source {'name': 'test'}: found 'no good judgments'; a retrieval set needs judgments."),
        ([*corpus("d"), pair("a")], "f:a: found 'a training pair'; a retrieval source yields passages, queries and judgments."),
    ],
)  # fmt: skip
def test_refused_retrieval_sets(records: list[Record], message: str, tmp_path: Path) -> None:
    assert refusal(records, tmp_path / "out") == message


def test_opening_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found 'no manifest\.json'; .* Make one with launch/prepare\.py\."):
        Pairs(tmp_path)
    write_pairs([pair("a")], tmp_path / "out", SOURCE)
    with pytest.raises(DataError, match="found 'pairs'; a prepared 'retrieval' directory is needed here"):
        RetrievalSet(tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match=r"found 99; this version reads format \d+\. Prepare the data again\."):
        Pairs(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- text


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=12))
def test_any_text_comes_back(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("texts") / "out"
    passages: list[Record] = [Passage("w", str(n), "en", text) for n, text in enumerate(texts)]
    write_retrieval([*passages, *queries("q"), Judgment("j", "q", "0", 1)], directory, SOURCE)
    table = TextTable(directory / "corpus.arrow")
    assert table.column("text") == texts
    rows = np.arange(len(texts))[::-1]
    assert table.column("text", rows) == texts[::-1]


def test_tables_of_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_scale.data.records.FLUSH_ROWS", 3)
    write_retrieval([*corpus(*map(str, range(8))), *queries("q"), Judgment("j", "q", "7", 1)], tmp_path / "out", SOURCE)
    assert TextTable(tmp_path / "out/corpus.arrow").column("id", np.asarray([7, 0, 3, 3])) == ["7", "0", "3", "3"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "found ''; empty text."),
        (" \n", "found ' \\n'; empty text."),
        (None, "found None; missing."),
        (True, "found True; must be text."),
        (["x"], "found ['x']; must be text."),
        ("\ud83d", "found '\\ud83d'; half of a surrogate pair is no text."),
    ],
)
def test_text_field_messages(value: object, problem: str) -> None:
    assert text_field("f:1", {"text": value}, "text") == Bad("f:1", f"f:1: text: {problem}")


def test_text_field_accepts_numbers_and_strips() -> None:
    assert text_field("f:1", {"_id": 7, "text": " a b\n"}, "_id") == "7"
    assert text_field("f:1", {"text": " a b\n"}, "text") == "a b"


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: found 'no such file'; this file is needed\. Check the path\."):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl: found .*; a text file must be UTF-8\."):
        list(read_jsonl(tmp_path / "latin.jsonl"))
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"plain\.jsonl\.gz: found .*; damaged gzip\. Fetch the file again\."):
        list(read_jsonl(tmp_path / "plain.jsonl.gz"))


def test_lines_keep_their_numbers_and_inner_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("a\u2028b\tc \n\n  \nd\n", encoding="utf-8")
    assert list(read_lines(path)) == [(f"{path}:1", "a\u2028b\tc "), (f"{path}:4", "d")]
