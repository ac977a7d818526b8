"""The planner's predictions against published peaks and times, row by row, and against one another's halves.

    python benchmarks/plan.py [--json PATH]

Memory: PEFT's and torchtune's rows within 5 %, no resident peak more than 10 % above its prediction; predictions of offloaded
runs are upper bounds, which neither of the two published peaks exceeds. Time: utilisation and the link's share fitted on every
other row, tested on the rest. Needs no GPU and no torch.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hybrid_scale.planning.speed import CALIBRATION, Calibration
from tests.planning.published_peaks import PEAKS, predicted_peak
from tests.planning.published_times import FIRST_HALF, SECOND_HALF, TIMINGS, calibrate, predicted_seconds, relative_error


def memory_rows() -> list[dict[str, Any]]:
    return [
        {
            "run": row.title,
            "measured_gb": round(row.measured / 1e9, 2),
            "predicted_gb": round(predicted_peak(row) / 1e9, 2),
            "error": round(predicted_peak(row) / row.measured - 1, 4),
            "statistic": row.statistic,
            "resident": not row.offloaded,
            "source": row.source,
            "note": row.note,
        }
        for row in PEAKS
    ]


def time_rows(fitted: Calibration) -> list[dict[str, Any]]:
    return [
        {
            "run": row.title,
            "measured_s": round(row.measured, 3),
            "predicted_s": round(predicted_seconds(row, fitted), 3),
            "error": round(relative_error(row, fitted), 4),
            "half": "fitted" if row in FIRST_HALF else "tested",
            "source": row.source,
        }
        for row in TIMINGS
    ]


def halves() -> list[dict[str, Any]]:
    """What each half says of the other, and all rows of themselves."""
    found = []
    for name, fitted, tested in (
        ("every other row, from the first", FIRST_HALF, SECOND_HALF),
        ("every other row, from the second", SECOND_HALF, FIRST_HALF),
        ("all (built in)", TIMINGS, TIMINGS),
    ):
        c = calibrate(fitted)
        errors = {key: median(abs(relative_error(row, c)) for row in rows) for key, rows in (("own", fitted), ("other", tested))}
        found.append({"fitted_on": name, "utilisation": dict(c.utilisation), "link": c.link, **errors})
    return found


def show(memory: list[dict[str, Any]], times: list[dict[str, Any]], calibrations: list[dict[str, Any]]) -> None:
    print(f"{'memory of a GPU, GB':62} {'measured':>9} {'plan':>7} {'error':>7}  read from")
    for row in memory:
        kept = "" if row["resident"] else " (offloaded: an upper bound)"
        print(
            f"{row['run']:62} {row['measured_gb']:9.2f} {row['predicted_gb']:7.2f} {row['error']:+7.1%}  {row['statistic']}{kept}"
        )
    print(f"\n{'seconds':62} {'measured':>9} {'plan':>7} {'error':>7}  half")
    for row in times:
        print(f"{row['run']:62} {row['measured_s']:9.1f} {row['predicted_s']:7.1f} {row['error']:+7.1%}  {row['half']}")
    print("\nfitted on                            median error, own rows   the other rows   shares of the data sheets")
    for found in calibrations:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in found["utilisation"].items())
        print(f"{found['fitted_on']:36} {found['own']:23.1%} {found['other']:16.1%}   {shares}, link {found['link']:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    memory, times, calibrations = memory_rows(), time_rows(calibrate(FIRST_HALF)), halves()
    show(memory, times, calibrations)
    if given.json:
        built_in = {"utilisation": dict(CALIBRATION.utilisation), "link": CALIBRATION.link}
        result = {"memory": memory, "time": times, "halves": calibrations, "built_in": built_in}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
