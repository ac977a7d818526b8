"""Templates of pages that need nothing beside themselves: no network, no second file. One look for all of them.

`page.html.j2` is the frame with style and script, `macros.html.j2` draws what parts.py holds.
"""

from pathlib import Path
from urllib.parse import quote

import jinja2
import pandas as pd

HERE = Path(__file__).parent
MOST_BYTES = 2_000_000
"""Of a page, so that it opens at once and can be sent by mail."""


def template(file: Path) -> jinja2.Template:
    """The template in `file`; it may extend or import those of this folder. What it isn't given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([file.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["csv_link"] = csv_link
    environment.filters["sentence"] = sentence
    return environment.get_template(file.name)


def csv_link(table: pd.DataFrame) -> str:
    """The table as a `data:` address, numbers with six significant digits."""
    return "data:text/csv;charset=utf-8," + quote(table.to_csv(index=False, float_format="%.6g"), safe=",:;+=()/")


def sentence(text: str) -> str:
    """`text` with a capital first letter (but for words like mAP) and a full stop."""
    whole = text.rstrip()
    first = whole[:1] if whole[1:2].isupper() else whole[:1].upper()
    return first + whole[1:] + ("" if whole.endswith((".", "!", "?", ":")) else ".")
