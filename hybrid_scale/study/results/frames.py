"""Results as data frames, one number a cell: what the CSV files beside the report and its download links hold.

Chooses columns; computes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.foretold import Foretold
from hybrid_scale.study.results.primary import Claim
from hybrid_scale.study.results.scaling import Law, Priced
from hybrid_scale.study.results.scores import Arm
from hybrid_scale.study.results.trends import Trend


def means(by_task: Mapping[str, Sequence[Arm]]) -> pd.DataFrame:
    """All metrics of all seeds of the arms of each set, for the download below a table of scores."""
    rows = [
        {"task": task, "group": arm.group, "arm": arm.name, "kind": arm.kind, "seed": seed, "metric": metric, "value": value}
        for task, found in by_task.items()
        for arm in found
        for metric, score in arm.scores.items()
        for seed, value in score.by_seed.items()
    ]
    return pd.DataFrame(rows, columns=["task", "group", "arm", "kind", "seed", "metric", "value"])


def claims_frame(found: Sequence[Claim]) -> pd.DataFrame:
    """The primary family."""
    rows = []
    for each in found:
        low, high = each.interval or (None, None)
        rows.append(
            {
                "claim": each.kind,
                "task": each.task,
                "series": each.series,
                "models": " ".join(each.models),
                "arm": each.arm,
                "rival": each.rival,
                "metric": each.metric.key,
                "estimate": each.estimate,
                "low": low,
                "high": high,
                "standard_error": each.both.error if each.both else None,
                "degrees_of_freedom": each.both.freedom if each.both else None,
                "questions": each.both.questions if each.both else None,
                "seeds": each.both.seeds if each.both else None,
                "p": each.p,
                "p_holm": each.adjusted,
                "margin": each.margin,
                "p_equivalent_holm": each.within,
                "verdict": each.outcome,
                "refusal": each.refusal,
            }
        )
    return pd.DataFrame(rows)


def foretold_frame(found: Sequence[Foretold]) -> pd.DataFrame:
    """The study's own predictions, a row for each statement on two arms."""
    rows = []
    for each in found:
        for statement in each.statements:
            known = each.known.get((statement.arm, statement.rival))
            rows.append(
                {
                    "prediction": each.says,
                    "task": each.task,
                    "metric": each.metric.key,
                    "model": each.model,
                    "better": statement.arm,
                    "worse": statement.rival,
                    "allowed": statement.allowed,
                    "difference": known.difference if known else None,
                    "low": known.interval.low if known and known.interval else None,
                    "high": known.interval.high if known and known.interval else None,
                    "verdict": each.verdict,
                    "missing": each.missing,
                }
            )
    columns = ["prediction", "task", "metric", "model", "better", "worse", "allowed", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "verdict", "missing"])


def comparisons_frame(found: Sequence[Comparison]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "group": each.group,
            "model": each.model,
            "parameters": each.size,
            "arm": each.arm,
            "rival": each.rival,
            "measure": each.metric.key,
            "difference": each.difference,
            **_tested(each),
            "seeds": each.seeds.count,
            "seeds_left_out": " ".join(map(str, each.alone)),
            "seeds_sd": each.seeds.sd,
            "seeds_low": each.seeds.low,
            "seeds_high": each.seeds.high,
            "margin": each.margin,
            "p_equivalent_adjusted": each.within,
            "family": each.family,
            "verdict": each.outcome,
            "refusal": each.reason,
        }
        for each in found
    ]
    return pd.DataFrame(rows)


def trends_frame(found: Sequence[Trend]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "series": each.series,
            "arm": each.arm,
            "rival": each.rival,
            "measure": each.metric.key,
            "sizes": len(each.sizes),
            "smallest": min(each.sizes),
            "largest": max(each.sizes),
            "slope_per_tenfold": each.slope,
            **_tested(each),
            "seeds": each.seeds,
            "p_curvature": each.curvature.p if each.curvature else None,
            "verdict": each.outcome,
            "refusal": each.refusal,
        }
        for each in found
    ]
    return pd.DataFrame(rows)


def _tested(each: Comparison | Trend) -> dict[str, Any]:
    """Interval and p, of questions and seeds or (`chance` says which) of the questions alone; null where there is none."""
    interval, both, test = each.interval, each.both, each.test
    return {
        "chance": "questions and seeds" if both else "questions" if test else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "interval": interval.method if interval else None,
        "questions": interval.clusters if interval else None,
        "standard_error": both.error if both else None,
        "degrees_of_freedom": both.freedom if both else None,
        "p": each.p,
        "p_adjusted": each.adjusted,
    }


def laws_frame(found: Sequence[Law]) -> pd.DataFrame:
    rows = [
        {
            "task": each.task,
            "series": each.series,
            "arm": each.arm,
            "quantity": each.quantity,
            "parameters": size,
            "value": value,
            "left_out_prediction": next((out.predicted for out in each.law.left_out if out.size == size), None),
            "factor": each.law.factor,
            "exponent": each.law.exponent,
            "low": each.law.low,
            "high": each.law.high,
            "refusal": each.law.refusal,
        }
        for each in found
        for size, value in zip(each.law.sizes, each.law.values, strict=True)
    ]
    return pd.DataFrame(rows)


def costs_frame(found: Sequence[Priced]) -> pd.DataFrame:
    columns = ("model", "arm", "device_hours", "by_hours", "peak_gib", "by_memory", "quality")
    return pd.DataFrame([{name: getattr(each, name) for name in columns} | {"measure": each.metric.key} for each in found])
