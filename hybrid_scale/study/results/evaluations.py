"""One evaluation file (`eval/SET.json`) -> its values as rows, and what speaks against them.

A file that isn't one is an error, told by `collect`; one that contradicts the single queries beside it, or that wasn't scored
by its set's protocol (protocols.py), is read and doubted. Knows no study and no status.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_scale.errors import RunError, describe
from hybrid_scale.protocols import BY_NAME, Protocol, beir_member, protocol_of
from hybrid_scale.runs import read_json
from hybrid_scale.study.results.queries import contradiction, read_queries

VALUE_COLUMNS = (
    *("run", "task", "step", "final", "protocol", "cut", "beir", "metric", "language", "passage_language"),
    *("value", "chance_level", "doubt"),
)
AGAIN = "It doesn't count: delete it and evaluate the run again."
MATRICES = ("map_matrix", "top1_language_matrix")


def evaluation_rows(run: str, file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of VALUE_COLUMNS. Raises RunError: not an evaluation file. Doubts are added to `notes` and stand in the rows."""
    content = read_json(file)
    try:
        final = file.stem == content["task"]
        if not final and file.stem != f"{content['task']}.step-{content['step']}":
            raise ValueError(f"the file says it is of task {content['task']}, step {content.get('step')}")
        about = {"run": run, "task": content["task"], "step": content.get("step"), "final": final}
        rule, doubt = protocol_stated(content, file.name)
        cut, measured = _cut(content), list(_measured(content))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(describe(str(file), error, "not an evaluation file", "Evaluate the run again.")) from None
    doubt = doubt or (_doubt(file, content) if final else None)
    if doubt and final:
        notes.append(doubt)
    about |= {"protocol": rule, "cut": cut, "beir": _set_of_beir(content)}
    return [{**about, **row, "doubt": doubt} for row in measured]


def _set_of_beir(content: Mapping[str, Any]) -> str | None:
    """Earlier versions don't state the set's `evaluation`: its name tells."""
    evaluation = content["evaluation"] if "evaluation" in content else f"beir/{content['task']}"
    return beir_member(evaluation, len(content.get("parts") or ()))


def _cut(content: Mapping[str, Any]) -> str:
    """`512/512`: the tokens at which queries and passages were cut; a result of an older version doesn't say."""
    lengths = content.get("text_lengths")
    return f"{lengths['max_query_tokens']}/{lengths['max_passage_tokens']}" if lengths else "unstated"


def protocol_stated(content: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Name of the protocol that a result was scored by, and why its numbers must not count (None: they may).

    Results of earlier versions state none and were scored in the union of all languages. Where the set's protocol is the corpus
    of the query's own language, theirs are other numbers; elsewhere they are the same. `where`: the file, for the reason.
    """
    stated = content.get("protocol")
    if stated is None:
        implied, languages = _implied(content)
        if implied.pools != "own language" or languages == 1:
            return implied.name, None
        rule = f"the protocol {implied.name} ranks a query in the corpus of its own language, an older version in the union"
        return implied.name, describe(where, "no protocol", rule, AGAIN)
    name, known = str(stated["name"]), BY_NAME.get(str(stated["name"]))
    if known is None:
        return name, describe(where, name, "must be a protocol that this version knows (protocols.py)", AGAIN)
    if stated["pools"] != known.pools:
        return name, describe(where, stated["pools"], f"the pools of the protocol {name} must be: {known.pools}", AGAIN)
    return name, None


def _implied(content: Mapping[str, Any]) -> tuple[Protocol, int]:
    """The protocol of the set of a result that states none, by its name and its languages; and how many these are."""
    crosses = content["metrics"].get("cross_map") is not None
    languages = len(content.get("languages") or ()) or (2 if crosses else 0)
    return protocol_of({"evaluation": content.get("evaluation") or content["task"]}, languages, crosses), languages


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
    expected = content.get("chance") or {}  # results of earlier versions don't state it
    for metric, value in content["metrics"].items():
        yield _value(metric, value) | {"chance_level": _value(metric, expected.get(metric))["value"]}
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
