"""At which length an evaluation cut its texts, and how many it concerns: `text_lengths` of a result.

A text that is exactly as long as the limit can't be told from one that was cut, so both are counted as being at the limit.
`text_lengths` is null where nobody knows it, as of given vectors without their texts' tokens. Knows no vector and no metric.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hybrid_scale.data.text import Role, TextEncoder
from hybrid_scale.retrieval.store import Store, open_store

UNCUT = {"max_query_tokens": None, "max_passage_tokens": None, "queries_at_limit": 0, "passages_at_limit": 0}
"""Of a result whose texts were taken whole, as BM25 does."""


def budget_of(encoder: TextEncoder, tokens: int) -> int:
    """Tokens of a micro-batch of an evaluation: those of the config, or one text where the longest needs more."""
    return max(tokens, *encoder.max_tokens.values())


def text_lengths(encoder: TextEncoder, queries: int | None, passages: int | None) -> dict[str, Any]:
    """Of a result; the counts are those of texts at the limit, None where they aren't known."""
    return {
        "max_query_tokens": encoder.max_tokens["query"],
        "max_passage_tokens": encoder.max_tokens["passage"],
        "queries_at_limit": queries,
        "passages_at_limit": passages,
    }


def at_limit(lengths: np.ndarray, encoder: TextEncoder, role: Role) -> int:
    """How many of the token lengths [n] are as long as may be."""
    return int((lengths == encoder.max_tokens[role]).sum())


def at_limit_in(store: Store) -> int | None:
    """The same of a store's texts; None where parts were written by a version that didn't count."""
    counts = [store.fact(part, "at_limit") for part in range(store.parts)]
    return None if None in counts else sum(counts)


def text_lengths_of(directory: Path | str) -> dict[str, Any] | None:
    """Of the vectors in a folder, as its stores say; None for given matrices, which don't."""
    if not (Path(directory) / "corpus" / "manifest.json").is_file():
        return None
    queries, passages = (open_store(Path(directory) / kind) for kind in ("queries", "corpus"))
    return {
        "max_query_tokens": queries.identity["max_tokens"],
        "max_passage_tokens": passages.identity["max_tokens"],
        "queries_at_limit": at_limit_in(queries),
        "passages_at_limit": at_limit_in(passages),
    }


def lengths_note(found: dict[str, Any] | None, queries_in_all: int = 0, passages_in_all: int = 0) -> str:
    """`texts cut at 512 (queries) and 512 (passages) tokens: 0 queries and 12 passages are that long`.

    With a share behind each count where the set's numbers of queries and passages are given.
    """
    if found is None:
        return "at how many tokens the texts were cut isn't known"
    head = f"texts cut at {found['max_query_tokens']} (queries) and {found['max_passage_tokens']} (passages) tokens"
    queries, passages = found["queries_at_limit"], found["passages_at_limit"]
    if queries is None or passages is None:
        return head
    shares = (
        f" ({count / in_all:.1%})" if in_all else "" for count, in_all in ((queries, queries_in_all), (passages, passages_in_all))
    )
    return f"{head}: {queries:,} queries{next(shares)} and {passages:,} passages{next(shares)} are that long"


def cut_warning(result: dict[str, Any]) -> str | None:
    """What to say of a result some of whose texts are at the limit; None: none is, or it isn't known."""
    found = result.get("text_lengths") or {}
    if not (found.get("queries_at_limit") or found.get("passages_at_limit")):
        return None
    return f"warning: {result['task']}: {lengths_note(found, result['queries'], result['passages'])}"
