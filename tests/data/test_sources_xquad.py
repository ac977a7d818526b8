"""XQuAD's paragraphs, and LAReQA's files by an id of the Hub: copies in the Hub's layouts, no network."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from hybrid_scale.data.records import Bad, Judgment, Passage, Query, Record
from hybrid_scale.data.sources import mlqa_r, xquad, xquad_r
from hybrid_scale.errors import DataError
from launch import prepare

CONTEXTS = {"en": ("It is big. Born 1900.", "Red wine."), "de": ("Es ist gross. Geboren 1900.", "Roter Wein.")}
BREAKS = {"en": ([[0, 10], [11, 21]], [[0, 9]]), "de": ([[0, 13], [14, 27]], [[0, 11]])}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def squad(lang: str, breaks: bool) -> dict[str, Any]:
    """q1 and q2 are asked about the first paragraph (its second sentence), q3 about the second; German lacks q2."""
    asked = [("q1", 0, 15), ("q2", 0, 15), ("q3", 1, 0)]
    paragraphs: list[dict[str, Any]] = [{"context": context, "qas": []} for context in CONTEXTS[lang]]
    for name, where, start in asked:
        if (lang, name) != ("de", "q2"):
            answers = [{"answer_start": start, "text": "x"}]
            paragraphs[where]["qas"].append({"id": name, "question": f"{name} {lang}?", "answers": answers})
    for number, paragraph in enumerate(paragraphs if breaks else []):
        paragraph["sentence_breaks"] = BREAKS[lang][number]
    return {"data": [{"title": "t", "paragraphs": paragraphs}]}


def of(kind: type, records: list[Record]) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


# ------------------------------------------------------------------------------------------------------------- paragraphs


def check_paragraphs(records: list[Record]) -> None:
    assert {(p.id, p.lang, p.text) for p in of(Passage, records)} == {
        (f"{lang}:p{number:03}", lang, text) for lang, texts in CONTEXTS.items() for number, text in enumerate(texts)
    }
    assert [q.group for q in of(Query, records) if q.lang == "en"] == ["q1", "q2", "q3"]
    assert {(j.query, j.passage) for j in of(Judgment, records)} == {
        *(("en:q1", "en:p000"), ("en:q1", "de:p000"), ("de:q1", "en:p000"), ("de:q1", "de:p000")),
        *(("en:q2", "en:p000"), ("en:q3", "en:p001"), ("en:q3", "de:p001"), ("de:q3", "en:p001"), ("de:q3", "de:p001")),
    }
    assert len(of(Judgment, records)) == 9
    assert not of(Bad, records)


def test_paragraphs_from_squads_files(tmp_path: Path) -> None:
    (tmp_path / "xquad.en.json").write_text(json.dumps(squad("en", breaks=False)))
    (tmp_path / "de.json").write_text(json.dumps(squad("de", breaks=True)))  # LAReQA's files are SQuAD's with more in them
    check_paragraphs(list(xquad.read(str(tmp_path))))
    alone = list(xquad.read(str(tmp_path), ("en",)))
    assert {(j.query, j.passage) for j in of(Judgment, alone)} == {
        ("en:q1", "en:p000"),
        ("en:q2", "en:p000"),
        ("en:q3", "en:p001"),
    }
    with pytest.raises(DataError, match=r"languages: found 'fr'; .* Known: de, en\."):
        list(xquad.read(str(tmp_path), ("fr",)))
    (tmp_path / "de.json").write_text('{"data": [{"paragraphs": [{}]}]}')
    with pytest.raises(DataError, match=r"de\.json: found \"KeyError: 'qas'\"; SQuAD's layout"):
        list(xquad.read(str(tmp_path)))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `google/xquad` is a local copy of the Hub's, one config a language, rows as in SQuAD's features."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, configs = tmp_path / "google" / "xquad", []
    folder.mkdir(parents=True)
    for lang in CONTEXTS:
        rows = [
            {
                "id": qa["id"],
                "context": paragraph["context"],
                "question": qa["question"],
                "answers": {"text": ["x"], "answer_start": [0]},
            }
            for paragraph in squad(lang, breaks=False)["data"][0]["paragraphs"]
            for qa in paragraph["qas"]
        ]
        (folder / f"{lang}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs.append(f"- config_name: xquad.{lang}\n  data_files:\n  - split: validation\n    path: {lang}.jsonl")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paragraphs_from_the_hubs_layout(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.is_dir  # google/xquad shall be an id of the Hub
    monkeypatch.setattr(Path, "is_dir", lambda path: path.as_posix() != "google/xquad" and real(path))
    check_paragraphs(list(xquad.read(languages=("en", "de"))))
    with pytest.raises(DataError, match=r"google/xquad: languages: found 'fr'"):
        list(xquad.read(languages=("fr",)))


def test_a_question_that_stands_twice_is_bad(tmp_path: Path) -> None:
    tree = squad("en", breaks=False)
    tree["data"][0]["paragraphs"][1]["qas"].append({"id": "q1", "question": "again?"})
    (tmp_path / "en.json").write_text(json.dumps(tree))
    (bad,) = of(Bad, list(xquad.read(str(tmp_path))))
    assert bad.message == f"{tmp_path}/en.json: question 3: id: found 'q1'; this question stands twice."


# ----------------------------------------------------------------------------------------------- LAReQA's files on the Hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache with the repository me/lareqa: a snapshot of one commit, which is also `main`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "datasets--me--lareqa"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("xquad-r", "mlqa-r"):
        folder = repository / "snapshots" / COMMIT / name
        folder.mkdir(parents=True)
        for lang in CONTEXTS:
            (folder / f"{lang}.json").write_text(json.dumps(squad(lang, breaks=True)))
        (folder / "dataset_infos.json").write_text("{}")
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", ["", COMMIT])
def test_lareqas_files_by_an_id_of_the_hub(cache: Path, revision: str) -> None:
    records = list(xquad_r.read(Path("me/lareqa"), revision=revision))
    assert len(of(Passage, records)) == 6
    assert ("en:q1", "de:p0000:s01") in {(j.query, j.passage) for j in of(Judgment, records)}
    assert [type(r) for r in records] == [type(r) for r in mlqa_r.read(Path("me/lareqa"), revision=revision)]
    assert records == list(xquad_r.read(cache)) == list(xquad_r.read(cache / "xquad-r"))


def test_what_the_hub_lacks_says_where_it_is(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"xquad_r: found 'no sentence_breaks'; .* lareqa/xquad-r\. .*: source xquad\."):
        list(xquad_r.read(Path("google-research-datasets/xquad_r")))
    with pytest.raises(DataError, match=r"mlqa: found 'no sentence_breaks'; .* 354d67d1cd066854cdfbf5ad0e6105528976141d"):
        list(mlqa_r.read(Path("facebook/mlqa")))
    with pytest.raises(DataError, match=r"neither a folder nor a repository .* lareqa/xquad-r"):
        list(xquad_r.read(Path("you/elsewhere")))
    for path in (tmp_path / "nowhere", Path("no/such/folder"), Path("folder")):
        with pytest.raises(DataError, match=r"found 'no such folder'; nor is it an id of the Hub"):
            list(xquad_r.read(path))
    with pytest.raises(DataError, match="neither a folder nor a repository"):
        list(xquad_r.read(Path("me/lareqa"), revision="f" * 40))
    out = tmp_path / "out"
    assert prepare.main(["xquad_r", "--path", "google/xquad", "--out", str(out)]) == 2
    assert "git clone https://github.com/google-research-datasets/lareqa" in capsys.readouterr().err
    assert not out.exists()
