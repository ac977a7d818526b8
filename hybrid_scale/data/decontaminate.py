"""Training rows that give an evaluation away: their query is one of a retrieval set's, or their passage is mostly one of its.

Two rules, on normalised text (NFKC, case folded, letters, marks and digits alone):
    query      the row's query equals a query of the set
    passage    more than half of the passage's runs of RUN words stand in one passage of the set (n-gram overlap as in GPT-3's
               report, 2005.14165, appendix C); a text of fewer words is one run, so short passages must be equal
A sign of a script without spaces counts as a word. A row that breaks a rule takes its whole parallel group with it, because
its translations say the same. Knows no file format and no training.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import regex

from hybrid_scale.data.numbers import key_of
from hybrid_scale.data.prepared import RetrievalSet
from hybrid_scale.data.records import Pair, Record
from hybrid_scale.errors import ConfigError, describe

Against = Literal["all", "relevant"]

RUN = 8
"""Words of a run."""
SHARE = 0.5
"""A passage with more than this share of its runs in one evaluation passage is dropped."""
MOST_RUNS = 300_000_000
"""Runs of one retrieval set that are held in memory, 12 bytes each."""
BLOCK = 50_000
"""Texts of a set read at once."""
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}"
    r"\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+",
    regex.VERSION1,
)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, RUN - 1 - place, 2**64) for place in range(RUN)], np.uint64)


@dataclass(frozen=True)
class Match:
    """Why a row gives an evaluation away."""

    rule: Literal["query", "passage"]
    set: str
    matched: str
    """Id of the query or passage of the set."""
    share: float
    """Of the row's runs that stand in that passage; 1 for a query."""


@dataclass
class Report:
    """What was found; `rows` holds every dropped row, those that went with their group too."""

    compared: list[dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The manifest's `decontamination`."""
        return {
            "rule": f"query equal after normalisation, or more than {SHARE:.0%} of a passage's runs of {RUN} words in one passage"
            " of the set; the whole parallel group of such a row is dropped",
            "compared": self.compared,
            "rows_dropped": len(self.rows),
            "by_rule": dict(sorted(Counter(f"{row['set']}: {row['rule']}" for row in self.rows).items())),
        }

    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"  decontaminated against {one['set']} ({one['queries']:,} queries, {one['against']})" for one in self.compared]
        lines += [f"    {what:30} {count:>12,}" for what, count in self.facts()["by_rule"].items()]
        return "\n".join([*lines, f"  {'rows dropped':32} {len(self.rows):>12,}"])


def words(text: str) -> list[str]:
    """Normalised words; a sign of a script without spaces is a word."""
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def normalised(text: str) -> str:
    return " ".join(words(text))


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return key_of(word)[0]


