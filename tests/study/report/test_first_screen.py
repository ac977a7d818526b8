"""The report of a study whose truth is known: its first sentence, figure and tables say exactly that truth."""

import html as entities
import io
import re
import urllib.parse
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybrid_scale.pages.page import MOST_BYTES
from hybrid_scale.runs import RunDirectory, read_json, write_json
from hybrid_scale.study.report.page import Judged, render
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.scaling import laws
from hybrid_scale.study.results.trends import trends
from tests.study.fabricate import FAMILY, SCORES, TRUE_GAINS, Known, fabricated, true_level
from tests.study.report.browser import Browser
from tests.study.report.test_page import CUT_OFF, OVERLAPS

WORDS = {0: "equivalent", 1: "better", -1: "worse"}
NUMBER = r"[-+]\d\.\d{4}"
BASELINES = {
    "bm25": ("BM25", {"xquad_r": {"mono_map": 0.81, "cross_map": 0.02, "multi_map": 0.05}, "nq": {"ndcg@10": 0.31}}),
    "me5": ("multilingual-e5-small", {"xquad_r": {"mono_map": 0.70, "cross_map": 0.60, "multi_map": 0.5}}),
    "me5-lm": ("multilingual-e5-small, language_mean", {"xquad_r": {"mono_map": 0.71, "cross_map": 0.62, "multi_map": 0.6}}),
}


