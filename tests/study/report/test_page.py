"""The report by its structure, and in a real browser; where none is installed those tests are skipped."""

import re
import urllib.parse
from pathlib import Path

import pandas as pd
import pytest

from hybrid_scale.runs import RunDirectory
from hybrid_scale.study.report.page import report
from hybrid_scale.study.results.scaling import ACROSS_LANGUAGES
from tests.study.fabricate import scaled
from tests.study.report.browser import Browser

BOXES = """[...document.querySelectorAll('svg.plot')].map(plot => {
  const box = plot.getBoundingClientRect();
  const shapes = [...plot.querySelectorAll('path, rect, use, text')].filter(shape => shape.getBoundingClientRect().width > 0);
  return [box.width, box.height, shapes.length, plot.querySelector('title').textContent, plot.querySelector('desc').textContent];
})"""
TABLES = "document.querySelectorAll('table.sortable').length"
FIRST_CELLS = """[...document.querySelectorAll('#{table} tbody tr')].map(row => row.cells[{column}].textContent.trim())"""
CUT_OFF = """[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => [e.getAttribute('aria-label'), e.scrollWidth, e.clientWidth])"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg.plot')].filter(plot => plot.querySelector('text')).map(plot =>
  Math.min(...[...plot.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize)))
  * plot.getBoundingClientRect().width / plot.viewBox.baseVal.width))"""
"""Of the letters in figures, in pixels."""
OVERLAPS = """(() => {
  const texts = [...document.querySelectorAll('#first svg.plot text')];
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([a, one], n) => boxes.slice(n + 1).filter(([b, other]) =>
    Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1.5 &&
    Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 3).map(([b]) => [a, b]));
})()"""
WIDER = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip')
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study over four sizes with a failed run, a broken one, and one that isn't evaluated."""
    plan = scaled(tmp_path_factory.mktemp("page"), models=["0.5B", "1.5B", "7B", "72B"], seeds=[0, 1], questions=6)
    RunDirectory(plan.runs[3].directory).set_status("failed", reason="CUDA out of memory on rank 3")
    (plan.runs[9].directory / "status.json").write_text('{"status": "finished"}', encoding="utf-8")
    RunDirectory(plan.runs[15].directory).evaluation_file("xquad_r").unlink()
    return report(plan)


def test_the_page_is_whole_by_its_structure(page: Path) -> None:
    """What can be said of the page without drawing it."""
    html = page.read_text(encoding="utf-8")
    heads = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", re.sub(r"<details>.*?</details>", "", html, flags=re.S), re.S)
    assert heads
    assert all(head.startswith('<button type="button">') for head in heads)
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", html)
    assert "@media print" in html
    figures = re.findall(r"<svg class=\"plot\".*?</svg>", html, re.S)
    assert len(figures) > 15
    for drawn in figures:
        assert re.search(r"<title id=\"[^\"]+\">[^<]+</title><desc id=\"[^\"]+\">[^<]+</desc>", drawn)
        width, height = map(float, re.findall(r"viewBox=\"0 0 ([\d.]+) ([\d.]+)\"", drawn)[0])
        assert width > 100
        assert height > 50
        assert re.search(r"<path|<rect|<use", drawn)


def test_a_study_over_sizes_has_every_part(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert "Hybrid against cross on xquad_r, 4 pairs of arms over 4 models" in text
    assert "32 paired comparisons" in text
    assert "NVIDIA H100 80GB HBM3" in text
    assert "0.5B.cross.seed-1: failed at step 20 of 20. CUDA out of memory on rank 3." in text
    assert "7B.cross.seed-1: not evaluated on xquad_r." in text
    tables = [urllib.parse.unquote(address) for address in re.findall(r'href="(data:text/csv[^"]+)"', html)]
    for head in (
        "arm,rival,model,parameters,difference",
        "arm,series,parameters,value",
        "claim,task,series,models",
        "model,arm,multi_map,device_hours",
    ):
        assert any(head in table for table in tables), head
    written = pd.read_csv(page.parent / "comparisons.csv")
    assert len(written) == 32
    assert written["p_adjusted"].dropna().between(0, 1).all()
    assert set(pd.read_csv(page.parent / "power_laws.csv")["quantity"]) == {each.label for each in ACROSS_LANGUAGES}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)])
def test_the_page_is_drawn_without_complaint(page: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    boxes = browser.ask(BOXES)
    assert len(boxes) == page.read_text(encoding="utf-8").count('<svg class="plot"')
    for drawn_width, drawn_height, shapes, title, description in boxes:
        assert min(drawn_width, drawn_height) > 40, title
        assert shapes > 5, title
        assert len(title) > 3
        assert len(description) > 10
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(WIDER) == []
    assert browser.ask(CUT_OFF) == []
    assert browser.ask(SMALLEST) > 8
    paper = browser.ask("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark
    assert browser.complaints() == []


def test_tables_sort_by_click_and_by_enter(page: Path, browser: Browser) -> None:
    browser.open(page)

    def column(table: str, number: int) -> list[str]:
        found: list[str] = browser.ask(FIRST_CELLS.replace("{table}", table).replace("{column}", str(number)))
        return found

    def head(table: str, number: int) -> str:
        return f"#{table} thead th:nth-child({number + 1})"

    def direction(table: str, number: int) -> str | None:
        found: str | None = browser.ask(f"document.querySelector('{head(table, number)}').getAttribute('aria-sort')")
        return found

    def differences() -> list[float]:
        return [float(text.split()[0]) for text in column("set-0-compared", 3)]

    browser.ask("location.hash = '#comparisons'")  # opens the details
    before = differences()
    assert direction("set-0-compared", 3) is None
    browser.click(head("set-0-compared", 3) + " button")
    assert direction("set-0-compared", 3) == "ascending"
    assert differences() == sorted(before)
    assert before != sorted(before)
    browser.ask(f"document.querySelector('{head('set-0-compared', 3)} button').focus()")
    browser.press("Enter", 13)
    assert direction("set-0-compared", 3) == "descending"
    assert differences() == sorted(before, reverse=True)
    browser.click(head("set-0-compared", 1) + " button")  # sorted by parameters, not by name
    assert direction("set-0-compared", 3) is None
    assert list(dict.fromkeys(column("set-0-compared", 1))) == ["0.5B", "1.5B", "7B", "72B"]
    assert browser.complaints() == []


def test_reasons_move_with_their_runs(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.ask("location.hash = '#runs'")
    browser.click("#all-runs thead th:nth-child(2) button")
    rows = browser.ask("[...document.querySelectorAll('#all-runs tbody tr')].map(row => row.textContent.trim())")
    for run, reason in (
        ("0.5B.cross.seed-1", "out of memory"),
        ("1.5B.cross.seed-1", "'finished'"),
        ("7B.cross.seed-1", "not evaluated"),
    ):
        (at,) = [n for n, text in enumerate(rows) if text.startswith(run)]
        assert reason in rows[at + 1]


def test_it_prints(page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(page)
    browser.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type/Page/") > 5
