"""Mixes of sources, judged passages as pairs, and a training set divided into training and development."""

import json
from pathlib import Path

import numpy as np
import pytest

from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Judgment, Pair, Passage, Query
from hybrid_scale.data.sources import again, mix
from hybrid_scale.data.sources.domains import IN_DOMAIN_OF, InDomain, in_domain, own_source
from hybrid_scale.data.sources.registry import options, reader
from hybrid_scale.data.summary import by_source, summarize
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import ConfigError, DataError
from launch.prepare import main
from tests.data.synthetic import pairs_from, parallel
from tests.test_floors import ROOT


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two sources with the same ids: three questions in two languages, and two sentences that translate each other."""
    rows = [
        {"id": f"{g}-{lang}", "group": g, "query": f"q {g} {lang}", "passage": f"p {g} {lang}", "query_lang": lang}
        for g in ("1", "2", "3")
        for lang in ("en", "de")
    ]
    jsonl(tmp_path / "faq.jsonl", [*rows, {"id": "4", "query": "q4", "passage": "p4", "query_lang": "en", "negatives": ["n4"]}])
    jsonl(
        tmp_path / "bitext.jsonl", [{"id": f"1-{lang}", "group": "1", "lang": lang, "text": f"s {lang}"} for lang in ("en", "fr")]
    )
    (tmp_path / "mix.yaml").write_text(
        f"name: two\nsources:\n"
        f"  faq: {{reader: pairs, path: {tmp_path}/faq.jsonl, licence: CC0-1.0, contains: [mfaq]}}\n"
        f"  lines: {{reader: bitext, path: [{tmp_path}/bitext.jsonl], licence: CC BY 4.0, url: 'https://example.org'}}\n"
    )
    return tmp_path


def test_a_mix_states_licence_languages_rows_and_pairs_of_each_source(mixed: Path, capsys):
    assert main(["mix", "--path", str(mixed / "mix.yaml"), "--out", str(mixed / "train")]) == 0
    pairs = Pairs(mixed / "train")
    assert pairs.source_names == ["faq", "lines"]
    assert by_source(pairs) == {
        "faq": {"rows": 7, "languages": 2, "groups": 4, "hard_negatives": 1, "cross_pairs": 6},
        "lines": {"rows": 2, "languages": 2, "groups": 1, "hard_negatives": 0, "cross_pairs": 2},
    }
    assert pairs.manifest["mix"]["sources"]["lines"] == {"licence": "CC BY 4.0", "url": "https://example.org", "contains": []}
    assert pairs.manifest["contains"] == ["mfaq"]
    said = capsys.readouterr().out
    assert "faq                             7          2            4              6               1  CC0-1.0" in said


def test_sources_of_a_mix_never_collide(mixed: Path):
    records = list(reader("mix")(mixed / "mix.yaml"))
    assert len({record.id for record in records}) == len(records) == 9
    assert {record.group for record in records if record.source == "lines"} == {"lines:1"}
    negatives = next(record.negatives for record in records if record.id == "faq:4")
    assert negatives[0][0].startswith("faq:text:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "name: x\nsources: {a: {reader: pairs, path: none.jsonl}}",
            r"sources\.a\.licence: found 'nothing'; this key is required",
        ),
        ("name: x\nsources: {}", r"sources: found \{\}"),
        (
            "name: x\nsources: {a: {reader: pears, path: p, licence: l}}",
            r"sources\.a: source: found 'pears'.*Did you mean 'pairs'",
        ),
        ("name: x\nsources: {a: {reader: mix, path: p, licence: l}}", r"a mix must not hold a mix"),
        (
            "name: x\nsources: {a: {reader: pairs, path: none.jsonl, licence: l}}",
            r"sources\.a: none\.jsonl: found 'no such file'",
        ),
        ("name: x\nsources: {a: {reader: demo, licence: l, split: test}}", r"made of training sources.*`judged`"),
    ],
)
def test_a_mix_names_the_source_at_fault(tmp_path: Path, content: str, message: str):
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        list(reader("mix")(tmp_path / "mix.yaml"))


# ------------------------------------------------------------------------------------------- judged passages as pairs


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    records = [Passage("t", f"p{i}", "en", f"text {i}") for i in range(6)]
    records += [Query("t", "q1", "en", "first", "g1"), Query("t", "q2", "en", "second", "q2")]
    scores = {("q1", "p0"): 2, ("q1", "p1"): 0, ("q1", "p2"): 0, ("q1", "p3"): 1, ("q2", "p4"): 1, ("q2", "p5"): -1}
    records += [Judgment("t", query, passage, score) for (query, passage), score in scores.items()]
    write_retrieval(records, tmp_path / "set", {"name": "test"})
    return tmp_path / "set"


def test_judged_passages_become_pairs_with_their_judged_negatives(judged: Path):
    rows = list(again.read_judged(judged, negatives=1))
    assert [(row.id, row.group, row.pid, row.query, row.passage) for row in rows] == [
        ("q1:p0", "g1", "p0", "first", "text 0"),
        ("q1:p3", "g1", "p3", "first", "text 3"),
        ("q2:p4", "q2", "p4", "second", "text 4"),
    ]
    assert [row.negatives for row in rows] == [(("p1", "text 1"),), (("p1", "text 1"),), (("p5", "text 5"),)]
    assert all(row.negatives == () for row in again.read_judged(judged))
    assert [row.id for row in again.read_judged(judged, min_score=2)] == ["q1:p0"]


def test_a_set_without_high_judgments_is_refused(judged: Path):
    with pytest.raises(DataError, match="no judgment of 9 or more"):
        list(again.read_judged(judged, min_score=9))


def retrieval_set(folder: Path, **manifest: object) -> Path:
    records = [Passage("t", "p", "en", "text"), Query("t", "q", "en", "first", "q"), Judgment("t", "q", "p", 1)]
    write_retrieval(records, folder, {"name": "test"})
    stated = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(stated | manifest))
    return folder


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            {"evaluation": "xquad_r", "source": {"name": "xquad_r"}},
            "found 'the evaluation set xquad_r, no split named'; its questions are held out: only a training split",
        ),
        ({"evaluation": "miracl", "source": {"name": "miracl", "split": "dev"}}, "the evaluation set miracl, split 'dev'"),
        ({"evaluation": None, "source": {"name": "held_out"}}, "a development set is held out of a training set"),
    ],
)
@pytest.mark.parametrize("within", ["judged", "mix"])
def test_what_is_held_out_must_not_become_training_rows(tmp_path: Path, capsys, manifest: dict, message: str, within: str):
    folder = retrieval_set(tmp_path / "set", **manifest)
    (tmp_path / "mix.yaml").write_text(f"name: x\nsources: {{a: {{reader: judged, path: {folder}, licence: l}}}}")
    path = folder if within == "judged" else tmp_path / "mix.yaml"
    assert main([within, "--path", str(path), "--out", str(tmp_path / "train")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(folder) in said
    assert not (tmp_path / "train").exists()
    with pytest.raises(ConfigError, match="held out"):
        list(again.read_judged(folder))


@pytest.mark.parametrize("within", ["judged", "mix"])
@pytest.mark.parametrize(
    ("manifest", "contains", "flagged"),
    [
        (
            {"evaluation": "mr_tydi", "source": {"name": "mr_tydi", "split": "train"}},
            ["mr_tydi", "tydiqa"],
            ("mr_tydi", "tydiqa"),
        ),
        ({"evaluation": None, "in_domain_of": ["x-law"], "source": {"name": "beir"}}, ["x-law"], ("x-law",)),
    ],
)
def test_training_on_a_sets_own_split_makes_it_in_domain(tmp_path: Path, manifest: dict, contains, flagged, within: str):
    """Nobody says --contains; the manifest of the judged set does."""
    manifest = {"in_domain_of": list(IN_DOMAIN_OF["mr_tydi"]), **manifest}
    folder = retrieval_set(tmp_path / "set", **manifest)
    (tmp_path / "mix.yaml").write_text(f"name: x\nsources: {{a: {{reader: judged, path: {folder}, licence: l}}}}")
    path = folder if within == "judged" else tmp_path / "mix.yaml"
    assert main([within, "--path", str(path), "--out", str(tmp_path / "train")]) == 0
    training = Pairs(tmp_path / "train").manifest
    assert training["contains"] == contains
    assert in_domain(training, RetrievalSet(folder).manifest) == InDomain(True, flagged)


def test_each_known_set_has_a_source_of_its_own():
    own = {name: own_source(name) for name in IN_DOMAIN_OF}
    assert {name: source for name, source in own.items() if source != name.removeprefix("beir/")} == {
        "beir/climate-fever": "climate_fever",
        "beir/dbpedia-entity": "dbpedia_entity",
        "beir/trec-covid": "trec_covid",
        "beir/webis-touche2020": "touche",
        "mlqa_r": "mlqa",
        "xquad_r": "xquad",
    }


def test_messages_say_what_is_held_out(tmp_path: Path, capsys):
    for source, what in (
        (["xquad_r", "--path", str(tmp_path)], "xquad_r gives a retrieval set"),
        (["demo", "--split", "test"], "demo gives the test questions of the demo"),
        (["held_out", "--path", str(tmp_path)], "held_out gives a development set"),
    ):
        assert main([*source, "--out", str(tmp_path / "out"), "--contains", "squad"]) == 2
        rule = "which is held out for evaluation and must never be training data"
        assert capsys.readouterr().err == f"--contains: found 'squad'; {what}, {rule}. Leave it out.\n"


# ------------------------------------------------------------------------------------------------- held out families


def test_training_and_development_share_nothing(tmp_path: Path):
    """Questions in three languages, some of which share a passage: what is held out is whole, and nothing of it is left."""
    rows = [(f"g{q}", f"p{q // 2}:{lang}", lang, lang) for q in range(40) for lang in ("en", "de", "zh")]
    whole = pairs_from(rows, tmp_path / "all", negatives=1)
    kept = list(again.read_held_in(tmp_path / "all", families=5, seed=3))
    held = list(again.read_held_out(tmp_path / "all", families=5, seed=3))
    assert len(set(whole.family.tolist())) == 20
    queries = [record for record in held if isinstance(record, Query)]
    passages = [record for record in held if isinstance(record, Passage)]
    assert (len(kept), len(queries), len(passages)) == (90, 30, 15)
    assert {row.id for row in kept} | {record.id for record in queries} == set(whole.queries.column("id"))
    assert not {row.passage for row in kept} & {record.text for record in passages}
    assert all(isinstance(row, Pair) and len(row.negatives) == 1 for row in kept)
    relevant = {(record.query, record.passage) for record in held if isinstance(record, Judgment)}
    assert len(relevant) == 30 * 3, "one passage in each of three languages"
    two = list(again.read_held_out(tmp_path / "all", families=5, seed=3, languages=("de", "en")))
    gone = {record.id for record in (*queries, *passages) if record.lang == "zh"}
    names = [{each.query, each.passage} if isinstance(each, Judgment) else {each.id} for each in held]  # type: ignore[union-attr]
    assert two == [each for each, name in zip(held, names, strict=True) if not name & gone], "a language is left out, no more"


def test_the_same_seed_holds_out_the_same_families(tmp_path: Path):
    pairs = parallel(tmp_path / "all")
    first, again_, other = (again.held_out_families(pairs, 10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again_)
    assert not np.array_equal(first, other)
    with pytest.raises(DataError, match=r"families: found 61; at least one family and at most half of the 120"):
        again.held_out_families(pairs, 61, 0)


def test_development_sets_are_made_by_the_command(tmp_path: Path, mixed: Path):
    assert main(["mix", "--path", str(mixed / "mix.yaml"), "--out", str(mixed / "all")]) == 0
    option = ["--path", str(mixed / "all"), "--option", "families=1"]
    assert main(["held_in", *option, "--out", str(mixed / "train")]) == 0
    assert main(["held_out", *option, "--out", str(mixed / "dev")]) == 0
    train, dev = Pairs(mixed / "train"), RetrievalSet(mixed / "dev")
    assert train.source_names == ["faq", "lines"]
    assert train.manifest["contains"] == ["mfaq"], "as the whole set states it"
    assert train.manifest["mix"]["name"] == "two"
    assert len(train) + len(dev.queries) == 9
    assert "retrieval" in summarize(mixed / "dev")


def test_the_standard_mix_is_valid_and_says_what_it_makes_in_domain():
    standard = mix.load_mix(ROOT / "launch" / "configs" / "mix_standard.yaml")
    for source in standard.sources.values():
        assert options(source.reader, source.arguments())
    training = {"contains": standard.contains}
    verdicts = {name: in_domain(training, name).verdict for name in ("beir/msmarco", "miracl", "mr_tydi", "xquad_r", "nq")}
    assert verdicts == {"beir/msmarco": True, "miracl": True, "mr_tydi": True, "xquad_r": False, "nq": False}
