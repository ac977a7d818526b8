"""Sets of the Hub with a corpus, queries and judgments per language, as mteb stores them.

Configs are LANG-corpus, LANG-queries and LANG-qrels. Ids become `code:id`, for they may be equal in two languages.
Knows no data set.
"""

from collections.abc import Iterator, Mapping
from functools import partial

from hybrid_scale.data.records import Passage, Query, Record
from hybrid_scale.data.sources.common import Row, judgment
from hybrid_scale.data.sources.hub import HubData


def read(path: str, names: Mapping[str, str], split: str, revision: str = "") -> Iterator[Record]:
    """Records of the languages `names` (our code -> the Hub's name in the configs) of one split."""
    data = HubData(path, {}, revision, "")
    for code, name in names.items():
        yield from data.records(f"{name}-corpus", split, partial(passage, lang=code), any_split=True)
        yield from data.records(f"{name}-queries", split, partial(query, lang=code), any_split=True)
        yield from data.records(f"{name}-qrels", split, partial(judgment, prefix=f"{code}:"), any_split=True)


def passage(row: Row, lang: str) -> Passage:
    """`title` + space + text. Raises BadRow."""
    return Passage(row.where, f"{lang}:{row.text('_id')}", lang, row.titled("text", may_be_empty=True))


def query(row: Row, lang: str) -> Query:
    """A query stands alone: topics of different languages aren't parallel. Raises BadRow."""
    name = f"{lang}:{row.text('_id')}"
    return Query(row.where, name, lang, row.text("text"), name)
