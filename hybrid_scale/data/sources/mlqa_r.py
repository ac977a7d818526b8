"""MLQA-R (LAReQA, 2004.05484): 7 languages, each question in 2 to 4 of them.

A language pair (query, corpus) without the question has no judgment; `data.summary` counts the queries that are left.
"""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources.lareqa import read_lareqa


def read(path: Path, languages: tuple[str, ...] = (), with_context: bool = False) -> Iterator[Record]:
    """The folder `mlqa-r` of github.com/google-research-datasets/lareqa; options as in `lareqa.read_lareqa`."""
    return read_lareqa(path, languages, with_context)
