"""Decontamination against hand-worked overlaps and a brute-force count of shared runs."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_scale.data.decontaminate import RUN, Evaluation, find, normalised, open_evaluations, runs, without, words
from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Judgment, Pair, Passage, Query
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.errors import ConfigError
from launch.prepare import main

TWENTY = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen alpha beta gamma delta"
THAI = "ประเทศไทยเป็นประเทศในเอเชียตะวันออกเฉียงใต้"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    folder = tmp_path_factory.mktemp("sets") / "quiz"
    texts = {"long": TWENTY, "short": "Mount Everest is high", "thai": THAI, "unjudged": "a b c d e f g h i j k l m n"}
    records = [Passage("t", name, "en", text) for name, text in texts.items()]
    records += [Query("t", "q", "en", "Who wrote “Faust”?", "q"), Query("t", "fold", "de", "STRASSE  in\nBerlin", "fold")]
    records += [Judgment("t", "q", "long", 1), Judgment("t", "fold", "short", 1), Judgment("t", "fold", "thai", 1)]
    write_retrieval(records, folder, {"name": "test"})
    return Evaluation(RetrievalSet(folder), "all")


def verdict(evaluation: Evaluation, query: str = "something else", passage: str = "nothing of the kind") -> tuple | None:
    match = evaluation.match(normalised(query), runs(passage))
    return match and (match.rule, match.matched, match.share)


@pytest.mark.parametrize("query", ["Who wrote “Faust”?", "who wrote faust", "  WHO — wrote:  'FAUST'!", "Straße in Berlin"])
def test_a_query_is_found_however_it_is_written(evaluation, query):
    assert verdict(evaluation, query=query)[0] == "query"


@pytest.mark.parametrize("query", ["Who wrote Faust II?", "wrote faust", "Straßen in Berlin", "?!"])
def test_another_query_is_not(evaluation, query):
    assert verdict(evaluation, query=query) is None


def test_a_passage_with_most_of_its_runs_in_one_passage_is_found(evaluation):
    """16 words of the twenty give 9 runs. Behind 8 other words: 17 runs, 9 shared; behind 9 others: 18 runs, 9 shared."""
    shared = " ".join(TWENTY.split()[:16])
    others = [f"other{i}" for i in range(9)]
    assert verdict(evaluation, passage=f"{' '.join(others[:8])} {shared}") == ("passage", "long", pytest.approx(9 / 17))
    assert verdict(evaluation, passage=f"{' '.join(others)} {shared}") is None, "exactly half is not most"
    assert verdict(evaluation, passage=shared) == ("passage", "long", 1.0)


def test_short_passages_must_be_equal(evaluation):
    assert verdict(evaluation, passage="mount everest is HIGH.") == ("passage", "short", 1.0)
    assert verdict(evaluation, passage="Mount Everest is very high") is None
    assert verdict(evaluation, passage="is high") is None
    assert verdict(evaluation, passage="!!!") is None


def test_scripts_without_spaces_are_taken_sign_by_sign(evaluation):
    assert words("東京は2024年") == ["東", "京", "は", "2024", "年"]
    assert words("हिन्दी किताब") == ["हिन्दी", "किताब"]
    assert verdict(evaluation, passage=f"นี่คือ{THAI}") is not None
    assert verdict(evaluation, passage="ภาษาไทยเป็นภาษาราชการของประเทศนั้นและใช้กันมาก") is None


def test_relevant_alone_leaves_other_passages_of_the_corpus(evaluation):
    relevant = open_evaluations([f"{evaluation.task.directory}:relevant"])[0]
    copied = "a b c d e f g h i j k l m n"
    assert verdict(evaluation, passage=copied) == ("passage", "unjudged", 1.0)
    assert verdict(relevant, passage=copied) is None
    assert relevant.facts()["against"] == "the 3 relevant of 4 passages"


@given(st.lists(st.sampled_from("abcde"), max_size=40), st.lists(st.sampled_from("abcde"), max_size=40))
def test_shared_runs_are_those_of_a_brute_count(one, other):
    def brute(tokens: list[str]) -> set[tuple[str, ...]]:
        if len(tokens) < RUN:
            return {tuple(tokens)} if tokens else set()
        return {tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)}

    found = [set(runs(" ".join(tokens)).tolist()) for tokens in (one, other)]
    assert len(found[0] & found[1]) == len(brute(one) & brute(other))
    assert len(found[0]) == len(brute(one))


def test_too_large_a_corpus_is_refused_with_the_remedy(evaluation, monkeypatch):
    monkeypatch.setattr("hybrid_scale.data.decontaminate.MOST_RUNS", 5)
    with pytest.raises(ConfigError, match=r"quiz: found '4 passages'; .*Write .*quiz:relevant"):
        open_evaluations([str(evaluation.task.directory)])


def test_translations_of_a_row_go_with_it(evaluation):
    rows = [
        Pair("f:1", "a-de", "a", "a-de", "de", "de", "Wer schrieb den Faust?", "Ganz anderer Text"),
        Pair("f:2", "a-en", "a", "a-en", "en", "en", "Who wrote Faust?", "quite another text"),
        Pair("f:3", "b", "b", "b", "en", "en", "Who wrote Hamlet?", "quite another text again"),
    ]
    groups, report = find(iter(rows), [evaluation])
    assert [row.id for row in without(iter(rows), groups, report)] == ["b"]
    assert [(row["id"], row["rule"], row["matched"]) for row in report.rows] == [("a-de", "query", "q"), ("a-en", "query", "q")]
    assert report.facts()["by_rule"] == {"quiz: query": 2}


def test_the_command_drops_lists_and_states(tmp_path: Path, evaluation, capsys):
    rows = [
        {"id": "1", "query": "Who wrote Faust", "passage": "Goethe", "query_lang": "en"},
        {"id": "2", "query": "What is copied?", "passage": TWENTY, "query_lang": "en"},
        {"id": "3", "query": "What is kept?", "passage": "this one", "query_lang": "en"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["pairs", "--path", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "train")]
    assert main([*given, "--decontaminate", str(evaluation.task.directory)]) == 0
    assert Pairs(tmp_path / "train").queries.column("id") == ["3"]
    said = Pairs(tmp_path / "train").manifest["decontamination"]
    assert said["by_rule"] == {"quiz: passage": 1, "quiz: query": 1}
    assert said["compared"][0]["fingerprint"] == evaluation.task.fingerprint
    listed = [json.loads(line) for line in (tmp_path / "train" / "decontaminated.jsonl").read_text().splitlines()]
    assert [(row["id"], row["matched"]) for row in listed] == [("1", "q"), ("2", "long")]
    assert "rows dropped" in capsys.readouterr().out


@pytest.mark.parametrize("stopped_at", ["report", "rename"])
def test_a_finished_folder_has_its_report(tmp_path: Path, evaluation, monkeypatch, stopped_at: str) -> None:
    """Stopped while its report is written, or at the very renaming that finishes it: nothing is finished or left. What would
    have been renamed was whole."""
    rows = [{"id": n, "query": query, "passage": n, "query_lang": "en"} for n, query in (("1", "Who wrote Faust"), ("2", "else"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, seen, replace = tmp_path / "train", [], os.replace

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def stop_at_renaming(source: Path, target: Path) -> None:
        if Path(target) != out:
            return replace(source, target)
        manifest = json.loads((Path(source) / "manifest.json").read_text())
        listed = (Path(source) / "decontaminated.jsonl").read_text().splitlines()
        seen.append((manifest["decontamination"]["rows_dropped"], len(listed)))
        raise KeyboardInterrupt

    if stopped_at == "report":
        monkeypatch.setattr("launch.prepare.write_text", stop)
    else:
        monkeypatch.setattr("hybrid_scale.data.folder.os.replace", stop_at_renaming)
    given = ["pairs", "--path", str(tmp_path / "rows.jsonl"), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        main([*given, "--decontaminate", str(evaluation.task.directory)])
    assert seen == ([(1, 1)] if stopped_at == "rename" else [])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_retrieval_set_is_not_decontaminated(tmp_path: Path, evaluation, capsys):
    given = ["beir", "--path", str(tmp_path), "--out", str(tmp_path / "out"), "--decontaminate", str(evaluation.task.directory)]
    assert main(given) == 2
    assert "--decontaminate: found 'beir'; only a training set is decontaminated" in capsys.readouterr().err
