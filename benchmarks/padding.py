"""Lock-step efficiency of plans, by simulation: real tokens / executed tokens, every rank waiting for the slowest in each round.

    python benchmarks/padding.py [--passages xquad-r/*.json.gz --tokenizer models/gemma3-270m] [--budget 2048] [--json OUT.json]

No model runs. Global batches are drawn with replacement from the given texts: XQuAD(-R) JSON files (one a language; the one
named `en` alone gives the English rows) or one directory of prepared pairs. Without them lengths are log-normal with the mean
and variation of XQuAD-R under Mistral's tokenizer (passages 186.6 and .45, questions 16 and .3, sentences 39.5 and .53,
passages of 11 languages 475 and .69), which the output says. Texts are cut at 512 tokens, begin and end token included.

peers        queries and passages apart, in mini-batches of 8, padded to the longest of the rank's own batch
mini-batch   the same, each mini-batch padded to its own longest (sentence-transformers 6 in its cached loss)
local sort   the rank's texts sorted by length, then in mini-batches of 8
padded       our plan for attention that needs padding
packed       our plan for texts put end to end
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _ranks import machine
from transformers import AutoTokenizer

from hybrid_scale.data.partition import Budget, partition
from hybrid_scale.data.prepared import Pairs

CUT = 512
MINI_BATCH = 8
SETTINGS = ((8, 64), (8, 256), (32, 64), (64, 32))
"""Ranks, pairs (or texts) of each."""
BATCHES = 20
GOALS = {(32, 64): 0.95, (8, 256): 0.98}
GOALS_OF = ("passages, en", "pairs, en")
PREPARED_ROWS = 20_000
RESULTS = Path(__file__).parent / "results" / "padding.json"


@dataclass(frozen=True)
class Material:
    """Token lengths of the columns of a row: (passages,), or (queries, passages) of pairs; equally long arrays."""

    name: str
    columns: tuple[np.ndarray, ...]

    def draw(self, world: int, each: int, rng: np.random.Generator) -> list[np.ndarray]:
        """A global batch: of each column [W, each]."""
        rows = rng.integers(len(self.columns[0]), size=(world, each))
        return [column[rows] for column in self.columns]


# ------------------------------------------------------------------------------------------------------------ materials


def log_normal(mean: float, variation: float, count: int = 20_000) -> np.ndarray:
    """Lengths whose logarithm is normal, with this mean and this standard deviation / mean."""
    variance = math.log1p(variation**2)
    drawn = np.random.default_rng(1).normal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    return np.clip(np.rint(np.exp(drawn)), 3, CUT).astype(np.int64)


def assumed() -> Iterator[Material]:
    passages, questions = log_normal(186.6, 0.45), log_normal(16.0, 0.3)[::-1]
    yield Material("passages, en (assumed)", (passages,))
    yield Material("pairs, en (assumed)", (questions, passages))
    yield Material("sentences, en (assumed)", (log_normal(39.5, 0.53),))
    yield Material("pairs, 11 languages (assumed)", (questions, log_normal(475.0, 0.69)))


def of_files(files: list[Path], lengths: Callable[[list[str]], np.ndarray]) -> Iterator[Material]:
    """XQuAD's JSON: passages, question + passage pairs and sentences of the file `en`, pairs of all files."""
    questions, contexts = [], []
    for file in sorted(files):
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as stream:
            paragraphs = [p for article in json.load(stream)["data"] for p in article["paragraphs"]]
        asked = [len(p["qas"]) for p in paragraphs]
        passage = lengths([p["context"] for p in paragraphs])
        questions.append(lengths([qa["question"] for p in paragraphs for qa in p["qas"]]))
        contexts.append(np.repeat(passage, asked))
        if file.name.partition(".")[0] == "en":
            yield Material("passages, en", (passage,))
            yield Material("pairs, en", (questions[-1], contexts[-1]))
            if all("sentences" in p for p in paragraphs):
                yield Material("sentences, en", (lengths([s for p in paragraphs for s in p["sentences"]]),))
    if len(files) > 1:
        yield Material(f"pairs, {len(files)} languages", (np.concatenate(questions), np.concatenate(contexts)))


def of_pairs(folder: Path, lengths: Callable[[list[str]], np.ndarray]) -> Material:
    """Rows of a prepared training set, evenly picked."""
    pairs = Pairs(folder)
    rows = np.linspace(0, len(pairs.query) - 1, min(PREPARED_ROWS, len(pairs.query))).astype(np.int64)
    queries = lengths(pairs.queries.column("text", np.asarray(pairs.query[rows])))
    return Material(f"pairs, {folder.name}", (queries, lengths(pairs.passages.column("text", np.asarray(pairs.passage[rows])))))


def materials(given: argparse.Namespace) -> list[Material]:
    if not given.passages or not given.tokenizer:
        print("No --passages and --tokenizer: log-normal lengths instead of real ones.")
        return list(assumed())
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)

    def lengths(texts: list[str]) -> np.ndarray:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return np.minimum([len(row) + 2 for row in ids], CUT)  # begin and end token

    folders = [path for path in given.passages if path.is_dir()]
    files = [path for path in given.passages if path.is_file()]
    return [*of_files(files, lengths), *(of_pairs(folder, lengths) for folder in folders)]


