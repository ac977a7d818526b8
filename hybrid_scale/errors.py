"""The errors a user can cause, and how their messages are built.

Every message says where (a key or file:line), what was found, which rule it breaks and what to do about it.
Knows nothing of configs, data or processes.
"""

import difflib
from collections.abc import Iterable


class HybridScaleError(Exception):
    """Base of every error that the user can mend. Doors print it without a traceback and exit with 2."""


class ConfigError(HybridScaleError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(HybridScaleError):
    """A record, a file or a data directory breaks a rule."""


class ModelError(HybridScaleError):
    """A model or tokenizer can't be used as asked."""


class RunError(HybridScaleError):
    """A run directory is in a state that forbids the request."""


def describe(where: str, found: object, rule: str, remedy: str = "") -> str:
    """One line: `where: found VALUE; RULE. REMEDY`, the value shortened to 120 characters."""
    shown = repr(found)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    tail = f" {remedy}" if remedy else ""
    return f"{where}: found {shown}; {rule}.{tail}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the closest known name, or the list of all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def explain(error: HybridScaleError | OSError) -> str:
    """What to print: the message of ours, or, of the system's, the file, the reason and a remedy."""
    if isinstance(error, HybridScaleError):
        return str(error)
    where = str(error.filename) if error.filename is not None else "a file"
    return describe(where, error.strerror or str(error), "the system refuses it", "Check path, rights and room on the disk.")
