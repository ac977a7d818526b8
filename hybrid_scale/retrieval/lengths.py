"""At which length an evaluation cut its texts, and how many it concerns: `text_lengths` of a result.

A text that is exactly as long as the limit can't be told from one that was cut, so both are counted as being at the limit.
Knows no vector and no metric.
"""

from typing import Any

import numpy as np

from hybrid_scale.data.text import Role, TextEncoder
from hybrid_scale.retrieval.store import Store


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


def lengths_note(found: dict[str, Any]) -> str:
    """`texts cut at 512 (queries) and 512 (passages) tokens: 0 queries and 12 passages are that long`."""
    head = f"texts cut at {found['max_query_tokens']} (queries) and {found['max_passage_tokens']} (passages) tokens"
    queries, passages = found["queries_at_limit"], found["passages_at_limit"]
    if queries is None or passages is None:
        return head
    return f"{head}: {queries:,} queries and {passages:,} passages are that long"
