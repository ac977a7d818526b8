"""Step number -> global batch: a pure function of (data, settings, seed, step). Knows no rank and no text.

A global batch is a list of contrastive pools of `pool_rows` rows each, whatever the arm; a pool is drawn from one stream
(mono:LANGUAGE, cross or mixed). A stream is a fixed sequence of pools: pool number i never depends on who asks or when. So the
state of a run is the step number.

How a stream avoids false negatives: it draws `pools_per_deal` pools' worth of elements at once, sorts them by family
(rows tied by a parallel group or a passage) and deals them out like cards. A family of at most `pools_per_deal` elements
can't meet itself in a pool; whether every deal obeys this is proven before training starts.

Terms and batch types: SCIENCE of the README; LAReQA (2004.05484) and 2408.10536.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hybrid_scale.config import SamplerSettings
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.shuffle import draw, generator, mix
from hybrid_scale.data.strata import CrossStratum, Kind, Stratum, open_strata
from hybrid_scale.errors import ConfigError, describe

MIN_POOLS_PER_DEAL = 16
MAX_ELEMENTS_PER_DEAL = 1 << 23

# First word of every random key: no two purposes share a stream.
_ELEMENTS, _DEAL, _WINDOW, _NEGATIVES = range(4)


@dataclass(frozen=True)
class GlobalBatch:
    """One optimiser step's rows, columns and texts.

    N rows (a query each), C columns (a passage in a pool each), T unique texts, P pools. Rows and columns of a pool are
    contiguous. A passage that stands in two pools is two columns but one text.
    """

    step: int
    pools: tuple[str, ...]
    """[P] stream of each pool: `mono:en`, `cross`, `mixed`."""
    row_offsets: np.ndarray
    """[P + 1]"""
    column_offsets: np.ndarray
    """[P + 1]"""
    row_text: np.ndarray
    """[N] the row's query as a number of the batch's texts."""
    row_column: np.ndarray
    """[N] column of the row's positive."""
    row_family: np.ndarray
    """[N]"""
    column_text: np.ndarray
    """[C]"""
    column_family: np.ndarray
    """[C] a column of the row's own family is no negative of it."""
    column_is_hard: np.ndarray
    """[C] whether the column was drawn as a hard negative."""
    queries: np.ndarray
    """Texts 0..len(queries) - 1: numbers in `Pairs.queries`."""
    passages: np.ndarray
    """The other texts: numbers in `Pairs.passages`."""
    query_rows: np.ndarray
    """[N] row of `Pairs` that gave the query."""
    passage_rows: np.ndarray
    """[N] row of `Pairs` that gave the positive."""


