"""What can be drawn: the monolingual rows and the ordered cross-lingual pairs of each language.

Cross pairs are never materialised: a stratum holds, per row, how many passages of its group it can be paired with, and
decodes pair number e by a binary search. A pair of a query (its text in its language) and a passage (its text) counts
once, however many rows and parallel groups give it: the numbers of its repetitions are listed and skipped. Built once per
data set and setting by one rank, then memory-mapped by all. Knows no batch, no weights and no seed.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from hybrid_scale.data.numbers import key_of
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.errors import ConfigError, describe, nearest
from hybrid_scale.runs import read_json, write_json

Kind = Literal["mono", "cross"]
BLOCK = 1 << 20
"""Texts or pairs that are looked at at once while an index is built."""


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
    """[len(rows) + 1] row i owns the candidates offsets[i]..offsets[i + 1] - 1: its pairs and their repetitions."""
    gaps: np.ndarray
    """[repetitions] gaps[j] pairs are numbered before repetition j, which is therefore candidate gaps[j] + j."""
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
        return int(self.offsets[-1]) - len(self.gaps)

    @property
    def counts(self) -> np.ndarray:
        """[len(rows)] pairs of each row."""
        repetitions = np.asarray(self.gaps) + np.arange(len(self.gaps))
        owners = np.searchsorted(self.offsets, repetitions, side="right") - 1
        counts: np.ndarray = np.diff(self.offsets) - np.bincount(owners, minlength=len(self.rows))
        return counts

    def elements(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates = numbers + np.searchsorted(self.gaps, numbers, side="right")
        owner = np.searchsorted(self.offsets, candidates, side="right") - 1
        queries, held = np.asarray(self.rows[owner]), self.offsets[owner + 1] - self.offsets[owner]
        return queries, self.partners(queries)[np.cumsum(held) - held + candidates - self.offsets[owner]]

    def partners(self, queries: np.ndarray) -> np.ndarray:
        """All candidates of the first query (rows that give the passage), then all of the second, and so on."""
        groups = self.group[queries]
        starts, ends = self.group_start[groups], self.group_start[groups + 1]
        runs = ends - starts
        first = np.cumsum(runs) - runs
        passages = np.arange(runs.sum()) - np.repeat(first - starts, runs)
        usable: np.ndarray = passages[self._usable(np.repeat(queries, runs), passages)]
        return usable

    def _usable(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        if self.same:  # all but a bitext sentence with its own copy
            return self.allowed[passages] & ~(self.cross_only[queries] & (queries == passages))
        return self.allowed[passages] & (self.query_lang[queries] != self.passage_lang[passages])

    def family_counts(self, family: np.ndarray, families: int) -> np.ndarray:
        return np.bincount(family[self.rows], weights=self.counts, minlength=families).astype(np.int64)

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
    if kind == "cross":
        settings["repetitions"] = "left out"  # an index of earlier versions counts them
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
        repeating = _groups_with_a_passage_twice(pairs, allowed)
        np.save(beside / "group_start.npy", group_start)
        np.save(beside / "allowed.npy", allowed)
    for language in languages:
        code = pairs.languages.index(language)
        here = pairs.query_lang == code
        if settings["kind"] == "mono":
            np.save(beside / f"{code}.rows.npy", np.flatnonzero(here & (pairs.passage_lang == code) & ~pairs.cross_only))
            continue
        rows = np.flatnonzero(here & (partners > 0))
        np.save(beside / f"{code}.rows.npy", rows)
        np.save(beside / f"{code}.offsets.npy", np.concatenate([[0], np.cumsum(partners[rows])]).astype(np.int64))
        np.save(beside / f"{code}.gaps.npy", np.empty(0, np.int64))
        repetitions = _repetitions(pairs, _cross_stratum(pairs, beside, settings, language), repeating)
        np.save(beside / f"{code}.gaps.npy", repetitions - np.arange(len(repetitions)))
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


def _groups_with_a_passage_twice(pairs: Pairs, allowed: np.ndarray) -> np.ndarray:
    """[groups] whether two rows of the group may give one passage."""
    rows = np.flatnonzero(allowed)
    rows = rows[np.bincount(pairs.passage[rows])[pairs.passage[rows]] > 1]
    group, passage = pairs.group[rows], pairs.passage[rows]
    order = np.lexsort((passage, group))
    repeated = np.zeros(int(pairs.group[-1]) + 1, bool)
    repeated[group[order][1:][_equals_last(group[order], passage[order])]] = True
    return repeated


def _equals_last(*columns: np.ndarray) -> np.ndarray:
    """[n - 1] whether element i + 1 has the values of element i in all columns."""
    equal: np.ndarray = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    return equal


def _repetitions(pairs: Pairs, stratum: CrossStratum, repeating: np.ndarray) -> np.ndarray:
    """Numbers of the candidates that repeat a pair of the stratum, ascending.

    Of equal candidates the row that gives the pair itself is kept, because its hard negatives are those of the query; where
    there is none, the first one. `repeating`: [groups] whether a group has a passage twice.
    """
    question = _questions(pairs, stratum.rows)
    chosen = np.flatnonzero((np.bincount(question)[question] > 1) | repeating[pairs.group[stratum.rows]])
    chosen = chosen[np.argsort(question[chosen], kind="stable")]
    held = np.diff(stratum.offsets)[chosen]
    # Blocks of about BLOCK candidates with whole questions: a pair is repeated within its question only.
    last = np.flatnonzero(np.diff(question[chosen], append=-1))
    block = np.cumsum(held)[last] // BLOCK
    ends = last[np.flatnonzero(np.diff(block, append=-1))] + 1
    found = [np.empty(0, np.int64)]
    for places, counts in zip(np.split(chosen, ends[:-1]), np.split(held, ends[:-1]), strict=True):
        queries = np.repeat(stratum.rows[places], counts)
        partners = stratum.partners(stratum.rows[places])
        numbers = np.arange(len(queries)) + np.repeat(stratum.offsets[places] - np.cumsum(counts) + counts, counts)
        asked, passage = np.repeat(question[places], counts), pairs.passage[partners]
        order = np.lexsort((numbers, queries != partners, passage, asked))
        found.append(numbers[order][1:][_equals_last(asked[order], passage[order])])
    return np.sort(np.concatenate(found))


def _questions(pairs: Pairs, rows: np.ndarray) -> np.ndarray:
    """[rows] numbers of the questions of one language: rows of one family that ask the same text have one number.

    Equal pairs share a passage and so a family: a text is read only where its family asks something else in the language.
    """
    family = pairs.family[rows]
    several = np.flatnonzero(np.bincount(family, minlength=1)[family] > 1)
    digests = np.empty(len(several), np.uint64)
    in_order = np.argsort(pairs.query[rows[several]], kind="stable")
    for start in range(0, len(several), BLOCK):
        here = in_order[start : start + BLOCK]
        texts = pairs.queries.column("text", pairs.query[rows[several[here]]])
        digests[here] = [key_of(text)[0] for text in texts]
    order = np.lexsort((digests, family[several]))
    new = np.concatenate([[False], ~_equals_last(family[several][order], digests[order])]) if len(several) else np.empty(0, bool)
    question = np.arange(len(rows))
    question[several[order]] = len(rows) + np.cumsum(new)
    return question


def _cross_stratum(pairs: Pairs, folder: Path, settings: dict[str, Any], language: str) -> CrossStratum:
    def load(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    code = pairs.languages.index(language)
    return CrossStratum(
        language,
        load(f"{code}.rows"),
        load(f"{code}.offsets"),
        load(f"{code}.gaps"),
        load("group_start"),
        pairs.group,
        load("allowed"),
        pairs.query_lang,
        pairs.passage_lang,
        pairs.cross_only,
        bool(settings["allow_same"]),
    )


def _load(pairs: Pairs, folder: Path, settings: dict[str, Any]) -> list[Stratum]:
    if settings["kind"] == "cross":
        every: list[Stratum] = [_cross_stratum(pairs, folder, settings, language) for language in settings["languages"]]
    else:
        codes = [pairs.languages.index(language) for language in settings["languages"]]
        rows = [np.load(folder / f"{code}.rows.npy", mmap_mode="r") for code in codes]
        every = [MonoStratum(language, held) for language, held in zip(settings["languages"], rows, strict=True)]
    return [stratum for stratum in every if stratum.size]
