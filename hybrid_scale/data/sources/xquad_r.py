"""XQuAD-R (LAReQA, 2004.05484): 1,190 questions in each of 11 languages, answered in all of them."""

from collections.abc import Iterator
from pathlib import Path

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources.lareqa import read_lareqa


def read(path: Path, languages: tuple[str, ...] = (), with_context: bool = False, revision: str = "") -> Iterator[Record]:
    """The folder `xquad-r` of LAReQA's repository, or an id of the Hub; options as in `lareqa.read_lareqa`."""
    return read_lareqa("xquad-r", path, languages, with_context, revision)
