"""One evaluation file (`eval/SET.json`) -> its values as rows, and what speaks against them.

A file that isn't one is an error, told by `collect`; one that contradicts the single queries beside it is read and doubted.
Knows no study and no status.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import read_json
from hybrid_scale.study.results.queries import contradiction, read_queries

VALUE_COLUMNS = ("run", "task", "step", "final", "metric", "language", "passage_language", "value", "doubt")
MATRICES = ("map_matrix", "top1_language_matrix")


def evaluation_rows(run: str, file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of VALUE_COLUMNS. Raises RunError: not an evaluation file. Doubts are added to `notes` and stand in the rows."""
    content = read_json(file)
    try:
        final = file.stem == content["task"]
        if not final and file.stem != f"{content['task']}.step-{content['step']}":
            raise ValueError(f"the file says it is of task {content['task']}, step {content.get('step')}")
        about = {"run": run, "task": content["task"], "step": content.get("step"), "final": final}
        measured = list(_measured(content))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(describe(str(file), error, "not an evaluation file", "Evaluate the run again.")) from None
    doubt = _doubt(file, content) if final else None
    if doubt:
        notes.append(doubt)
    return [{**about, **row, "doubt": doubt} for row in measured]


def _doubt(file: Path, content: Mapping[str, Any]) -> str | None:
    """Why the means of `file` must not count: they aren't those of the single queries beside it."""
    table = file.with_suffix(".parquet")
    if not table.exists():
        return None
    try:
        return contradiction(content, read_queries(table), file.name)
    except RunError:
        return None  # the comparisons tell it: the means themselves may be right


def _measured(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for metric, value in content["metrics"].items():
        yield _value(metric, value)
    for metric, by_language in (content.get("by_language") or {}).items():
        for language, value in by_language.items():
            yield _value(metric, value, language)
    for name in MATRICES:
        if matrix := content.get(name):
            for of_query, row in zip(matrix["query_languages"], matrix["values"], strict=True):
                for of_passage, value in zip(matrix["passage_languages"], row, strict=True):
                    yield _value(name, value, of_query, of_passage)


def _value(metric: str, value: Any, language: str | None = None, passage_language: str | None = None) -> dict[str, Any]:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
        raise ValueError(f"{metric} is {json.dumps(value)}, not a finite number")
    if value is not None and not 0 <= value <= (math.inf if metric.startswith("rank_distance") else 1 + 1e-9):
        raise ValueError(f"{metric} is {value}, outside of what it can be")
    return {"metric": metric, "language": language, "passage_language": passage_language, "value": value}
