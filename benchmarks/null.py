"""How often a study of arms that don't differ says that they do: the primary family's error, by the shipped functions.

    python benchmarks/null.py [--studies 300] [--json PATH]

Made-up studies of the default family: two sizes, hybrid alpha 0.5 against mono and cross, nine metrics, at the
larger size and as a change: 36 claims, all of them false. Six arms (or three) of three seeds, 1,190 questions.
The difference of two arms on a question varies by what the arms make of that question and by what each training
makes of it, with a standard deviation of 0.13 together; a training moves all its questions by a seed effect.

Prints for each standard deviation of seeds: the share of studies with a false "better" or "worse" (the family-wise
error) and the number of them a study, by the former rule (Holm over p of questions alone, then an interval of
questions and seeds from three seeds' own variance) and by the primary family; and the share of studies with a
false "equivalent" where every true difference is the margin itself. Exit code 1: an error of the primary family
lies above 0.05 by more than two standard errors. Rows "uneven" break the assumption that all arms scatter alike:
the compared arms' seeds vary twice as much as the others'. They are printed, not judged.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
from scipy import stats

from hybrid_scale.statistics import holm, seed_spread
from hybrid_scale.study.results.comparisons import Comparison
from hybrid_scale.study.results.crossed import SeedChance, crossed
from hybrid_scale.study.results.primary import Claim, adjusted, change, combined, difference
from hybrid_scale.study.results.scores import METRICS, Metric
from hybrid_scale.study.results.verdicts import ALPHA, Level, margin_of

QUESTIONS = 1190
SEEDS = 3
METRIC_COUNT = 9
RIVALS = ("mono", "cross")
SIZES = (("7b", 7.6e9), ("72b", 72.7e9))
OF_ARM, OF_TRAINING = 0.05, 0.08
"""Standard deviations per question: of an arm at a size, of one training."""
SCORE, MARGIN = 0.7, 0.01
METRIC = METRICS["ndcg@10"]


@dataclass(frozen=True)
class World:
    """What chance does in a made-up study."""

    seed_sd: float
    arms: int = 6
    uneven: float = 1.0
    """Variance of the compared arms' seeds, in that of the other arms."""


def comparisons(world: World, metric: Metric, task: str, random: np.random.Generator, shift: float = 0.0) -> Iterator[Comparison]:
    """Hybrid against both rivals at both sizes on one metric; every true difference is `shift` at the larger size, else 0."""
    for place, (model, size) in enumerate(SIZES):
        own = np.sqrt(world.uneven)
        moved = random.normal(0, world.seed_sd * own, (3, SEEDS, 1))
        cells = random.normal(0, OF_ARM, (3, 1, QUESTIONS)) + random.normal(0, OF_TRAINING, (3, SEEDS, QUESTIONS)) + moved
        others = random.normal(0, np.hypot(world.seed_sd, OF_TRAINING / np.sqrt(QUESTIONS)), (world.arms - 3, SEEDS))
        pool = SeedChance.pooled([*cells.mean(2), *others])
        for rival, name in enumerate(RIVALS, start=1):
            parts = (cells[0] - cells[rival] + shift * place) / QUESTIONS
            level = Level(SCORE, SCORE, None, 1.0)
            chance = pool.of_difference() if pool else None
            yield Comparison(
                *(task, f"model {model}", "", model, size, "hybrid", name, name, metric),
                seed_spread(parts.sum(1).tolist()),
                both=crossed(parts, chance),
                chance=chance,
                level=level,
                margin=margin_of([level], MARGIN),
                parts=pd.DataFrame(parts.T, columns=range(SEEDS)),
            )


def family(world: World, random: np.random.Generator, shift: float = 0.0) -> tuple[list[Claim], list[np.ndarray]]:
    """The 36 claims of one study, adjusted, and the shares [S, G] behind each."""
    found, shares = [], []
    for number in range(METRIC_COUNT):
        task = f"set {number}"
        members = list(comparisons(world, METRIC, task, random, shift))
        for rival in RIVALS:
            smaller, larger = (each for each in members if each.rival == rival)
            facts = (task, "", "hybrid", rival, METRIC)
            names, sizes = zip(*SIZES, strict=True)
            found.append(difference(facts, larger.model, larger.size, larger))
            found.append(change(facts, names, sizes, (smaller, larger), MARGIN))
            both, _ = combined([smaller, larger], np.array([-1.0, 1.0]))
            assert larger.parts is not None
            assert both is not None
            shares += [larger.parts.to_numpy().T, both]
    return adjusted(found), shares


