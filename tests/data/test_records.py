"""Writing and opening checked records: what is stored, what is refused, and in which words."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_scale.data.files import read_jsonl, read_lines
from hybrid_scale.data.folder import Rejects
from hybrid_scale.data.numbers import Numbers, Places, key_of
from hybrid_scale.data.prepared import Pairs, RetrievalSet, TextTable
from hybrid_scale.data.records import Bad, Judgment, Note, Pair, Passage, Query, Record, text_field
from hybrid_scale.data.summary import summarize
from hybrid_scale.data.writing import families, write, write_pairs, write_retrieval
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
         "f:b: pid: found 'p'; this pid already names a passage with another text: see f:a. Give each its own pid."),
        ([pair("a", pid="p", passage="x"), pair("b", negatives=(("p", "y"),))],
         "f:b: pid: found 'p'; this pid already names a passage with another title or text: see f:a. Give each its own pid."),
        ([pair("a", pid="p", negatives=(("n", "x"), ("n", "y")))],
         "f:a: pid: found 'n'; this pid names two texts in one row. Give each its own pid."),
        ([pair("a", pid="p", passage="T x", body="x"), pair("b", pid="p", passage="U x", body="x")],
         "f:b: pid: found 'p'; this pid already names the same passage under another title: see f:a. Give each its own pid."),
        ([pair("a", pid="p", passage="T x", body="x"), pair("b", pid="p", passage="T y", body="y")],
         "f:b: pid: found 'p'; this pid already names a passage with another text: see f:a. Give each its own pid."),
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


def test_a_rejected_row_leaves_nothing(tmp_path: Path) -> None:
    """Neither its passage nor its pid: the same pid with another text is good afterwards."""
    wrong = pair("a", pid="p", passage="x", negatives=(("n", "one"), ("n", "two")))
    rejects = Rejects(tmp_path / "bad.jsonl")
    manifest = write([wrong, pair("b", pid="p", passage="y")], tmp_path / "out", SOURCE, rejects)
    assert (manifest["rows"], manifest["passages"], manifest["rejected_rows"]) == (1, 1, 1)
    assert Pairs(tmp_path / "out").passages.column("text") == ["y"]


def test_a_list_of_rejects_overwrites_nothing_but_such_a_list(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl: found 'an existing file'; bad rows would overwrite .* another --rejects"):
        Rejects(data)
    assert data.read_text() == '{"id": "a"}\n'
    for name in ("first", "second"):
        write([Bad("f:1", f"f:1: {name}."), pair("a")], tmp_path / name, SOURCE, Rejects(tmp_path / "bad.jsonl"))
    assert json.loads((tmp_path / "bad.jsonl").read_text())["message"] == "f:1: second."
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("sign", ["\t", "\n", "\r", "\0"])
def test_ids_that_would_break_a_table_are_refused(sign: str, tmp_path: Path) -> None:
    name = f"a{sign}b"
    assert "an id holds no tab, line break or NUL" in refusal([pair("a", pid=name)], tmp_path / "out")
    assert "an id holds no tab, line break or NUL" in refusal([replace(pair("a"), id=name)], tmp_path / "out")
    assert "an id holds no tab, line break or NUL" in refusal([*corpus("d"), *queries(name)], tmp_path / "out")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(names=st.lists(st.integers(0, 3000).map(str), max_size=2500), step=st.integers(1, 1000))
def test_numbers_are_those_of_a_dict(names: list[str], step: int) -> None:
    """Over several sizes of the table; the first 1,024 slots hold 682 entries."""
    table, expected = Numbers(), {}
    for number, name in enumerate(names + [f"x{n}" for n in range(step)]):
        assert table.setdefault(key_of(name), number) == expected.setdefault(name, number)
    assert table.count == len(expected)
    assert all(table.get(key_of(name)) == number for name, number in expected.items())
    assert table.get(key_of("unknown")) is None


def test_numbers_whose_keys_collide() -> None:
    """Keys with equal slots, and with equal first or second halves, through three sizes."""
    keys = [(slot + (turn << 40), half) for slot in (0, 1023, 4095) for turn in range(400) for half in (0, 7)]
    table = Numbers()
    for number, key in enumerate(keys):
        assert table.setdefault(key, number) == number
    assert [table.get(key) for key in keys] == list(range(2400))
    assert table.get((0, 1)) is None


def test_places_come_back() -> None:
    places, names = Places(), ["a.jsonl:1", "b.gz:12", "a.jsonl:2", "hub/set[train]", "c:\\x:7", "d:007", "e:²", ":3", "f:"]
    for name in names:
        places.append(name)
    assert [places[row] for row in range(len(names))] == names


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
        ([*corpus("d"), Passage("c:2", "d", "en", "other"), *queries("q")],
         "c:2: _id: found 'd'; this passage id already names another text. Keep one of the two."),
        ([*corpus("d"), *queries("q"), Query("q:2", "q", "en", "other", "q")],
         "q:2: _id: found 'q'; this query id already names another text. Keep one of the two."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "q", "x", 1)],
         "source {'name': 'test'}: found \"no good judgments, 1 of passages that the corpus lacks, such as 'x'\"; "
         "a retrieval set needs judgments."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "x", "d", 1)],
         "j:1: found 'x'; the qrels name a query that the queries do not hold."),
        ([*corpus("d"), *queries("q"), Judgment("j:1", "q", "d", 1), Judgment("j:2", "q", "d", 2)],
         "j:2: found ('q', 'd'); this query and passage are judged twice, with two scores. Keep one of the two."),
        (corpus("d"), "source {'name': 'test'}: found 'no good queries'; a retrieval set needs queries."),
        ([*corpus("d"), *queries("q")], "source {'name': 'test'}: found 'no good judgments'; a retrieval set needs judgments."),
        ([*corpus("d"), pair("a")], "f:a: found 'a training pair'; a retrieval source yields passages, queries and judgments."),
    ],
)  # fmt: skip
def test_refused_retrieval_sets(records: list[Record], message: str, tmp_path: Path) -> None:
    assert refusal(records, tmp_path / "out") == message


def test_oddities_of_published_sets_are_kept_and_said(tmp_path: Path) -> None:
    """A judged passage that isn't there, an empty passage, a second copy of a row: in the manifest and in the summary."""
    records: list[Record] = [*corpus("d", "d"), Passage("c:e", "e", "en", ""), *queries("q", "r"), Note("f", "read twice")]
    judged = [("q", "d", 1), ("q", "gone", 2), ("r", "lost", 1), ("q", "none", 0), ("q", "d", 1), ("q", "gone", 2)]
    manifest = write(records + [Judgment("j", *row) for row in judged], tmp_path / "out", SOURCE)
    data = RetrievalSet(tmp_path / "out")
    assert data.qrels.tolist() == [[0, 0, 1]]
    assert (data.missing.tolist(), data.missing_ids) == ([[0, 2], [0, 0], [1, 1]], ["gone", "none", "lost"])
    assert data.corpus.column("text") == ["text d", ""]
    odd = ("judgments_of_missing_passages", "empty_passages", "copies_left_out", "judgments", "queries_without_relevant")
    assert [manifest[name] for name in odd] == [3, 1, 3, 4, 0]
    assert len(manifest["notes"]) == 4
    for note in ("note: read twice.", "as in BEIR and mteb; judgments: 3.", "as in BEIR and mteb; passages: 1."):
        assert note in summarize(tmp_path / "out")
    write([*corpus("d"), *queries("q"), Judgment("j", "q", "d", 1)], tmp_path / "plain", SOURCE)
    assert "note:" not in summarize(tmp_path / "plain")
    assert len(RetrievalSet(tmp_path / "plain").missing) == 0


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


