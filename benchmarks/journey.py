"""The whole way of a model: trained, preempted, resumed, exported, loaded by sentence-transformers, scored by both.

    python benchmarks/journey.py [--model models/gemma3-270m --data data/xquad-study/train --set data/xquad-study/xquad_r
                                  --languages en,es,zh] [--json benchmarks/results/journey.json]

QLoRA (NF4) under ZeRO-3 on two CPU processes, the base streamed into their shares. One run goes through; another gets SIGTERM
in the middle, must end with exit code 3 and go on to the same losses and the same adapter, bit for bit. `launch/export.py` writes
it, sentence-transformers encodes a part of a retrieval set (whole parallel groups and passages around them), and
`launch/evaluate.py` scores its vectors and the run itself. Products in float32 throughout: in bfloat16 the two would round
differently. Merged into the dequantised 4-bit weights of the training, the vectors are the same but for rounding; a second row
has the default export (bfloat16, merged into the original weights), which is what people use. Without arguments: a tiny random
decoder on the demo data.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a door in fresh processes is shared with tests/train

import _environment  # noqa: F401
import numpy as np
from _ranks import machine
from safetensors.numpy import load_file

from hybrid_scale.config import RunConfig, load_config
from hybrid_scale.data.prepared import Pairs, RetrievalSet
from hybrid_scale.data.records import Judgment, Passage, Query, Record
from hybrid_scale.data.writing import write_retrieval
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.runs import RunDirectory, read_json
from tests.train.kills import Start, losses

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "launch" / "configs" / "xquad_gemma_qlora.yaml"
MEASURES = ("mono_map", "cross_map", "multi_map", "rank_distance")
LARGEST_VECTOR_DIFFERENCE, LARGEST_MAP_DIFFERENCE = 5e-5, 1e-5
EXPORTS = {"4-bit weights, float32": ["--merge-into", "nf4", "--dtype", "float32"], "default (bfloat16)": ["--dtype", "bfloat16"]}


def door(name: str, *given: str) -> float:
    """Run a door in a process of its own; its seconds. Stops with its output where it fails."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, f"launch/{name}.py", *given], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"launch/{name}.py {' '.join(given)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return time.monotonic() - started


# ---------------------------------------------------------------------------------------------------------------- inputs


def demo_inputs(folder: Path) -> dict[str, Path]:
    """The demo data and a tiny random decoder with a tokenizer trained on it."""
    for split in ("train", "test"):
        door("prepare", "demo", "--split", split, "--languages", "de,en,es,zh", "--out", str(folder / split))
    pairs = Pairs(folder / "train")
    tokenizer = write_tokenizer(pairs.queries.column("text") + pairs.passages.column("text"), folder / "model", vocabulary=4000)
    write_model(folder / "model", len(tokenizer), hidden=128, layers=2, heads=4)
    return {"model": folder / "model", "data": folder / "train", "set": folder / "test"}


def write_part(whole: RetrievalSet, languages: Sequence[str], queries: int, passages: int, folder: Path) -> RetrievalSet:
    """The first `queries` groups that have a query in every language, what is relevant to them, and the first other passages."""
    write_retrieval(_part(whole, set(languages), queries, passages), folder, {"name": f"part of {whole.name}"})
    return RetrievalSet(folder)


def _part(whole: RetrievalSet, languages: set[str], queries: int, passages: int) -> Iterator[Record]:
    ids, groups, spoken, texts = (whole.queries.column(name) for name in ("id", "group", "lang", "text"))
    found: dict[str, set[str]] = {}
    for group, lang in zip(groups, spoken, strict=True):
        found.setdefault(group, set()).add(lang)
    parallel = [group for group, has in found.items() if languages <= has]
    chosen = set(parallel[:queries])
    asked = {n for n, (group, lang) in enumerate(zip(groups, spoken, strict=True)) if group in chosen and lang in languages}
    pids, langs, passage_texts = (whole.corpus.column(name) for name in ("id", "lang", "text"))
    judged = [(int(q), int(p), int(score)) for q, p, score in whole.qrels if int(q) in asked and langs[int(p)] in languages]
    kept = {p for _, p, _ in judged}
    for lang in sorted(languages):
        inside = [n for n, other in enumerate(langs) if other == lang]
        kept.update([n for n in inside if n not in kept][: max(0, passages - len(kept.intersection(inside)))])
    yield from (Query("part", ids[n], spoken[n], texts[n], groups[n]) for n in sorted(asked))
    yield from (Passage("part", pids[n], langs[n], passage_texts[n]) for n in sorted(kept))
    yield from (Judgment("part", ids[q], pids[p], score) for q, p, score in judged)


def config_of(model: Path, data: Path, place: Path, steps: int, rows: int) -> RunConfig:
    languages = read_json(data / "manifest.json")["languages"]
    overrides = {
        **{"run.directory": str(place), "run.name": place.name, "data.train": str(data), "data.evaluate": []},
        **{"sampler.languages": languages, "sampler.global_batch": rows, "sampler.pool_rows": rows // 4},
        **{"model.base": str(model), "model.dtype": "float32", "model.lora.dropout": 0.05, "optimizer.warmup_steps": 2},
        **{"training.max_steps": steps, "training.save_every_steps": steps, "training.log_every_steps": 1},
        **{"training.deepspeed": str(ROOT / "ds_configs" / "zero3.json"), "evaluation.before_training": False},
        **{"evaluation.embedding_dtype": "float32"},  # stored in float16, mAP moves by 4e-5
    }
    return load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


# -------------------------------------------------------------------------------------------------------------- training


def train(config: RunConfig, number: int, stop_after: int | None = None) -> dict[str, Any]:
    """One start on two ranks, with SIGTERM to one of them while step `stop_after` is the last one logged."""
    started = time.monotonic()
    start = Start(config, world=2, number=number, timeout=1800.0)
    assert start.logged_before >= 0
    if stop_after is not None:
        start.wait_for_step(stop_after)
        start.kill([1], signal.SIGTERM)
    codes = start.codes()
    expected = 0 if stop_after is None else 3
    assert codes == [expected] * 2, f"exit codes {codes}\n{start.output()}"
    assert "loaded whole on every rank" not in start.output(), "the base was not streamed"
    status = RunDirectory(config.run.directory).status()
    facts = {"start": number, "exit_codes": codes, "status": status["status"], "resumed_after": start.resumed_after()}
    return {**facts, "step": status["step"], "seconds": round(time.monotonic() - started, 1)}


def adapter(run: RunDirectory, steps: int) -> dict[str, np.ndarray]:
    return load_file(run.checkpoints / f"step_{steps:08d}" / "adapter" / "adapter_model.safetensors")


def train_both_ways(folder: Path, config: Any, steps: int) -> dict[str, Any]:
    """A run that goes through and one that is preempted in the middle; AssertionError unless they end the same."""
    whole, parts = config(folder / "whole"), config(folder / "parts")
    starts = [train(whole, 1), train(parts, 1, stop_after=steps // 2), train(parts, 2)]
    for facts in starts:
        print(json.dumps(facts), flush=True)
    runs = [RunDirectory(part.run.directory) for part in (whole, parts)]
    ours, theirs = (adapter(run, steps) for run in runs)
    assert starts[2]["resumed_after"] == starts[1]["step"] >= steps // 2
    assert losses(runs[0]) == losses(runs[1]), "a loss differs"
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours), "an adapter weight differs"
    curve, records = losses(runs[0]), runs[0].metrics()
    return {
        **{"starts": starts, "first_loss": curve[1], "last_loss": curve[steps], "equal_losses": len(curve)},
        "equal_adapter_weights": int(sum(weight.size for weight in ours.values())),
        "seconds_a_step": round(float(np.median([record["seconds"] for record in records])), 2),
        "peak_gib_a_rank": max(record["peak_gib"] for record in records),
    }


# --------------------------------------------------------------------------------------------------------------- scoring


def encode(exported: Path, part: RetrievalSet, folder: Path) -> float:
    """Vectors by sentence-transformers, as `launch/evaluate.py --embeddings` reads them; its seconds, loading included."""
    from sentence_transformers import SentenceTransformer

    started = time.monotonic()
    model = SentenceTransformer(str(exported), device="cpu")
    folder.mkdir()
    for name, table, way in (("corpus", part.corpus, model.encode_document), ("queries", part.queries, model.encode_query)):
        vectors = way(table.column("text"), batch_size=16, show_progress_bar=False, convert_to_numpy=True)
        np.save(folder / f"{name}.npy", np.asarray(vectors, np.float32))
        (folder / f"{name}_ids.txt").write_text("\n".join(table.column("id")) + "\n", encoding="utf-8")
    return time.monotonic() - started


def our_vectors(run: RunDirectory, part: RetrievalSet, step: int) -> dict[str, np.ndarray]:
    """A few texts of each kind through the run's own model, in one batch a text."""
    import torch

    from hybrid_scale.data.text import load_text_encoder
    from hybrid_scale.model.load import load_embedder

    config = run.config()
    embedder = load_embedder(config.model, 0, run.checkpoints / f"step_{step:08d}" / "adapter").eval()
    encoder, found = load_text_encoder(config), {}
    for name, role, table in (("corpus", "passage", part.corpus), ("queries", "query", part.queries)):
        texts = encoder.encode(role, table.column("text")[:20])  # type: ignore[arg-type]
        with torch.no_grad():
            found[name] = np.concatenate([embedder(**encoder.collate([text])).float().numpy() for text in texts])
    return found


def score(run: RunDirectory, step: int, part: RetrievalSet, folder: Path) -> list[dict[str, Any]]:
    """The run's own measures, then those of each export in sentence-transformers, with their differences to the run's."""
    seconds = door("evaluate", str(part.directory), "--run", str(run.path), "--out", str(folder / "run.json"))
    own, vectors = read_json(folder / "run.json")["metrics"], our_vectors(run, part, step)
    rows = [{"vectors": "this project, the run", **_measures(own), "seconds": round(seconds, 1)}]
    for number, (name, options) in enumerate(EXPORTS.items()):
        place, given = folder / f"export{number}", folder / f"vectors{number}"
        exporting = door("export", str(run.path), "--to", str(place), *options)
        encoding = encode(place, part, given)
        door("evaluate", str(part.directory), "--embeddings", str(given), "--out", str(folder / f"{number}.json"))
        found = read_json(folder / f"{number}.json")["metrics"]
        apart = max(float(np.abs(np.load(given / f"{key}.npy")[:20] - own).max()) for key, own in vectors.items())
        gaps = {key: abs(found[key] - own[key]) for key in MEASURES[:3]}
        rows.append({"vectors": f"sentence-transformers, {name}", **_measures(found), "seconds": round(encoding, 1)})
        rows[-1] |= {"export_seconds": round(exporting, 1), "vector_difference": apart, "map_difference": max(gaps.values())}
    assert rows[1]["vector_difference"] <= LARGEST_VECTOR_DIFFERENCE, rows[1]
    assert rows[1]["map_difference"] <= LARGEST_MAP_DIFFERENCE, rows[1]
    return rows


def _measures(metrics: dict[str, float]) -> dict[str, float]:
    return {key: metrics[key] for key in MEASURES}


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'vectors':<46}" + "".join(f"{name:>14}" for name in (*MEASURES, "map apart", "vectors apart", "seconds")))
    for row in rows:
        cells = [f"{row[key]:.6f}" for key in MEASURES]
        cells += [f"{row[key]:.1e}" if key in row else "-" for key in ("map_difference", "vector_difference")]
        print(f"{row['vectors']:<46}" + "".join(f"{cell:>14}" for cell in (*cells, f"{row['seconds']:.0f}")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder in Hugging Face layout")
    parser.add_argument("--data", type=Path, help="prepared training pairs")
    parser.add_argument("--set", type=Path, help="prepared retrieval set")
    parser.add_argument("--languages", default="de,en,es", help="of the part of the set (default de,en,es)")
    parser.add_argument("--queries", type=int, default=60, help="queries a language (default 60)")
    parser.add_argument("--passages", type=int, default=120, help="passages a language, at least (default 120)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32, help="rows of a global batch (default 32)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    chosen = parser.parse_args()
    given = {"model": chosen.model, "data": chosen.data, "set": chosen.set}
    if any(given.values()) and not all(given.values()):
        parser.error("--model, --data and --set go together")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        inputs = {key: path.resolve() for key, path in given.items()} if chosen.model else demo_inputs(folder)
        os.chdir(ROOT)  # for the processes of the trainer
        part = write_part(
            RetrievalSet(inputs["set"]), chosen.languages.split(","), chosen.queries, chosen.passages, folder / "part"
        )
        config = lambda at: config_of(inputs["model"], inputs["data"], at, chosen.steps, chosen.rows)  # noqa: E731
        trained = train_both_ways(folder, config, chosen.steps)
        rows = score(RunDirectory(folder / "parts"), chosen.steps, part, folder)
    seconds = round(time.monotonic() - started)
    show(rows)
    facts = {"model": inputs["model"].name, "steps": chosen.steps, "rows": chosen.rows, "languages": part.languages}
    sizes = {"queries": len(part.queries), "passages": len(part.corpus), "seconds": seconds}
    print(json.dumps({**facts, **sizes, **{key: value for key, value in trained.items() if key != "starts"}}))
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"machine": machine(), **facts, **sizes, **trained, "scores": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
