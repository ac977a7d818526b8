"""The index-compression page on made-up studies: each sentence says what the numbers are."""

import csv
import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from hybrid_scale.pages.page import MOST_BYTES
from hybrid_scale.retrieval.tradeoff import report
from hybrid_scale.retrieval.tradeoff.findings import counted, finding
from hybrid_scale.retrieval.tradeoff.run import verdict

EXACT = 0.7321


def point(name: str, size: float, milliseconds: float, difference: float, said: str, place: str = "front") -> dict[str, Any]:
    quality = {"value": EXACT + difference, "difference": difference, "low": difference - 0.001, "high": difference + 0.0015}
    quality |= {
        "interval": "bca",
        "p": 0.01,
        "p_holm": 0.02,
        "tost_p": 0.03,
        "tost_p_holm": 0.04,
        "verdict": said,
        "pareto": place,
    }
    return {
        "name": name,
        "recall@100": 0.98,
        "quality": {"ndcg@10": quality},
        "bytes": {"measured": size, "formula": size},
        "build": {"cpu_seconds": 1.0, "wall_seconds": 1.0},
        "query": {"cpu_ms": milliseconds, "wall_ms": milliseconds},
    }


def result(*points: dict[str, Any], exact: float = EXACT, refused: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "task": "xquad_r",
        "passages": 13014,
        "dimensions": 1024,
        "queries": 13090,
        "questions": 1190,
        "options": {"k": 100, "margin": 0.002, "level": 0.95, "threads": 1},
        "certified": {"ndcg@10": exact},
        "points": list(points),
        "refused": refused or {},
    }


FLAT = point("flat:fp32", 4096, 0.08, 0.0, "equivalent")


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            (FLAT, point("sq:8", 1024, 0.9, -0.0001, "equivalent"), point("pq:64", 64, 0.12, -0.05, "worse")),
            "On xquad_r sq:8 is the smallest index that keeps the exact list's nDCG@10: 0.7320 against 0.7321, a difference of "
            "-0.0001 [-0.0011, +0.0014] within \N{PLUS-MINUS SIGN}0.002, with 1,024 bytes a vector, 4.0 times "
            "fewer than float32's 4,096, and 0.900 ms of CPU a query, 11 times that of flat:fp32.",
        ),
        (
            (point("binary", 128, 0.01, -0.06, "worse"), point("rabitq", 136, 0.02, -0.004, "not shown")),
            "On xquad_r no index that takes fewer bytes than float32 vectors is shown to keep the exact list's "
            "nDCG@10 of 0.7321 within \N{PLUS-MINUS SIGN}0.002; the nearest, rabitq, differs by -0.0040 [-0.0050, "
            "-0.0025] with 136 bytes a vector, 30.1 times fewer than float32's 4,096, and 0.020 ms of CPU a query.",
        ),
        (
            (FLAT, point("hnsw:32", 4352, 0.01, -0.001, "equivalent")),
            "On xquad_r no index under study takes fewer bytes than float32 vectors, so nothing is said of compression.",
        ),
        ((), "On xquad_r no index could be studied here: each is listed below with its reason."),
    ],
)
def test_the_first_sentence_says_what_is_so(points: tuple[dict[str, Any], ...], said: str) -> None:
    assert finding(result(*points), "ndcg@10") == said


def test_a_margin_that_is_most_of_the_score_judges_nothing() -> None:
    said = finding(result(point("sq:8", 1024, 0.9, -0.0002, "not judged"), exact=0.0039), "ndcg@10")
    assert "nDCG@10 is 0.0039: too low for a margin of \N{PLUS-MINUS SIGN}0.002, which is 51% of that score" in said


@pytest.mark.parametrize(
    ("value", "difference", "p", "tost_p", "said"),
    [
        (0.73, -0.0005, 0.0001, 0.001, "equivalent"),  # certainly different, and certainly by less than the margin
        (0.70, -0.03, 0.0001, 1.0, "worse"),
        (0.76, 0.03, 0.0001, 1.0, "better"),
        (0.73, -0.003, 0.2, 0.7, "not shown"),
        (0.0041, 0.0002, 0.5, 0.001, "not judged"),  # the margin is half of the score
        (0.0, 0.0, 1.0, 0.0, "not judged"),
    ],
)
def test_each_verdict_has_one_meaning(value: float, difference: float, p: float, tost_p: float, said: str) -> None:
    assert verdict({"value": value, "difference": difference, "p_holm": p, "tost_p_holm": tost_p}, 0.002) == said


def test_verdicts_are_counted() -> None:
    whole = result(FLAT, point("sq:8", 1024, 0.9, 0, "equivalent"), point("pq:64", 64, 0.1, -0.05, "worse"))
    assert counted(whole, "ndcg@10") == "nDCG@10 of 3 indexes against the exact list: 2 equivalent, 1 worse"


class Text(HTMLParser):
    """The words of a page in their order, and its addresses."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.addresses, self.open = "", list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass
        self.words += " "

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "svg"} & set(self.open):
            self.words += data


def test_the_page_opens_with_the_finding_and_is_one_file() -> None:
    worse = point("pq:64", 64, 0.12, -0.05, "worse", "behind")
    html = report.as_page(result(FLAT, point("<sq>", 1024, 0.9, 0, "equivalent"), worse, refused={"gpu-flat": "no GPU is here"}))
    page = Text(html)
    words = re.sub(r"\s+", " ", page.words)
    sentence, table = words.index("&lt;sq&gt;") if "&lt;sq&gt;" in words else words.index("<sq>"), words.index("0.6821 worse")
    assert sentence < words.index("nDCG@10: gain of the relevant") < table < words.index("gpu-flat: No GPU is here.")
    assert "<sq>" not in html
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert len(html) < MOST_BYTES
    assert html.count("<svg") == 2


def test_an_empty_study_has_a_page() -> None:
    page = report.as_page(result(refused={"gpu-flat": "no GPU is here"}))
    assert "no index could be studied here" in page
    assert "<svg" not in page


def test_the_csv_holds_the_verdict() -> None:
    (row,) = csv.DictReader(io.StringIO(report.as_csv(result(FLAT))))
    assert (row["set"], row["metric"], row["verdict"], row["tost_p_holm"]) == ("xquad_r", "ndcg@10", "equivalent", "0.04")
