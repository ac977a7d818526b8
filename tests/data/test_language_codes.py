"""However the data spell a language: one code in prepared sets, no cross pairs of it, and the summary says so."""

import json
from pathlib import Path

import pytest

from hybrid_scale.data import writing
from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Judgment, Pair, Passage, Query, Record
from hybrid_scale.data.sources import beir, bitext, miracl, pairs
from hybrid_scale.data.strata import open_strata
from hybrid_scale.data.summary import summarize
from hybrid_scale.errors import DataError
from hybrid_scale.retrieval.evaluate import languages_of
from launch.prepare import main as prepare

SOURCE = {"name": "test"}


def row(name: str, lang: str, passage_lang: str = "") -> Pair:
    return Pair(f"f:{name}", name, "g", name, lang, passage_lang or lang, f"q {name}", f"p {name}")


def test_spellings_of_one_language_make_no_cross_pairs(tmp_path: Path) -> None:
    rows = [row("a", "pt-BR"), row("b", "por_Latn"), row("c", "pt"), row("d", "zh-TW"), row("e", "zho_Hant", "zh-Hant")]
    manifest = writing.write(rows, tmp_path / "out", SOURCE)
    assert manifest["languages"] == ["pt", "zh-Hant"]
    assert manifest["language_codes"] == {
        "pt": {"pt-BR": 2, "por_Latn": 2, "pt": 2},
        "zh-Hant": {"zh-TW": 2, "zho_Hant": 1, "zh-Hant": 1},
    }
    data = Pairs(tmp_path / "out")
    assert data.passages.column("lang") == ["pt"] * 3 + ["zh-Hant"] * 2
    assert {s.language: s.size for s in open_strata(data, "mono", (), False)} == {"pt": 3, "zh-Hant": 2}
    assert {s.language: s.size for s in open_strata(data, "cross", (), False)} == {"pt": 6, "zh-Hant": 6}
    said = summarize(tmp_path / "out")
    assert "one language, other codes: pt is written pt-BR (2 texts), por_Latn (2 texts), pt (2 texts)" in said


def test_codes_written_as_ours_are_not_mentioned(tmp_path: Path) -> None:
    manifest = writing.write([row("a", "en"), row("b", "zh-Hant")], tmp_path / "out", SOURCE)
    assert "language_codes" not in manifest
    assert "other codes" not in summarize(tmp_path / "out")


def test_a_retrieval_set_holds_codes(tmp_path: Path) -> None:
    records: list[Record] = [
        *(Passage("t", f"p{n}", lang, f"text {n}") for n, lang in enumerate(("jpn_Jpan", "ja", "kor_Hang"))),
        *(Query("t", f"q{n}", lang, f"text {n}", f"q{n}") for n, lang in enumerate(("JA", "ko"))),
        *(Judgment("t", f"q{n}", f"p{n + 1}", 1) for n in range(2)),
    ]
    writing.write(records, tmp_path / "out", SOURCE)
    data = RetrievalSet(tmp_path / "out")
    assert data.languages == ["ja", "ko"]
    assert data.corpus.column("lang") == ["ja", "ja", "ko"]
    assert "ja is written jpn_Jpan (1 texts), ja (1 texts), JA (1 texts)" in summarize(tmp_path / "out")


@pytest.mark.parametrize("records", [[row("a", "english")], [Passage("f:a", "p", "english", "x")]])
def test_unknown_codes_are_refused_with_the_remedy(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f:a: (query_)?lang: found 'english'; .* BCP 47 code\. .* x-NAME"):
        writing.write(records, tmp_path / "out", SOURCE)


def prepared_before(records: list[Record], out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set as it was prepared when spellings were kept."""
    with monkeypatch.context() as earlier:
        earlier.setattr(writing, "known_code", lambda spelling: spelling)
        writing.write(records, out, SOURCE)
    return out


def test_sets_prepared_before_open_under_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepared_before([row("a", "eng"), row("b", "zho-Hans")], tmp_path / "pairs", monkeypatch)
    data = Pairs(old)
    assert data.languages == ["en", "zh"]
    assert {s.language: s.size for s in open_strata(data, "cross", ("zh",), True)} == {"zh": 1}
    assert "zh -> zh" in summarize(old)
    records = [Passage("t", "p", "tha_Thai", "x"), Query("t", "q", "EN", "x", "q"), Judgment("t", "q", "p", 1)]
    task = RetrievalSet(prepared_before(records, tmp_path / "set", monkeypatch))
    assert (task.languages, languages_of(task, task.corpus)[0], languages_of(task, task.queries)[0]) == (
        ["th", "en"],
        ["th"],
        ["en"],
    )
    assert "th " in summarize(tmp_path / "set")


def test_sets_prepared_before_that_mix_spellings_must_be_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = prepared_before([row("a", "en"), row("b", "en-US")], tmp_path / "out", monkeypatch)
    with pytest.raises(DataError, match=r"found 'en and en-US'; both name the language en, .* Prepare the data again"):
        Pairs(old)


def test_wanted_languages_fit_any_spelling(tmp_path: Path) -> None:
    lines = [{"id": lang, "query_lang": lang, "query": "q", "passage": f"p {lang}"} for lang in ("en", "en-GB", "deu", "fr")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [record.id for record in pairs.read((file,), ("EN", "de-AT")) if isinstance(record, Pair)]
    assert found == ["en", "en-GB", "deu"]
    with pytest.raises(DataError, match="languages: found 'en and eng'; both name the language en"):
        list(pairs.read((file,), ("en", "eng")))
    with pytest.raises(DataError, match="found 'es'; the data doesn't hold them"):
        list(bitext.read((), ("es",)))
    with pytest.raises(DataError, match="found 'jp'; a language must be named"):
        list(beir.read(tmp_path, languages=("jp",)))


def test_files_of_a_set_are_found_under_any_spelling(tmp_path: Path) -> None:
    for lang in ("eng", "zh", "zh-Hant"):
        (tmp_path / f"{lang}.corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n')
        (tmp_path / f"{lang}.queries.jsonl").write_text('{"_id": "1", "text": "a"}\n')
        (tmp_path / f"{lang}.qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    assert {r.lang for r in miracl.read(tmp_path, ("en", "zho_Hans")) if isinstance(r, Query)} == {"eng", "zh"}
    (tmp_path / "en.queries.jsonl").write_text("")
    with pytest.raises(DataError, match=r"found 'en-US'; the data hold this language as en and eng\. Name one of them"):
        list(miracl.read(tmp_path, ("en-US",)))


def test_prepare_refuses_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["demo", "--out", str(tmp_path / "out"), "--languages", "en,de,deu"]
    assert prepare(given) == 2
    assert capsys.readouterr().err.strip() == (
        "demo: languages: found 'de and deu'; both name the language de, which must stand once. Leave one of them out."
    )