class Stream:
    """An endless sequence of pools over weighted strata, conflict-free by dealing."""

    def __init__(
        self,
        name: str,
        strata: Sequence[Stratum],
        weights: np.ndarray,
        pool_rows: int,
        pairs: Pairs,
        key: tuple[int, ...],
        forbid_conflicts: bool,
        pools_per_deal: int | None = None,
    ):
        """`pools_per_deal`: a known result of the proof below, which is then left out."""
        self.name, self.strata, self.pool_rows, self.key = name, strata, pool_rows, key
        self.family = pairs.family
        self.borders = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
        self.borders[-1] = 1.0
        self.pools_per_deal = pools_per_deal or self._smallest_deal(weights / weights.sum(), pairs, forbid_conflicts)
        self._deal_number = -1
        self._dealt: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.int64), np.empty(0, np.int64))

    def pool(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(query rows, passage rows) of pool `number`, [pool_rows] each."""
        deal, place = divmod(number, self.pools_per_deal)
        if deal != self._deal_number:
            self._dealt = self._deal(deal)
            self._deal_number = deal
        return self._dealt[0][place :: self.pools_per_deal], self._dealt[1][place :: self.pools_per_deal]

    def _deal(self, deal: int) -> tuple[np.ndarray, np.ndarray]:
        total = self.pools_per_deal * self.pool_rows
        before, after = self._drawn(deal * total), self._drawn((deal + 1) * total)
        parts = [
            stratum.elements(draw(np.arange(before[i], after[i]), stratum.size, (*self.key, _ELEMENTS, i)))
            for i, stratum in enumerate(self.strata)
        ]
        queries, passages = (np.concatenate(side) for side in zip(*parts, strict=True))
        family = np.asarray(self.family[queries]).astype(np.uint64)
        rng = generator(*self.key, _DEAL, deal)
        with np.errstate(over="ignore"):
            scattered = mix(family ^ rng.integers(1 << 63, dtype=np.uint64))
        order = np.lexsort((rng.random(len(family)), scattered))
        return queries[order], passages[order]

    def _drawn(self, total: int) -> np.ndarray:
        """Elements drawn from each stratum among the first `total` of the stream: exact shares, rounded as a whole."""
        return np.diff(np.floor(total * self.borders + 0.5).astype(np.int64))

    def _smallest_deal(self, weights: np.ndarray, pairs: Pairs, forbid_conflicts: bool) -> int:
        """The fewest pools a deal must have so that no family can exceed one element a pool. Raises ConfigError."""
        # Two elements a stratum and deal keep every stratum's count from shrinking between deals (rounding).
        pools = MIN_POOLS_PER_DEAL
        while pools * self.pool_rows * weights.min() < 2:
            pools *= 2
        if not forbid_conflicts:
            return pools
        families = int(pairs.passage_family.max()) + 1
        counts = [stratum.family_counts(pairs.family, families) for stratum in self.strata]
        load = sum(w * c / s.size for w, c, s in zip(weights, counts, self.strata, strict=True))
        if self.pool_rows * load.max() <= 1.0:
            while pools * self.pool_rows <= MAX_ELEMENTS_PER_DEAL:
                draws = [math.ceil(pools * self.pool_rows * w) + 1 for w in weights]
                epochs = [math.ceil((n - 1) / s.size) + 1 for n, s in zip(draws, self.strata, strict=True)]
                met = sum(np.minimum(e * c, n) for e, c, n in zip(epochs, counts, draws, strict=True))
                if met.max() <= pools:
                    return pools
                pools *= 2
        worst = int(load.argmax())
        own = sum(int(c[worst]) for c in counts)
        raise ConfigError(
            describe(
                f"pool '{self.name}' of {self.pool_rows} rows",
                f"one family (parallel group or shared passage) has {own} of {sum(s.size for s in self.strata)} pairs",
                "the pool can't be filled without two rows of one family in it",
                f"Use pools of at most {max(1, int(1 / load.max()))} rows, leave the language out (sampler.languages), "
                "or set sampler.conflicts: mask.",
            )
        )


class HybridSampler:
    """The global batches of a run. Raises ConfigError when built if any pool it will need can't be filled as asked.

    `deals` are those of an equal sampler (`HybridSampler.deals`) on another rank: its proof, a pass over the data, is taken
    over instead of made again.
    """

    def __init__(self, pairs: Pairs, settings: SamplerSettings, seed: int, deals: Mapping[str, int] | None = None):
        self.pairs, self.settings, self.seed = pairs, settings, seed
        self._known_deals = deals or {}
        self.mono_share = settings.mono_share
        self.streams: dict[str, Stream] = {}
        self.languages: list[str] = []
        self.language_weights = np.empty(0)
        self._open_streams()
        self._check_negatives()
        self._counted = (0, np.zeros(len(self.streams), np.int64))

    # ------------------------------------------------------------------------------------------------ the streams

    def _open_streams(self) -> None:
        settings = self.settings
        mono = self._strata("mono") if settings.arm != "cross" and (self.mono_share > 0 or settings.arm == "mixed") else []
        cross = self._strata("cross") if settings.arm in ("cross", "hybrid") and self.mono_share < 1 else []
        paired = {stratum.language for stratum in (*mono, *cross)}
        without = [language for language in settings.languages if language not in paired]
        if without:
            rule = f"arm '{settings.arm}' finds no pairs of these languages in {self.pairs.directory}"
            raise ConfigError(describe("sampler.languages", without, rule, f"With pairs: {', '.join(sorted(paired))}."))
        self.languages = [stratum.language for stratum in mono]
        self.language_weights = self._weights(mono)
        if settings.arm == "mixed":
            self._open("mixed", mono, self.language_weights)
        else:
            self._open_mono(mono)
        if cross:
            self._open("cross", cross, self._weights(cross))

    def _strata(self, kind: Kind) -> list[Stratum]:
        strata = open_strata(self.pairs, kind, self.settings.languages, self.settings.allow_same)
        if not strata:
            what = {"mono": "row with query and passage in one language", "cross": "group with passages in two languages"}[kind]
            rule = f"{self.pairs.directory} has no {what}" + (" among sampler.languages" if self.settings.languages else "")
            raise ConfigError(describe("sampler.arm", self.settings.arm, rule, "Choose another arm, or other data."))
        return strata

    def _open_mono(self, strata: Sequence[Stratum]) -> None:
        problems: list[str] = []
        for stratum in strata:
            try:
                self._open(f"mono:{stratum.language}", [stratum], np.ones(1))
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            able = [name.partition(":")[2] for name in self.streams]
            raise ConfigError("\n".join([*problems, f"Languages whose pools can be filled: [{', '.join(able)}]."]))

    def _open(self, name: str, strata: Sequence[Stratum], weights: np.ndarray) -> None:
        key = (self.seed, *name.encode())
        forbid = self.settings.conflicts == "forbid"
        known = self._known_deals.get(name)
        self.streams[name] = Stream(name, strata, weights, self.settings.pool_rows, self.pairs, key, forbid, known)

    @property
    def deals(self) -> dict[str, int]:
        """Pools per deal of each stream."""
        return {name: stream.pools_per_deal for name, stream in self.streams.items()}

    @property
    def repetitions(self) -> int:
        """Cross pairs that are left out because others equal them. Versions that drew them too drew other batches."""
        strata = [stratum for stream in self.streams.values() for stratum in stream.strata]
        return sum(len(stratum.gaps) for stratum in strata if isinstance(stratum, CrossStratum))

    def _weights(self, strata: Sequence[Stratum]) -> np.ndarray:
        exponent = {"uniform": 0.0, "size": 1.0, "power": self.settings.power}[self.settings.language_weights]
        weights = np.array([float(stratum.size) ** exponent for stratum in strata])
        return weights / weights.sum() if strata else weights

    def _check_negatives(self) -> None:
        wanted = self.settings.hard_negatives
        if not wanted or self._known_deals:
            return
        held = np.diff(self.pairs.negative_offsets)
        used = np.zeros(len(held), bool)
        for stream in self.streams.values():
            for stratum in stream.strata:
                used[stratum.passage_rows()] = True
        short = np.flatnonzero(used & (held < wanted))
        if len(short):
            name = self.pairs.queries.column("id", self.pairs.query[short[:1]])[0]
            raise ConfigError(
                describe(
                    "sampler.hard_negatives",
                    wanted,
                    f"{len(short)} rows have fewer, the first is '{name}' with {held[short[0]]}",
                    f"Use at most {held[used].min()}, or mine more, or leave those rows out of the data.",
                )
            )

    # ----------------------------------------------------------------------------------- which pools a step draws

    def _window(self, window: int) -> list[list[str]]:
        """Stream names of the pools of each step of a window of `window_steps` steps."""
        settings, steps, pools = self.settings, self.settings.window_steps, self.settings.pools_per_batch
        if settings.arm == "mixed":
            return [["mixed"] * pools] * steps
        rng = generator(self.seed, _WINDOW, window)
        mono_of_step = self._mono_pools_of_steps(rng, steps)
        languages = self._language_slots(rng, int(mono_of_step.sum()))
        return [[f"mono:{next(languages)}" for _ in range(mono)] + ["cross"] * (pools - mono) for mono in mono_of_step]

    def _mono_pools_of_steps(self, rng: np.random.Generator, steps: int) -> np.ndarray:
        """[steps] number of mono pools of each step; a scheduled step is one pool, mono or not."""
        if self.settings.composition == "composed":
            return np.full(steps, self.settings.mono_pools)
        if self.settings.draws == "independent":
            return (rng.random(steps) < self.mono_share).astype(np.int64)
        return rng.permutation(np.arange(steps) < round(self.mono_share * steps)).astype(np.int64)

    def _language_slots(self, rng: np.random.Generator, count: int) -> Iterator[str]:
        """`count` languages by weight: systematic sampling (each within one of its exact share) or independent draws."""
        if count == 0:
            return iter(())
        borders = np.cumsum(self.language_weights)
        points = rng.random(count) if self.settings.draws == "independent" else (rng.random() + np.arange(count)) / count
        chosen = np.minimum(np.searchsorted(borders, points, side="right"), len(self.languages) - 1)
        return iter([self.languages[i] for i in rng.permutation(chosen)])

    def _pools_before(self, window: int) -> np.ndarray:
        """[streams] pools drawn before the window. Counts forward from the last window asked for (or from the start)."""
        at, counts = self._counted
        if at > window:
            at, counts = 0, np.zeros_like(counts)
        names = list(self.streams)
        for passed in range(at, window):
            for plan in self._window(passed):
                for name in plan:
                    counts[names.index(name)] += 1
        self._counted = (window, counts.copy())
        return counts.copy()

    def pools(self, step: int) -> list[tuple[str, int]]:
        """(stream, pool number) of each pool of a step."""
        window, place = divmod(step, self.settings.window_steps)
        counts = dict(zip(self.streams, self._pools_before(window).tolist(), strict=True))
        drawn: list[tuple[str, int]] = []
        for position, plan in enumerate(self._window(window)[: place + 1]):
            for name in plan:
                if position == place:
                    drawn.append((name, counts[name]))
                counts[name] += 1
        return drawn

    # ------------------------------------------------------------------------------------------------- the batch

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of optimiser step `step` (0-based)."""
        pools = self.pools(step)
        rows = [self.streams[name].pool(number) for name, number in pools]
        queries, positives = (np.concatenate(side) for side in zip(*rows, strict=True))
        row_offsets = np.concatenate([[0], np.cumsum([len(side[0]) for side in rows])])
        return assemble(
            self.pairs, step, tuple(name for name, _ in pools), queries, positives, row_offsets, self._negatives(step, positives)
        )

    def _negatives(self, step: int, rows: np.ndarray) -> np.ndarray:
        """[N, hard_negatives] passage numbers, drawn without repetition from each row's list."""
        wanted = self.settings.hard_negatives
        if not wanted:
            return np.empty((len(rows), 0), np.int64)
        rng = generator(self.seed, _NEGATIVES, step)
        starts, ends = self.pairs.negative_offsets[rows], self.pairs.negative_offsets[rows + 1]
        return np.stack([self.pairs.negatives[s + rng.permutation(e - s)[:wanted]] for s, e in zip(starts, ends, strict=True)])

    def describe(self) -> dict[str, object]:
        """What a global batch and an epoch hold, for a person to read before the first step."""
        settings = self.settings
        mono_pools = settings.pools_per_batch * self.mono_share
        return {
            "arm": settings.arm,
            "composition": settings.composition,
            "rows per global batch": settings.global_batch,
            "pools per global batch": f"{settings.pools_per_batch} of {settings.pool_rows} rows",
            "mono rows per global batch": mono_pools * settings.pool_rows,
            "pools": {name: f"{s.pool_rows} rows of {sum(x.size for x in s.strata):,} pairs" for name, s in self.streams.items()},
            "steps per epoch of each stream": {
                name: round(sum(x.size for x in s.strata) / (s.pool_rows * self._pools_per_step(name)), 1)
                for name, s in self.streams.items()
            },
        }

    def _pools_per_step(self, name: str) -> float:
        """Pools that a step draws from a stream, on average."""
        pools = self.settings.pools_per_batch
        if name == "mixed":
            return pools
        if name == "cross":
            return pools * (1.0 - self.mono_share)
        return pools * self.mono_share * float(self.language_weights[self.languages.index(name.partition(":")[2])])


def assemble(
    pairs: Pairs,
    step: int,
    pools: tuple[str, ...],
    query_rows: np.ndarray,
    passage_rows: np.ndarray,
    row_offsets: np.ndarray,
    negatives: np.ndarray,
) -> GlobalBatch:
    """Rows and their hard negatives [N, h] -> columns per pool and unique texts."""
    passage_of_row = np.asarray(pairs.passage[passage_rows])
    columns: list[np.ndarray] = []
    hard: list[np.ndarray] = []
    row_column = np.empty(len(query_rows), np.int64)
    offsets = [0]
    for start, end in pairwise(row_offsets):
        drawn = negatives[start:end].ravel()
        held, inverse = np.unique(np.concatenate([passage_of_row[start:end], drawn]), return_inverse=True)
        row_column[start:end] = offsets[-1] + inverse[: end - start]
        is_hard = np.zeros(len(held), bool)
        is_hard[inverse[end - start :]] = True
        columns.append(held)
        hard.append(is_hard)
        offsets.append(offsets[-1] + len(held))
    column_passage = np.concatenate(columns)
    queries, row_text = np.unique(pairs.query[query_rows], return_inverse=True)
    passages, column_text = np.unique(column_passage, return_inverse=True)
    return GlobalBatch(
        step=step,
        pools=pools,
        row_offsets=row_offsets,
        column_offsets=np.asarray(offsets),
        row_text=row_text,
        row_column=row_column,
        row_family=np.asarray(pairs.family[query_rows]),
        column_text=column_text + len(queries),
        column_family=np.asarray(pairs.passage_family[column_passage]),
        column_is_hard=np.concatenate(hard),
        queries=queries,
        passages=passages,
        query_rows=query_rows,
        passage_rows=passage_rows,
    )
