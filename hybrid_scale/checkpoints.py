"""Checkpoints of a run directory: which are whole, the latest, the best. Knows nothing of what is in them, nor how they are made.

A folder is a checkpoint when its last file, COMPLETE, holds the SHA-256 of every other one and they agree.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from hybrid_scale import dist
from hybrid_scale.errors import RunError, describe
from hybrid_scale.runs import RunDirectory, read_json

COMPLETE = "COMPLETE"


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete(run: RunDirectory) -> list[Path]:
    """Folders with COMPLETE, oldest first; not verified."""
    return [path for path in reversed(_newest_first(run)) if (path / COMPLETE).is_file()]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is what COMPLETE says."""
    try:
        first, *lines = (folder / COMPLETE).read_text(encoding="utf-8").splitlines()
        if first != f"# {len(lines)} files" or not lines:
            return f"{COMPLETE} lists {len(lines)} files where its first line reads {first!r}"
        for line in lines:
            digest, _, name = line.partition("  ")
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_of(folder / name) != digest:
                return f"{name} ({(folder / name).stat().st_size} bytes) is not what was written: another SHA-256"
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except (OSError, ValueError) as error:  # UnicodeDecodeError and an empty COMPLETE are ValueErrors
        return f"{COMPLETE} can't be read: {error}"
    return None


def latest(run: RunDirectory) -> Path | None:
    """The newest whole checkpoint, verified on rank 0; says which newer folders are not whole, and why. Collective."""
    found: Path | None = dist.first_rank_does(lambda: _latest(run))
    return found


def _latest(run: RunDirectory) -> Path | None:
    for folder in _newest_first(run):
        reason = damage(folder)
        if reason is None:
            return folder
        print(f"warning: {folder} is no checkpoint: {reason}. Trying the one before it.", file=sys.stderr, flush=True)
    return None


def _newest_first(run: RunDirectory) -> list[Path]:
    return sorted((path for path in run.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), reverse=True)


def resume_point(run: RunDirectory) -> Path | None:
    """`latest`, for a run that goes on: newer folders, all damaged, are set aside so that they count for nothing. Collective.

    Raises RunError where there are checkpoints and none is whole: only a person may throw a run away.
    """

    def find() -> Path | None:
        found, folders = _latest(run), _newest_first(run)
        if found is None and folders:
            reasons = "; ".join(f"{folder.name}: {damage(folder)}" for folder in folders)
            remedy = "Restore a copy, or remove that folder to start from the beginning."
            raise RunError(describe(str(run.checkpoints), len(folders), f"no checkpoint there is whole ({reasons})", remedy))
        for folder in folders:
            if folder == found:
                break
            aside = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        return found

    found: Path | None = dist.first_rank_does(find)
    return found


def best(run: RunDirectory) -> Path | None:
    """The folder that `checkpoints/best` names, if it is there."""
    pointer = run.checkpoints / "best"
    if not pointer.is_file():
        return None
    try:
        folder = run.checkpoints / read_json(pointer)["folder"]
    except (KeyError, TypeError):
        raise RunError(describe(str(pointer), pointer.read_text(), "it names no folder", "Remove or mend it.")) from None
    return folder if (folder / COMPLETE).is_file() else None


def chosen(run: RunDirectory, take_best: bool = False) -> Path:
    """The checkpoint to use, verified: the latest, or the one that `checkpoints/best` names. Collective.

    Raises RunError: there is none.
    """
    if not take_best:
        found = latest(run)
        if found is None:
            raise RunError(describe(str(run.checkpoints), "no complete checkpoint", "a trained run is needed", "Train it first."))
        return found
    found = best(run)
    if found is None:
        remedy = "Train with training.keep_best, or take the latest."
        raise RunError(describe(str(run.checkpoints), "no best checkpoint", "training.keep_best names one", remedy))
    reason = dist.first_rank_does(lambda: damage(found))
    if reason is not None:
        raise RunError(describe(str(found), reason, "a checkpoint is whole", "Take the latest."))
    return found


def digest_of_weights(folder: Path) -> str:
    """SHA-256 over those of the trained weights, as COMPLETE lists them."""
    sums = [line for line in (folder / COMPLETE).read_text(encoding="utf-8").splitlines() if "  adapter/" in line]
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()
