"""MLQA-R (LAReQA, 2004.05484): 7 languages, each question in 2 to 4 of them.

A language pair (query, corpus) without the question has no judgment; `data.summary` counts the queries that are left.
"""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources.lareqa import read_lareqa


def read(path: Path, languages: tuple[str, ...] = (), with_context: bool = False, revision: str = "") -> Iterator[Record]:
    """The folder `mlqa-r` of LAReQA's repository, or an id of the Hub; options as in `lareqa.read_lareqa`."""
    return read_lareqa("mlqa-r", path, languages, with_context, revision)
