"""Sets of the Hub with a corpus, queries and judgments per language, as mteb stores them: en-corpus, en-queries, en-qrels.

Ids become `code:id`, for they may be equal in two languages. A query stands alone: topics of different languages aren't parallel.
Knows no data set.
"""

from collections.abc import Iterator, Mapping

from hybrid_scale.data.records import Record
from hybrid_scale.data.sources.common import Languages
from hybrid_scale.data.sources.hub_data import HubData
from hybrid_scale.data.sources.hub_retrieval import Tables


def read(path: str, names: Mapping[str, str], split: str, revision: str = "") -> Iterator[Record]:
    """Records of the languages `names` (our code -> the Hub's name in the configs) of one split."""
    data = HubData(path, revision=revision, strict=False)
    for code, name in names.items():
        yield from Tables(data, None, None, name, split).read(Languages(()), code, code)
