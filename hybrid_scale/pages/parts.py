"""What a page is made of: cells, tables that sort and become cards on a phone, figures with the data behind them.

Holds texts that others have formatted; computes nothing and knows no HTML.
"""

import re
from dataclasses import dataclass
from typing import Literal

import pandas as pd

NOTHING = "\N{EN DASH}"
MARK = " \N{DAGGER}"
"""Behind a number about which something must be said."""
NUMBER = re.compile(r"[<+-]? ?[\d.,]+ ?[%BMk]?(?: \N{DAGGER})?|\[[-+.\d, ]+\]|\d+: \[[-+.\d, ]+\]")

Tone = Literal["", "good", "bad", "open", "plain"]
"""How a verdict is coloured; "": the cell holds no verdict."""


@dataclass(frozen=True)
class Cell:
    text: str
    spread: str = ""
    """Standard deviation, behind a plus-minus sign."""
    best: bool = False
    sort: str = ""
    """What to sort by where the text isn't it."""
    tone: Tone = ""
    """Set where the text is a verdict."""
    detail: str = ""
    """A second, smaller line."""
    verdict: str = ""
    """A verdict that stands beside the text, in the colour of `tone`."""


@dataclass(frozen=True)
class Row:
    cells: tuple[Cell, ...]
    """The first names the row."""
    reference: bool = False
    """Stands at the end, whatever the table is sorted by: something that the study didn't train."""


@dataclass(frozen=True)
class Table:
    """A sortable table; `data` is what its CSV link holds."""

    key: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    data: pd.DataFrame
    notes: tuple[str, ...] = ()
    """A smaller line below each head, or none at all."""

    @property
    def numeric(self) -> list[bool]:
        """For each column whether it holds numbers, which stand to the right; the first names its row."""
        columns = ([row.cells[n].text for row in self.rows] for n in range(len(self.heads)))
        found = [all(text == NOTHING or NUMBER.fullmatch(text) for text in column) for column in columns]
        return [False, *found[1:]]


@dataclass(frozen=True)
class Plot:
    key: str
    title: str
    caption: str
    svg: str
    data: pd.DataFrame