class Tables(HTMLParser):
    """Rows of every table by its id, each cell's words; and all words in their order."""

    def __init__(self, html: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.table, self.inside, self.hidden, self.words = "", False, 0, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("style", "script", "svg")
        if tag == "table":
            self.table = dict(attrs).get("id") or ""
            self.tables[self.table] = []
        elif tag == "tr":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.tables[self.table][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("style", "script", "svg")
        self.words += " "
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        self.words += data
        if self.inside:
            cell = self.tables[self.table][-1]
            cell[-1] = " ".join((cell[-1] + " " + data).split())


@dataclass(frozen=True)
class Seen:
    file: Path
    html: str
    tables: dict[str, list[list[str]]]
    words: str

    def csv(self, start: str) -> pd.DataFrame:
        """The table behind the first link whose heads begin so."""
        links = map(urllib.parse.unquote, map(entities.unescape, re.findall(r'href="(data:text/csv[^"]+)"', self.html)))
        content = next(link for link in links if link.startswith(f"data:text/csv;charset=utf-8,{start}"))
        return pd.read_csv(io.StringIO(content.partition(",")[2]))


def seen(known: Known, folder: Path) -> Seen:
    judged = Judged(known.claims, known.comparisons, trends(known.comparisons), laws(known.collected), [])
    html = render(known.plan, known.collected, judged)
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    found = Tables(html)
    return Seen(file, html, found.tables, " ".join(found.words.split()))


def baseline(known: Known, folder: str, name: str, task: str, metrics: dict[str, float], fingerprint: str = "f00d") -> None:
    file = known.plan.directory / "baselines" / folder / "eval" / f"{task}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"task": task, "metrics": metrics, "baseline": {"name": name}, "fingerprint": fingerprint})


@pytest.fixture(scope="module")
def page(known: Known, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """With baselines, NQ in-domain."""
    for folder, (name, by_task) in BASELINES.items():
        for task, metrics in by_task.items():
            baseline(known, folder, name, task, metrics)
    baseline(known, "other", "of another version", "nq", {"ndcg@10": 0.99}, "beef")
    file = RunDirectory(known.plan.runs[0].directory).evaluation_file("nq")
    write_json(file, read_json(file) | {"in_domain": {"verdict": True, "sources": ["nq"]}})
    return seen(known, tmp_path_factory.mktemp("page"))


def verdict(gain: float) -> str:
    return WORDS[int(np.sign(gain))]


def test_the_first_sentence_is_the_truth(page: Seen) -> None:
    said = re.search(r"At 72b on xquad_r, hybrid-0\.5 is .*?\)\.", page.words)
    assert said is not None
    assert len(said[0].split()) <= 40
    asked = [("cross_map", "mono"), ("mono_map", "mono"), ("mono_map", "cross")]
    stands, changes = said[0].split("; change from 7b: ")
    found = re.findall(rf"(better|worse|equivalent)(?: than| to)?( mono| cross)? in (mono|cross) mAP \(({NUMBER})\)", stands)
    moved = re.findall(rf"({NUMBER}) \((better|worse|equivalent)\)", changes)
    assert (len(found), len(moved)) == (len(asked), len(asked))
    assert [rival.strip() for _, rival, _, _ in found] == ["mono", "", "cross"]
    for (outcome, _, metric, large), (change, turn), (key, rival) in zip(found, moved, asked, strict=True):
        at_7b, at_72b = TRUE_GAINS["xquad_r", key, rival]
        assert (outcome, f"{metric}_map", turn) == (verdict(at_72b), key, verdict(at_72b - at_7b))
        assert float(large) == pytest.approx(at_72b, abs=0.003)
        assert float(change) == pytest.approx(at_72b - at_7b, abs=0.004)


def test_every_verdict_stands_beside_its_metric(page: Seen) -> None:
    heads, *rows = page.tables["verdicts"]
    assert len(heads) == 5
    named = [row[0] for row in rows]
    assert named == ["mono mAP xquad_r", "cross mAP xquad_r", "multi mAP xquad_r", "nDCG@10 nq, in-domain"]
    keys = [("xquad_r", "mono_map"), ("xquad_r", "cross_map"), ("xquad_r", "multi_map"), ("nq", "ndcg@10")]
    for row, key in zip(rows, keys, strict=True):
        for column, rival in ((1, "mono"), (3, "cross")):
            small, large = TRUE_GAINS[(*key, rival)]
            assert verdict(large) in row[column]
            assert verdict(large - small) in row[column + 1]
            assert float(row[column].split()[0]) == pytest.approx(large, abs=0.004)
            assert ("\N{DAGGER}" in row[column]) == (key[0] == "nq")


def test_the_figure_is_one_curve_over_alpha_for_each_size(page: Seen) -> None:
    points = page.csv("model,parameters,group,arm,alpha,mono_map")
    of_arms = points[points["model"].notna()]
    assert list(dict.fromkeys(of_arms["model"])) == [name.lower() for name in FAMILY]
    for model, rows in of_arms.groupby("model"):
        curve = rows.dropna(subset="alpha").sort_values("alpha")
        assert curve["alpha"].tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert curve["arm"].tolist() == ["cross", "hybrid-0.25", "hybrid-0.5", "hybrid-0.75", "mono"]
        for row in rows.to_dict("records"):
            for key in ("mono", "cross"):
                truth = true_level("xquad_r", f"{key}_map", row["arm"], float(str(model).rstrip("b")))
                assert row[f"{key}_map"] == pytest.approx(truth, abs=0.004)
                assert row[f"{key}_low"] < row[f"{key}_map"] < row[f"{key}_high"]
            assert row["interval"] == "questions and seeds"
    references = points[points["model"].isna()].set_index("arm")
    assert references.loc["BM25", ["mono_map", "cross_map"]].tolist() == [0.81, 0.02]


def test_what_wasnt_trained_stands_with_the_arms_and_is_said_first_where_it_is_better(page: Seen) -> None:
    rows = {row[0]: row for row in page.tables["scores-first"][1:]}
    assert list(rows) == [
        *("mono", "cross", "hybrid-0.25", "hybrid-0.5", "hybrid-0.75", "mixed"),
        *("BM25", "multilingual-e5-small", "multilingual-e5-small, language_mean"),
    ]
    assert rows["BM25"][2:] == ["0.8100", "0.0200", "0.0500", "0.3100 \N{DAGGER}"]
    assert rows["multilingual-e5-small"][-1] == "\N{EN DASH}"
    below = page.words.index("Below BM25 in 6 of 24 scores: hybrid-0.5 at 72b, mono mAP on xquad_r (0.7")
    assert below < page.words.index("At 72b on xquad_r")
    assert "Below multilingual-e5-small in 2 of 18 scores: mixed at 72b" in page.words
    assert "nq is in-domain: trained on nq." in page.words
    assert "nq.json is of another version of nq and doesn't count" in page.words
    assert "of another version" not in rows


def test_each_metric_and_verdict_is_explained_before_the_details(page: Seen) -> None:
    before = page.words[: page.words.index("Every comparison")]
    for word in ("mono mAP : mean average", "cross mAP : mAP of", "multi mAP mAP of", "nDCG@10 Gain", "equivalent Shown to be"):
        assert word in before, word
    assert before.count("claims not judged") == 0


def test_the_page_stays_small(page: Seen) -> None:
    assert len(page.html.encode()) < MOST_BYTES


def test_unequal_negatives_are_said_before_the_first_number(tmp_path: Path) -> None:
    caution = "Arms differ in the number of negatives that a row meets."
    rule = {"says": "Mixed pools destroy it.", "metrics": ["xquad_r:multi_map"], "worst_first": ["mixed", ["mono", "cross"]]}
    plan = fabricated(tmp_path, seeds=[0], predictions=[rule])
    words = " ".join(Tables(render(replace(plan, caution=caution), collect(plan))).words.split())
    name = "Study report: ladder "
    assert words.index(caution) == words.index(name) + len(name)
    assert "Of 1 prediction that was written down before the runs: not judged 1." in words
    assert "What earlier work predicts" not in words, "the study's own stand in its place"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_first_screen_holds_its_verdicts(page: Seen, browser: Browser, width: int) -> None:
    browser.open(page.file, width)
    assert browser.ask(CUT_OFF) == []
    assert browser.ask(OVERLAPS) == []
    assert browser.ask("document.documentElement.scrollWidth") <= width
    boxes = browser.ask(
        "[...document.querySelectorAll('#verdicts .badge')].map(e => e.getBoundingClientRect())"
        ".map(b => [b.left, b.right, b.top])"
    )
    assert len(boxes) == 16
    assert all(left >= 0 and right <= width for left, right, _ in boxes)
    if width == 1280:
        assert max(top for _, _, top in boxes) < 900
    else:  # one metric with its four verdicts on one screen
        tall = browser.ask("document.querySelector('#verdicts tbody tr').getBoundingClientRect().height")
        assert tall < 400


def test_one_size_and_one_alpha_are_a_figure_and_a_sentence(tmp_path: Path) -> None:
    plan = fabricated(tmp_path, SCORES, seeds=[0])
    html = render(plan, collect(plan))
    words = " ".join(Tables(html).words.split())
    assert "On xquad_r, hybrid differs from mono by +0.0316 in cross mAP" in words
    assert ": not judged" in words
    assert "One curve over alpha, the share of monolingual batches: cross (0), hybrid (0.5), mono (1)." in words
    assert "Marks without bars have no table of single queries." in words
