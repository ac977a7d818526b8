"""A step whose numbers are not finite -> an error that names it, and files from which it can be computed again.

`failures/step_N/batch.json` says what was wrong where; `adapter/` beside it holds the weights before the step (written by the
caller). The batch itself is a function of config, data and step.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hybrid_scale.data.partition import Plan
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.sampler import GlobalBatch
from hybrid_scale.errors import RunError
from hybrid_scale.runs import write_json

SHOWN = 5


@dataclass(frozen=True)
class Failure:
    """What was found not finite, on which ranks; `texts` number the batch's texts, all of those ranks if none is known."""

    what: str
    ranks: list[int]
    texts: list[int]
    parameters: list[str]


def ranks_of(plan: Plan, texts: list[int]) -> list[int]:
    """Ranks that embed any of these texts."""
    wanted = set(texts)
    return [rank for rank, batches in enumerate(plan.micro_batches) if wanted & set(np.concatenate(batches).tolist())]


def texts_of(plan: Plan, ranks: list[int]) -> list[int]:
    """Texts that these ranks embed."""
    return sorted(int(text) for rank in ranks for text in np.concatenate(plan.micro_batches[rank]))


def names_of(pairs: Pairs, batch: GlobalBatch, texts: list[int]) -> list[str]:
    """`query ID` or `passage ID` of each text of the batch."""
    count = len(batch.queries)
    queries = pairs.queries.column("id", batch.queries[[t for t in texts if t < count]])
    passages = pairs.passages.column("id", batch.passages[[t - count for t in texts if t >= count]])
    return [f"query {name}" for name in queries] + [f"passage {name}" for name in passages]


def describe_failure(failure: Failure, step: int, names: list[str], folder: Path) -> RunError:
    """The error that every rank raises. `step` counts from 1, as in metrics.jsonl."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    parts = [f"step {step}: {failure.what} not finite on rank {', '.join(map(str, failure.ranks))}"]
    if failure.parameters:
        parts.append(f"parameters {', '.join(failure.parameters[:SHOWN])}")
    parts.append(f"rows: {', '.join(names[:SHOWN])}{more}")
    return RunError(f"{'; '.join(parts)}. No update was made. Look with: launch/train.py CONFIG --replay {folder}")


def write_failure(folder: Path, failure: Failure, step: int, world: int, names: list[str]) -> None:
    """`batch.json` in `folder`; `step` counts from 0, as the sampler does."""
    write_json(folder / "batch.json", {"step": step, "world_size": world, **asdict(failure), "rows": names})