# ------------------------------------------------------------------------------------------------------------ strategies


def lockstep(costs: np.ndarray) -> int:
    """Executed tokens of mini-batches [W, rounds] if all ranks wait for the slowest of each round."""
    return len(costs) * int(costs.max(axis=0).sum())


def padded_to_own(lengths: np.ndarray) -> np.ndarray:
    """[W, n] -> [W, rounds]: cost of mini-batches of 8 in the given order, each padded to its own longest."""
    groups = np.array_split(lengths, range(MINI_BATCH, lengths.shape[1], MINI_BATCH), axis=1)
    return np.stack([group.max(axis=1) * group.shape[1] for group in groups], axis=1)


def padded_to_local(lengths: np.ndarray) -> np.ndarray:
    """The same with the longest of the rank's whole batch."""
    sizes = np.diff([*range(0, lengths.shape[1], MINI_BATCH), lengths.shape[1]])
    return lengths.max(axis=1, keepdims=True) * sizes[None, :]


def executed(batch: list[np.ndarray], budget: int) -> dict[str, int]:
    """Executed tokens of a global batch under each strategy."""
    world = len(batch[0])
    local = -np.sort(-np.concatenate(batch, axis=1), axis=1)
    together = np.concatenate([column.ravel() for column in batch])
    return {
        "peers": lockstep(np.concatenate([padded_to_local(column) for column in batch], axis=1)),
        "mini-batch": lockstep(np.concatenate([padded_to_own(column) for column in batch], axis=1)),
        "local sort": lockstep(padded_to_own(local)),
        "padded": partition(together, world, Budget(budget, packed=False)).lockstep_tokens,
        "packed": partition(together, world, Budget(budget)).lockstep_tokens,
    }


def simulate(material: Material, world: int, each: int, budget: int) -> dict[str, float]:
    """Efficiency of each strategy over a number of global batches, and the plans' CPU-microseconds a text."""
    rng = np.random.default_rng(0)
    drawn = [material.draw(world, each, rng) for _ in range(BATCHES)]
    real = sum(int(column.sum()) for batch in drawn for column in batch)
    counted = [executed(batch, budget) for batch in drawn]
    result = {name: real / sum(count[name] for count in counted) for name in counted[0]}
    texts = [np.concatenate([column.ravel() for column in batch]) for batch in drawn]
    for name, packed in (("padded", False), ("packed", True)):
        start = time.process_time()
        for lengths in texts:
            partition(lengths, world, Budget(budget, packed=packed))
        result[f"{name} us/text"] = 1e6 * (time.process_time() - start) / sum(map(len, texts))
    return result


# --------------------------------------------------------------------------------------------------------------- report


def table(material: Material, results: dict[str, dict[str, float]]) -> str:
    means = " + ".join(f"{column.mean():.1f}" for column in material.columns)
    names = list(next(iter(results.values())))
    lines = [f"\n{material.name}, {means} tokens in the mean", f"  {'':12}" + "".join(f"{setting:>10}" for setting in results)]
    for name in names:
        form = "10.1f" if name.endswith("text") else "10.3f"
        lines.append(f"  {name:14}"[:14] + "".join(f"{result[name]:{form}}" for result in results.values()))
    return "\n".join(lines)


def goals(results: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Of English passages, alone and with their questions, measured or assumed."""
    found = []
    for name, by_setting in results.items():
        if name.startswith(GOALS_OF):
            for (world, each), limit in GOALS.items():
                for way in ("packed", "padded"):
                    value = by_setting[f"{world}x{each}"][way]
                    what = f"{name}, {world}x{each}, {way}"
                    found.append({"what": what, "value": value, "limit": limit, "met": value >= limit})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--passages", nargs="+", type=Path, help="XQuAD JSON files (.gz or not), or directories of prepared pairs"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a micro-batch in our plans")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for material in materials(given):
        results[material.name] = {f"{w}x{b}": simulate(material, w, b, given.budget) for w, b in SETTINGS}
        print(table(material, results[material.name]), flush=True)
    met = goals(results)
    print(f"\nranks x rows; micro-batches of {given.budget} tokens in our plans; {BATCHES} global batches each")
    for goal in met:
        verdict = "met   " if goal["met"] else "MISSED"
        print(f"  {verdict}  {goal['what']}: {goal['value']:.4f}, goal >= {goal['limit']}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(given.json.read_text()) if given.json.is_file() else {}
    facts = {"machine": machine(), "budget": given.budget, "cut": CUT}
    measured = {name: {**facts, "efficiency": by_setting} for name, by_setting in results.items()}
    given.json.write_text(json.dumps({**kept, **measured}, indent=1) + "\n")
    print(given.json)


if __name__ == "__main__":
    main()
