import errno
import itertools
import os
import re
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hybrid_scale.pages.names import spread_apart
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import Plan, plan_study
from hybrid_scale.study.report.page import render, report
from hybrid_scale.study.report.plots import looks
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.findings import Finding, findings
from hybrid_scale.study.results.scores import Arm, Score, arms
from launch import study as study_door
from tests.study.fabricate import SCORES, fabricated, start, write_study

VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
PARTS = ["comparisons", "size", "predictions", "cost", "figures", "runs", "method", "provenance"]
"""The details below the first screen, in their order."""


class Page(HTMLParser):
    """Checks nesting while it reads; keeps ids, addresses and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.sections: list[str] = []
        self.parts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.sections += [given.get("id") or ""] if tag == "section" else []
        self.parts += [given.get("id") or ""] if given.get("class") == "part" else []
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def page(plan: Plan) -> Page:
    return Page(render(plan, collect(plan)))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    plan = fabricated(tmp_path)
    path = report(plan)
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert path == tmp_path / "out" / "report.html"
    assert found.sections == ["first", "scores"]
    assert found.parts == PARTS
    assert len(found.ids) == len(set(found.ids))
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.ids)
    assert not re.search(r"url\((?!#)|@import|https?://", html)
    assert html.count("<script") == 1
    assert "default-src 'none'" in html
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(found.ids)
    assert html.count("<svg") == 14  # trade-off, two fronts, two over the steps, two matrices for each of four arms, loss
    assert html.count("</desc>") == 14


def test_data_behind_a_figure_can_be_downloaded(tmp_path: Path) -> None:
    tables = [urllib.parse.unquote(a) for a in page(fabricated(tmp_path)).addresses if a.startswith("data:text/csv")]
    trade_off = next(table for table in tables if "arm,alpha,mono_map,mono_low" in table)
    assert re.search(r",mono,1,0\.792592,.*,0\.674374,", trade_off)  # means of the two seeds


def test_means_and_spread_are_shown(tmp_path: Path) -> None:
    text = squeezed(page(fabricated(tmp_path)).text)
    assert "hybrid 2 of 2 0.7985 ± 0.0011" in text
    assert "untrained base – 0.3085" in text  # the mean over the arms' evaluations before step 1


def test_one_seed_is_said_plainly(tmp_path: Path) -> None:
    text = squeezed(page(fabricated(tmp_path, seeds=[0])).text)
    assert "One seed. How much these results vary" in text
    assert "One seed only: the variance isn't known" in text
    assert "± 0" not in text


def test_failed_runs_are_shown_and_text_is_escaped(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, {"mono": SCORES["mono"]})
    directory = start(plan.runs[2], 5)
    directory.set_status("failed", reason="<script>alert('x')</script> & more")
    write_json(directory.manifest_file, {"command": "<b>bold</b>", "hosts": ["n1", "n2"]})
    html = render(plan, collect(plan))
    assert "<script>alert" not in html
    assert "<b>bold</b>" not in html
    text = squeezed(Page(html).text)
    assert "6 of 8 runs are not finished, not whole or not as planned." in text
    assert "cross.seed-0: failed at step 5 of 20. <script>alert('x')</script> & more" in text
    assert "0 of 2" in text
    assert "not judged" in text


def test_a_study_that_hasnt_begun_has_a_page(tmp_path: Path) -> None:
    found = page(plan_study(write_study(tmp_path)))
    assert (found.sections, found.parts) == (["first"], PARTS)
    assert "Nothing can be answered yet: no two arms of the question have been scored on one set." in found.text
    assert "no arm was measured" in found.text.lower()


def test_a_run_without_a_final_evaluation_is_no_error(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, seeds=[0])
    for run in plan.runs:
        RunDirectory(run.directory).evaluation_file("xquad_r").unlink()
    assert "0 of 1" in page(plan).text


def test_a_task_in_one_language_is_shown_but_not_judged(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, seeds=[0])
    for run in plan.runs:
        measured = {"task": "nq", "step": 20, "languages": ["en"], "metrics": {"ndcg@10": 0.4, "mono_map": None}}
        measured["map_matrix"] = {"query_languages": ["en"], "passage_languages": ["en"], "values": [[0.4]]}
        write_json(RunDirectory(run.directory).evaluation_file("nq"), measured)
    html = render(plan, collect(plan))
    text = squeezed(Page(html).text)
    assert "nq: mAP by query and passage language" not in text
    assert "nDCG@10" in text
    assert "nq: no query has a relevant passage in another language." in text


def test_measures_that_arent_known_here_are_shown_all_the_same(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, seeds=[0])
    for run in plan.runs:
        measured = {"task": "odd", "step": 20, "metrics": {"precision@7": 0.25}}
        write_json(RunDirectory(run.directory).evaluation_file("odd"), measured)
    assert "precision@7" in page(plan).text


def test_missing_single_queries_are_said_and_the_means_are_shown(tmp_path: Path) -> None:
    text = squeezed(page(fabricated(tmp_path)).text)
    assert "On xquad_r, hybrid differs from mono by +0.0316 in cross mAP" in text
    assert "No table of single queries for hybrid.seed-0, mono.seed-0" in text
    assert "6 of 6 claims not judged" in text
    assert "0 paired comparisons" in text


def made(scores: dict[str, dict[str, float]], *others: dict[str, dict[str, float]]) -> list[Arm]:
    """Arms named after their kind; each mapping is one seed."""
    every = (scores, *others)
    return [
        Arm(kind, kind, "", len(every), {m: Score({seed: one[kind][m] for seed, one in enumerate(every)}) for m in scores[kind]})
        for kind in scores
    ]


def changed(kind: str, **values: float) -> dict[str, dict[str, float]]:
    return {**SCORES, kind: {**SCORES[kind], **values}}


def verdicts(found: list[Finding]) -> list[str]:
    return [finding.verdict for finding in found]


def test_all_predictions_hold() -> None:
    found = findings(made(SCORES))
    assert verdicts(found) == ["holds"] * 4
    assert found[0].numbers == (
        "multi mAP: mixed 0.2310 against mono 0.5479, cross 0.5934, hybrid 0.5927. The nearest rival is 0.3169 away."
    )
    assert "multi mAP 0.5927: within (mono 0.5479, cross 0.5934)" in found[3].numbers
    assert "rank distance 286.6: better than both (mono 410.2, cross 295.4)" in found[3].numbers


@pytest.mark.parametrize(
    ("scores", "position", "said"),
    [
        (
            changed("mixed", multi_map=0.56),
            0,
            "mixed 0.5600 against mono 0.5479, cross 0.5934, hybrid 0.5927. The nearest rival is 0.0121",
        ),
        (changed("mixed", rank_distance=400.0), 1, "The nearest rival is 10.2 on the wrong side."),
        (changed("mono", cross_map=0.71), 2, "cross mAP: cross 0.6997 against mono 0.7100, mixed 0.5105."),
        (changed("cross", cross_map=0.6737), 2, "on the wrong side"),
        (changed("hybrid", mono_map=0.75), 3, "mono mAP 0.7500: worse than both (mono 0.7918, cross 0.7554)"),
        (changed("hybrid", rank_distance=500.0), 3, "rank distance 500.0: worse than both"),
    ],
)
def test_a_prediction_that_doesnt_hold_is_said(scores: dict[str, dict[str, float]], position: int, said: str) -> None:
    found = findings(made(scores))
    assert [n for n, verdict in enumerate(verdicts(found)) if verdict == "does not hold"] == [position]
    assert said in found[position].numbers


def test_missing_arms_are_not_judged() -> None:
    found = findings(made({kind: SCORES[kind] for kind in ("mono", "cross")}))
    assert verdicts(found) == ["not judged"] * 4
    assert found[2].numbers == "No finished run of: mixed. Measured cross mAP: cross 0.6997, mono 0.6737."
    assert found[3].numbers.startswith("No finished run of: hybrid. Measured mono mAP: mono 0.7918, cross 0.7554.")


def test_seeds_that_disagree_are_counted() -> None:
    found = findings(made(changed("mono", cross_map=0.69), changed("mono", cross_map=0.705), SCORES))
    assert found[2].verdict == "holds"
    assert "True in 2 of 3 shared seeds taken singly." in found[2].caution
    assert "cross mAP 0.0313. The gap is smaller than that range." in found[2].caution


def test_unequal_seeds_are_said(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, seeds=[0, 1, 2])
    RunDirectory(plan.runs[0].directory).set_status("failed", reason="x")
    assert "Not every arm has finished the same seeds." in findings(arms(collect(plan), "xquad_r"))[0].caution


def test_labels_leave_each_other_room() -> None:
    placed = spread_apart([0.5, 0.5, 0.51, 0.9], 0.1)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert placed[3] == pytest.approx(0.9, abs=0.05)


def test_arms_keep_distinct_looks() -> None:
    given = looks([f"arm-{n}" for n in range(64)])
    assert len({(look.colour, look.marker) for look in given.values()}) == 64


def test_a_folder_that_cant_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = fabricated(tmp_path, {"mono": SCORES["mono"]}, seeds=[0])

    def read_only(*paths: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(paths[0]))

    monkeypatch.setattr("os.replace", read_only)
    monkeypatch.setattr("sys.argv", ["study.py", "report", plan.source])
    assert study_door.main() == 2
    assert re.search(r"study\.csv.*: Read-only file system", capsys.readouterr().err)