def false_claims(found: list[Claim]) -> int:
    return sum(claim.outcome in ("better", "worse") for claim in found)


def false_equivalences(found: list[Claim]) -> int:
    return sum(claim.outcome == "equivalent" for claim in found)


def former_claims(shares: list[np.ndarray]) -> int:
    """Of the rule before: p of questions alone, Holm, then a 95 % interval of questions and seeds that leaves out 0."""
    p = [sign_flip_limit(parts.mean(0)) for parts in shares]
    return sum(each <= ALPHA and former_sure(parts) for each, parts in zip(holm(p), shares, strict=True))


def sign_flip_limit(shares: np.ndarray) -> float:
    """p of the sign-flip test of so many questions: the sum is normal with variance sum of squares under random signs."""
    return float(2 * stats.norm.sf(abs(shares.sum()) / np.sqrt((shares**2).sum())))


def former_sure(parts: np.ndarray) -> bool:
    """Two-way random effects with Satterthwaite's degrees of freedom, from these seeds alone."""
    seeds, questions = parts.shape
    cells = parts * questions
    rest = cells - cells.mean(0) - cells.mean(1)[:, None] + cells.mean()
    of_question, of_seed = seeds * cells.mean(0).var(ddof=1), questions * cells.mean(1).var(ddof=1)
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    square = of_question + of_seed - of_rest
    spread = of_question**2 / (questions - 1) + of_seed**2 / (seeds - 1) + of_rest**2 / ((seeds - 1) * (questions - 1))
    square, freedom = max((square, square**2 / spread), (of_question, questions - 1.0), (of_seed, seeds - 1.0))
    return abs(cells.mean()) > stats.t.ppf(1 - ALPHA / 2, freedom) * np.sqrt(square / (seeds * questions))


def row(world: World, studies: int, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    now, before, alike = [], [], []
    for _ in range(studies):
        found, shares = family(world, random)
        now.append(false_claims(found))
        before.append(former_claims(shares))
        moved = [replace(c, both=replace(c.both, estimate=c.both.estimate + (c.margin or 0.0))) if c.both else c for c in found]
        alike.append(false_equivalences(adjusted(moved)))
    shares_of = {"before": np.array(before), "now": np.array(now), "false_equivalence": np.array(alike)}
    return {
        "seed_sd": world.seed_sd,
        "arms": world.arms,
        "uneven": world.uneven,
        "studies": studies,
        **{f"{name}_family_wise": float((counts > 0).mean()) for name, counts in shares_of.items()},
        **{f"{name}_a_study": float(counts.mean()) for name, counts in shares_of.items()},
    }


def limit(studies: int) -> float:
    """ALPHA and two standard errors of a share over so many studies."""
    return float(ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / studies))


WORLDS = (
    *(World(sd) for sd in (0.0, 0.004, 0.008)),
    *(World(sd, arms=3) for sd in (0.0, 0.004, 0.008)),
    World(0.008, uneven=2.0),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage in each Holm correction: 0.24 s with all modules loaded
    print(f"{given.studies} studies of 36 false claims; the error may be at most {limit(given.studies):.3f}")
    print("| seed SD | arms | their seeds | before: studies with a false claim (claims a study) | now | false equivalence |")
    print("|---|---|---|---|---|---|")
    rows = []
    for number, world in enumerate(WORLDS):
        found = row(world, given.studies, number)
        rows.append(found)
        names = ("before", "now", "false_equivalence")
        cells = [f"{found[f'{name}_family_wise']:.3f} ({found[f'{name}_a_study']:.2f})" for name in names]
        about = f"{world.seed_sd:.3f} | {world.arms} | {'equal' if world.uneven == 1 else 'uneven'}"
        print(f"| {about} | {' | '.join(cells)} |", flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"limit": limit(given.studies), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    judged = [found for found in rows if found["uneven"] == 1]
    return int(
        any(max(found["now_family_wise"], found["false_equivalence_family_wise"]) > limit(given.studies) for found in judged)
    )


if __name__ == "__main__":
    sys.exit(main())
