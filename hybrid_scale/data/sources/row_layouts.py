"""Training rows of other projects under our names: a query with lists of positives and negatives -> one row a positive.

    MIRACL, Mr. TyDi, Tevatron    query_id, query, positive_passages and negative_passages: [{docid, title, text}]
    FlagEmbedding (BGE)           query, pos: [text], neg: [text]
    sentence-transformers         anchor (or query, question), positive (or answer), negative, negative_1, ...
    SWIFT (Qwen3-Embedding)       query, response, rejected_response; or messages, positive_messages, negative_messages
Rows of one query share its `group`. Knows no file.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

from hybrid_scale.data.sources.common import Row

QUERY = ("query", "anchor", "question", "messages")
POSITIVE = ("positive_passages", "pos", "positive", "response", "answer", "positive_messages")
NEGATIVE = re.compile(r"negative_passages|neg|negatives?|negative_\d+|rejected_response|negative_messages")
PID = ("pid", "docid", "_id", "id")


def text_id(text: str) -> str:
    """A pid for a passage that has none: equal texts share it."""
    return "text:" + hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def training_rows(row: Row) -> list[Row]:
    """Rows with our field names; the row itself where it has them already or is of no known layout. Raises BadRow."""
    values = row.values
    query = next((key for key in QUERY if values.get(key) is not None), None)
    positive = next((key for key in POSITIVE if values.get(key) is not None), None)
    if "passage" in values or query is None or positive is None:
        return [row]
    if values.get("label") not in (None, 1, 1.0):
        raise row.bad("label", "must be 1 or absent: a training row is a query with a passage that answers it")
    positives = list(_passages(values[positive]))
    if not positives:
        raise row.bad(positive, "must hold a passage")
    negatives = [one for key in values if NEGATIVE.fullmatch(key) for one in _passages(values[key])]
    name = row.text(row.first("query_id", "id")) if {"query_id", "id"} & values.keys() else row.where.rpartition("/")[2]
    shared: dict[str, Any] = {key: values[key] for key in ("query_lang", "passage_lang") if key in values}
    shared |= {"query": _text(values[query]), "negatives": negatives, "group": values.get("group") or name}
    return [
        Row(row.where, {**shared, **_positive(one), "id": name if len(positives) == 1 else f"{name}:{number}"})
        for number, one in enumerate(positives)
    ]


def _positive(one: dict[str, Any]) -> dict[str, Any]:
    text = one["text"]
    title = one.get("title")
    joined = " ".join(part for part in (title, text) if isinstance(part, str))
    return {"passage": text, "title": title, "pid": one.get("pid") or text_id(joined)}


def _passages(value: Any) -> Iterator[dict[str, Any]]:
    """{pid, title, text} of a text, an object, or a list of either; of a conversation, its last message."""
    if isinstance(value, list) and not _is_conversation(value):
        for one in value:
            yield from _passages(one)
    elif isinstance(value, dict):
        pid = next((str(value[key]) for key in PID if value.get(key) is not None), None)
        yield {"pid": pid, "title": value.get("title"), "text": value.get("text")}
    elif value is not None:
        yield {"pid": None, "title": None, "text": _text(value)}


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _text(value: Any) -> Any:
    return value[-1].get("content") if isinstance(value, list) and _is_conversation(value) else value