def runs(text: str) -> np.ndarray:
    """Hashes of the distinct runs of RUN words, sorted: uint64 [n]. A shorter text is one run; a text without words has none."""
    hashes = np.array([_hash(word) for word in words(text)], np.uint64)
    if len(hashes) == 0:
        return hashes
    with np.errstate(over="ignore"):
        if len(hashes) < RUN:
            return np.array([(hashes * _POWERS[: len(hashes)]).sum(dtype=np.uint64) + np.uint64(len(hashes))], np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(hashes, RUN)
        return np.unique((windows * _POWERS).sum(1, dtype=np.uint64))


class Evaluation:
    """One retrieval set's queries and passages as hashes."""

    def __init__(self, task: RetrievalSet, against: Against):
        """Raises ConfigError: more runs than memory is given to, with the remedy."""
        self.task, self.against = task, against
        self.queries = {normalised(text): number for number, text in enumerate(task.queries.column("text"))}
        chosen = np.unique(np.asarray(task.qrels)[np.asarray(task.qrels)[:, 2] > 0, 1])
        self.numbers = np.arange(len(task.corpus)) if against == "all" else chosen
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
        held = 0
        for start in range(0, len(self.numbers), BLOCK):
            block = self.numbers[start : start + BLOCK]
            found = [runs(text) for text in task.corpus.column("text", block)]
            counts = [len(one) for one in found]
            held += sum(counts)
            if held > MOST_RUNS:
                rule = f"its passages have over {MOST_RUNS:,} runs of {RUN} words, more than are held in memory"
                remedy = f"Write {task.directory}:relevant to compare with its relevant passages alone."
                raise ConfigError(describe(f"--decontaminate {task.directory}", f"{len(task.corpus):,} passages", rule, remedy))
            hashes.append(np.concatenate([np.empty(0, np.uint64), *found]))
            owners.append(np.repeat(block.astype(np.uint32), counts))
        joined, owner = np.concatenate(hashes), np.concatenate(owners)
        order = np.argsort(joined, kind="stable")
        self.hashes, self.owners = joined[order], owner[order]

    def facts(self) -> dict[str, Any]:
        """What of the set was compared with."""
        total = len(self.task.corpus)
        said = f"all {total:,} passages" if self.against == "all" else f"the {len(self.numbers):,} relevant of {total:,} passages"
        return {
            "set": self.task.name,
            "fingerprint": self.task.fingerprint,
            "queries": len(self.task.queries),
            "against": said,
        }

    def match(self, query: str, passage_runs: np.ndarray) -> Match | None:
        """Of a training row with this normalised query and these runs of its passage."""
        if query and (number := self.queries.get(query)) is not None:
            return Match("query", self.task.name, self._id("queries", number), 1.0)
        if len(passage_runs) == 0 or len(self.hashes) == 0:
            return None
        first = np.searchsorted(self.hashes, passage_runs, "left")
        last = np.searchsorted(self.hashes, passage_runs, "right")
        some = last > first
        if some.sum() <= SHARE * len(passage_runs):
            return None
        owners = np.concatenate([self.owners[a:b] for a, b in zip(first[some], last[some], strict=True)])
        passages, counts = np.unique(owners, return_counts=True)
        best = int(counts.argmax())
        share = float(counts[best] / len(passage_runs))
        return Match("passage", self.task.name, self._id("corpus", int(passages[best])), share) if share > SHARE else None

    def _id(self, table: str, number: int) -> str:
        column: list[str] = getattr(self.task, table).column("id", np.array([number]))
        return column[0]


def open_evaluations(given: Sequence[str]) -> list[Evaluation]:
    """`FOLDER` or `FOLDER:relevant` of prepared retrieval sets. Raises DataError, ConfigError."""
    found = []
    for one in given:
        folder, colon, against = one.rpartition(":")
        if colon and against in ("all", "relevant"):
            found.append(Evaluation(RetrievalSet(folder), "relevant" if against == "relevant" else "all"))
        else:
            found.append(Evaluation(RetrievalSet(one), "all"))
    return found


def find(records: Iterator[Record], evaluations: Sequence[Evaluation]) -> tuple[dict[str, Match], Report]:
    """First pass over a training source: the parallel groups that give an evaluation away, and an empty report."""
    groups: dict[str, Match] = {}
    known: dict[str, np.ndarray] = {}
    for record in records:
        if not isinstance(record, Pair) or record.group in groups:
            continue
        if record.pid not in known:
            known = {record.pid: runs(record.passage)}  # rows of one passage often follow each other
        query = normalised(record.query)
        match = next((found for one in evaluations if (found := one.match(query, known[record.pid]))), None)
        if match:
            groups[record.group] = match
    return groups, Report([one.facts() for one in evaluations])


def without(records: Iterator[Record], groups: dict[str, Match], report: Report) -> Iterator[Record]:
    """Second pass: the records but those of `groups`, which are listed in the report."""
    for record in records:
        match = groups.get(record.group) if isinstance(record, Pair) else None
        if match is None or not isinstance(record, Pair):
            yield record
            continue
        row = {"id": record.id, "group": record.group, "where": record.where, "query": record.query}
        report.rows.append({**row, "rule": match.rule, "set": match.set, "matched": match.matched, "share": match.share})
