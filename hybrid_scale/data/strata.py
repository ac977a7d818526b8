"""What can be drawn: the monolingual rows and the ordered cross-lingual pairs of each language.

Cross pairs are never materialised: a stratum holds, per row, how many passages of its group it can be paired with, and
decodes pair number e by a binary search. Built once per data set and setting by one rank, then memory-mapped by all.
Knows no batch, no weights and no seed.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from hybrid_scale.data.prepared import Pairs
from hybrid_scale.errors import ConfigError, describe, nearest
from hybrid_scale.runs import read_json, write_json

Kind = Literal["mono", "cross"]


class Stratum(Protocol):
    """Equally likely (query row, passage row) pairs of one query language."""

    @property
    def language(self) -> str: ...

    @property
    def size(self) -> int: ...

    def elements(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pair numbers [n] -> (query rows [n], passage rows [n])."""
        ...

    def family_counts(self, family: np.ndarray, families: int) -> np.ndarray:
        """Pairs of each family [families]; `family` is the row's family [R]."""
        ...

    def passage_rows(self) -> np.ndarray:
        """Rows that may give the positive."""
        ...


@dataclass(frozen=True)
class MonoStratum:
    """Rows whose query and passage are in `language`."""

    language: str
    rows: np.ndarray

    @property
    def size(self) -> int:
        return len(self.rows)

    def elements(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows[numbers]
        return rows, rows

    def family_counts(self, family: np.ndarray, families: int) -> np.ndarray:
        return np.bincount(family[self.rows], minlength=families)

    def passage_rows(self) -> np.ndarray:
        return self.rows


@dataclass(frozen=True)
class CrossStratum:
    """Ordered pairs: a query in `language`, a passage of the same group in another one (`same`: in any)."""

    language: str
    rows: np.ndarray
    offsets: np.ndarray
    """[len(rows) + 1] row i owns the pairs offsets[i]..offsets[i + 1] - 1."""
    group_start: np.ndarray
    """[groups + 1] rows of group g are group_start[g]..group_start[g + 1] - 1."""
    group: np.ndarray
    allowed: np.ndarray
    """[R] whether the row's passage may be used."""
    query_lang: np.ndarray
    passage_lang: np.ndarray
    cross_only: np.ndarray
    same: bool

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    def elements(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        owner = np.searchsorted(self.offsets, numbers, side="right") - 1
        queries = np.asarray(self.rows[owner])
        nth = numbers - self.offsets[owner]
        groups = self.group[queries]
        starts, ends = self.group_start[groups], self.group_start[groups + 1]
        # All candidate partners of all queries side by side; the wanted one is the nth usable of its run.
        runs = ends - starts
        first = np.concatenate([[0], np.cumsum(runs)[:-1]])
        candidates = np.arange(runs.sum()) - np.repeat(first - starts, runs)
        usable = self._usable(np.repeat(queries, runs), candidates)
        rank = np.cumsum(usable) - usable
        wanted = usable & (rank - np.repeat(rank[first], runs) == np.repeat(nth, runs))
        return queries, candidates[wanted]

    def _usable(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        if self.same:  # all but a bitext sentence with its own copy
            return self.allowed[passages] & ~(self.cross_only[queries] & (queries == passages))
        return self.allowed[passages] & (self.query_lang[queries] != self.passage_lang[passages])

    def family_counts(self, family: np.ndarray, families: int) -> np.ndarray:
        counts = np.bincount(family[self.rows], weights=np.diff(self.offsets), minlength=families)
        return counts.astype(np.int64)

    def passage_rows(self) -> np.ndarray:
        return np.flatnonzero(self.allowed)


def open_strata(pairs: Pairs, kind: Kind, languages: tuple[str, ...], allow_same: bool) -> list[Stratum]:
    """The non-empty strata of a kind, in the order of `languages` (empty: all of the data).

    `languages` are codes, each once, as the settings give them. Raises ConfigError on one that the data lacks.
    """
    for language in languages:
        if language not in pairs.languages:
            raise ConfigError(
                describe(
                    "sampler.languages",
                    language,
                    f"the training data in {pairs.directory} has no such language",
                    nearest(language, pairs.languages),
                )
            )
    wanted = languages or tuple(pairs.languages)
    settings: dict[str, Any] = {
        "kind": kind,
        "languages": list(wanted),
        "allow_same": allow_same and kind == "cross",
        "data": pairs.fingerprint,
    }
    folder = pairs.directory / "index" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if not (folder / "settings.json").is_file():
        _build(pairs, folder, settings)
    return _load(pairs, folder, read_json(folder / "settings.json"))


def _build(pairs: Pairs, folder: Path, settings: dict[str, Any]) -> None:
    """Write the index beside and rename; two builders of the same index write the same bytes."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    beside.mkdir(parents=True, exist_ok=True)
    languages: list[str] = settings["languages"]
    chosen = np.isin(np.arange(len(pairs.languages)), [pairs.languages.index(name) for name in languages])
    if settings["kind"] == "cross":
        group_start = np.searchsorted(pairs.group, np.arange(int(pairs.group[-1]) + 2))
        allowed = chosen[pairs.passage_lang]
        partners = _partner_counts(pairs, group_start, allowed, bool(settings["allow_same"]))
        np.save(beside / "group_start.npy", group_start)
        np.save(beside / "allowed.npy", allowed)
    for language in languages:
        code = pairs.languages.index(language)
        here = pairs.query_lang == code
        if settings["kind"] == "mono":
            np.save(beside / f"{code}.rows.npy", np.flatnonzero(here & (pairs.passage_lang == code) & ~pairs.cross_only))
        else:
            rows = np.flatnonzero(here & (partners > 0))
            np.save(beside / f"{code}.rows.npy", rows)
            np.save(beside / f"{code}.offsets.npy", np.concatenate([[0], np.cumsum(partners[rows])]).astype(np.int64))
    write_json(beside / "settings.json", settings)
    try:
        os.rename(beside, folder)
    except OSError:  # another process was first
        if not (folder / "settings.json").is_file():
            raise


def _partner_counts(pairs: Pairs, group_start: np.ndarray, allowed: np.ndarray, same: bool) -> np.ndarray:
    """Passages that each row's query may be paired with [R]."""
    prefix = np.concatenate([[0], np.cumsum(allowed)])
    total = prefix[group_start[1:]] - prefix[group_start[:-1]]
    partners = total[pairs.group]
    if same:
        return partners - (pairs.cross_only & allowed)
    languages = len(pairs.languages)
    key = np.asarray(pairs.group) * languages
    held, counts = np.unique((key + pairs.passage_lang)[allowed], return_counts=True)
    at = np.searchsorted(held, key + pairs.query_lang)
    found = held[np.minimum(at, len(held) - 1)] == key + pairs.query_lang if len(held) else np.zeros(len(key), bool)
    return partners - np.where(found, counts[np.minimum(at, max(len(held) - 1, 0))] if len(held) else 0, 0)


def _load(pairs: Pairs, folder: Path, settings: dict[str, Any]) -> list[Stratum]:
    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    strata: list[Stratum] = []
    for language in settings["languages"]:
        code = pairs.languages.index(language)
        rows = load(f"{code}.rows")
        if len(rows) == 0:
            continue
        if settings["kind"] == "mono":
            strata.append(MonoStratum(language, rows))
        else:
            strata.append(
                CrossStratum(
                    language,
                    rows,
                    load(f"{code}.offsets"),
                    load("group_start"),
                    pairs.group,
                    load("allowed"),
                    pairs.query_lang,
                    pairs.passage_lang,
                    pairs.cross_only,
                    bool(settings["allow_same"]),
                )
            )
    return strata
