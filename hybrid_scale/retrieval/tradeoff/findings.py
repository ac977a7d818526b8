"""A study of compressed indexes -> its findings in sentences. Every number in them is one of the study's. Knows no HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

FLAT = "flat:fp32"
"""The index with which query times are compared, where it is under study."""


def names(metric: str) -> str:
    """ndcg@10 -> nDCG@10; map@100 -> mAP@100; mrr@100 -> MRR@100."""
    return metric.replace("ndcg", "nDCG").replace("map", "mAP").replace("mrr", "MRR")


def whole(result: Mapping[str, Any]) -> float:
    """Bytes a vector in float32, uncompressed."""
    return 4.0 * float(result["dimensions"])


def finding(result: Mapping[str, Any], metric: str) -> str:
    """What compression costs on this metric: the smallest index that loses nothing, or why none is named."""
    points: Sequence[Mapping[str, Any]] = result["points"]
    smaller = [point for point in points if point["bytes"]["measured"] < whole(result)]
    label, exact, margin = names(metric), result["certified"][metric], result["options"]["margin"]
    if not points:
        return f"On {result['task']} no index could be studied here: each is listed below with its reason."
    if not smaller:
        return (
            f"On {result['task']} no index under study takes fewer bytes than float32 vectors, so nothing is said of compression."
        )
    if any(point["quality"][metric]["verdict"] == "not judged" for point in points):
        of = f"which is {margin / exact:.0%} of that score" if exact > 0 else "and the score is 0"
        return (
            f"On {result['task']} the exact list's {label} is {exact:.4f}: too low for a margin of "
            f"\N{PLUS-MINUS SIGN}{margin:g}, {of}, so no index is called equivalent."
        )
    same = [point for point in smaller if point["quality"][metric]["verdict"] == "equivalent"]
    if not same:
        nearest = max(smaller, key=lambda point: point["quality"][metric]["difference"])
        return (
            f"On {result['task']} no index that takes fewer bytes than float32 vectors is shown to keep "
            f"the exact list's {label} of {exact:.4f} within \N{PLUS-MINUS SIGN}{margin:g}; "
            f"the nearest, {nearest['name']}, differs by {_difference(nearest, metric)} with {_cost(nearest, result)}."
        )
    best = min(same, key=lambda point: (point["bytes"]["measured"], point["query"]["cpu_ms"]))
    return (
        f"On {result['task']} {best['name']} is the smallest index that keeps the exact list's {label}: "
        f"{best['quality'][metric]['value']:.4f} against {exact:.4f}, a difference of {_difference(best, metric)} within "
        f"\N{PLUS-MINUS SIGN}{margin:g}, with {_cost(best, result)}."
    )


def _difference(point: Mapping[str, Any], metric: str) -> str:
    quality = point["quality"][metric]
    return f"{quality['difference']:+.4f} [{quality['low']:+.4f}, {quality['high']:+.4f}]"


def _cost(point: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    held, query = point["bytes"]["measured"], point["query"]["cpu_ms"]
    text = f"{held:,.0f} bytes a vector, {whole(result) / held:.1f} times fewer than float32's {whole(result):,.0f}"
    flat = next((each["query"]["cpu_ms"] for each in result["points"] if each["name"] == FLAT), 0.0)
    times = f", {query / flat:.2g} times that of {FLAT}" if flat > 0 and point["name"] != FLAT else ""
    return f"{text}, and {query:.3f} ms of CPU a query{times}"


def counted(result: Mapping[str, Any], metric: str) -> str:
    """How many indexes have which verdict; the sum is that of all that ran."""
    verdicts = [point["quality"][metric]["verdict"] for point in result["points"]]
    order = ("equivalent", "better", "worse", "not shown", "not judged")
    told = [f"{verdicts.count(verdict)} {verdict}" for verdict in order if verdict in verdicts]
    return f"{names(metric)} of {len(verdicts)} indexes against the exact list: {', '.join(told)}"
