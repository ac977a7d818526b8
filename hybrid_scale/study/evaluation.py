"""Retrieval sets that a run is scored on after its training: which are missing, and how a finished one is taken in.

`launch/evaluate.py` writes to `evaluating/`; a file appears in `eval/` only when its process ended well. Knows no model.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, read_json, write_json


def missing(run: RunDirectory, sets: Sequence[str]) -> list[str]:
    """Those of `sets` (directories of prepared data) that have no result yet."""
    return [name for name in sets if not run.evaluation_file(Path(name).name).exists()]


def output(run: RunDirectory, data: str) -> Path:
    """Where `launch/evaluate.py` writes the result of a set."""
    return run.path / "evaluating" / f"{Path(data).name}.json"


def settle(run: RunDirectory, data: str, code: int, log: str) -> bool:
    """Take in what the evaluation left that ended with exit code `code`; False, and a reason in `evaluation.json`, if nothing."""
    name, made = Path(data).name, output(run, data)
    reason = f"exit code {code}; see {log}" if code else None if made.exists() else f"no result was written; see {log}"
    if reason is None:
        content = read_json(made)
        if not isinstance(content, dict) or content.get("task") != name:
            raise RunError(describe(str(made), name, "not an evaluation of this set", "Evaluate the run again."))
        table = made.with_suffix(".parquet")
        run.evaluations.mkdir(exist_ok=True)
        if table.exists():
            os.replace(table, run.evaluation_file(name).with_suffix(".parquet"))
        write_json(run.evaluation_file(name), {"step": None, **content})
        made.unlink()
    _record(run, name, reason)
    return reason is None


def failures(run: RunDirectory) -> dict[str, str]:
    """Set -> why its last evaluation failed."""
    content: Any = read_json(_file(run)) if _file(run).exists() else {}
    if not isinstance(content, dict) or not isinstance(content.get("failed", {}), dict):
        raise RunError(describe(str(_file(run)), content, "not what evaluations write there", "Delete the file."))
    return {str(name): str(reason) for name, reason in content.get("failed", {}).items()}


def forget_failures(run: RunDirectory) -> None:
    """Before sets are scored again: what failed before doesn't count."""
    _file(run).unlink(missing_ok=True)


def _record(run: RunDirectory, name: str, reason: str | None) -> None:
    others = {key: value for key, value in failures(run).items() if key != name}
    write_json(_file(run), {"failed": others | ({name: reason} if reason else {})})


def _file(run: RunDirectory) -> Path:
    return run.path / "evaluation.json"