def test_directories_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    manifest = write_pairs([pair("a")], tmp_path / "out", SOURCE, facts=lambda _: {"contains": None})
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert manifest["contains"] is None
    whole = (tmp_path / "out/query.npy").read_bytes()
    (tmp_path / "out/query.npy").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"query.npy: found '135 bytes'; the manifest says 136 bytes\. Prepare the data again"):
        Pairs(tmp_path / "out")
    (tmp_path / "out/query.npy").unlink()
    with pytest.raises(DataError, match=r"query.npy: found 'no such file'; the manifest says 136 bytes"):
        Pairs(tmp_path / "out")
    del manifest["bytes"]  # as data of earlier versions
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"query.npy: found 'No such file or directory'; a file of prepared data is needed"):
        Pairs(tmp_path / "out")
    (tmp_path / "out/queries.arrow").write_bytes(b"ARROW")
    with pytest.raises(DataError, match=r"queries.arrow: found .*; a file of prepared data is needed"):
        Pairs(tmp_path / "out")
    for text, said in (("[]", "no kind or format"), ('{"kind": "pairs", "format": 1}', "no languages and no fingerprint")):
        (tmp_path / "out/manifest.json").write_text(text)
        with pytest.raises(DataError, match=said):
            Pairs(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- text

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
NASTY = st.sampled_from(
    ["\0", "a\0b", "\u2028", "\x85", "\ufeff", "\U0010ffff", "é", "e\u0301", "\u202e", "\r\n", "\t", "ß", "ﬀ"]
)
ID = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(ID, ID, ID, ANY_TEXT | NASTY, ANY_TEXT | NASTY, st.lists(st.tuples(ID, ANY_TEXT), max_size=3)),
        min_size=1,
        max_size=12,
        unique_by=lambda row: row[0],
    )
)
def test_any_pairs_come_back(rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against a reading of the rules by dicts: a pid names one text, rows that break this are rejected whole."""
    records = [
        Pair("w:1", name, group, pid, "en", "de", query, passage, tuple(negatives))
        for name, group, pid, query, passage, negatives in rows
    ]
    named: dict[str, str] = {}
    good = []
    for record in records:
        trial = dict(named)
        if all(trial.setdefault(pid, text) == text for pid, text in [(record.pid, record.passage), *record.negatives]):
            named = trial
            good.append(record)
    folder = tmp_path_factory.mktemp("pairs")
    rejects = Rejects(folder / "bad.jsonl")
    if not good:  # bad by themselves: one pid, two texts
        with pytest.raises(DataError, match=f"no good rows, {len(records)} rejected"):
            write_pairs(records, folder / "out", SOURCE, rejects)
        return
    manifest = write_pairs(records, folder / "out", SOURCE, rejects)
    data = Pairs(folder / "out")
    assert manifest["rejected_rows"] == len(records) - len(good)
    order = sorted(range(len(good)), key=lambda row: [record.group for record in good].index(good[row].group))
    held = [
        (name, query, passage, [data.passages.column("text", np.asarray([number]))[0] for number in data.negatives[start:end]])
        for name, query, passage, start, end in zip(
            data.queries.column("id", data.query),
            data.queries.column("text", data.query),
            data.passages.column("text", data.passage),
            data.negative_offsets[:-1],
            data.negative_offsets[1:],
            strict=True,
        )
    ]
    expected = [good[row] for row in order]
    assert held == [(pair.id, pair.query, pair.passage, [text for _, text in pair.negatives]) for pair in expected]
    assert sorted(data.passages.column("text")) == sorted(set(named.values()))


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
    monkeypatch.setattr("hybrid_scale.data.folder.FLUSH_ROWS", 3)
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
    with pytest.raises(DataError, match=r"latin\.jsonl:1: found .*; a text file must be UTF-8\."):
        list(read_jsonl(tmp_path / "latin.jsonl"))
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    assert [row for _, row in read_jsonl(tmp_path / "plain.jsonl.gz")] == [{}], "by what it is, not by its name"


def test_files_of_other_systems(tmp_path: Path) -> None:
    """A byte-order mark, CRLF, two gzip members, a last line without an end."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\r\n\r\n') + gzip.compress(b'{"a": 2}'))
    for path in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"):
        assert list(read_jsonl(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    (tmp_path / "wide.jsonl").write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(DataError, match=r"wide\.jsonl:1: found b'\\xff'; a text file must be UTF-8"):
        list(read_jsonl(tmp_path / "wide.jsonl"))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}", '{"a": 1', "nul", '"text"', '{"a": 1} {"b": 2}'])
def test_lines_that_are_no_json_object_are_bad_rows(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line + '\n{"id": 1}\n')
    (where, bad), good = read_jsonl(tmp_path / "rows.jsonl")
    assert isinstance(bad, Bad)
    assert bad.message.startswith(f"{where}: found ")
    assert len(bad.message) < 500
    assert good[1] == {"id": 1}


def test_lines_keep_their_numbers_and_inner_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("a\u2028b\tc \n\n  \nd\n", encoding="utf-8")
    assert list(read_lines(path)) == [(f"{path}:1", "a\u2028b\tc "), (f"{path}:4", "d")]
