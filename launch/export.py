"""Write a trained run as a folder that other programs load.

    python launch/export.py RUN_DIRECTORY --to FOLDER --format sentence-transformers
    python launch/export.py RUN_DIRECTORY --to FOLDER --format adapter merged --step 400

adapter: PEFT's layout; sentence-transformers: a folder for SentenceTransformer(FOLDER), adapter merged; merged: plain
transformers weights with a tokenizer. Several formats become folders under FOLDER. Nothing is overwritten; nothing is
uploaded without --push (the token of HF_TOKEN or `hf auth login`; a new repository is private).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hybrid_scale.checkpoints import complete, damage, folder_name, latest
from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import RunConfig
from hybrid_scale.data.text import for_evaluation, load_text_encoder
from hybrid_scale.errors import HybridScaleError, RunError, describe, explain
from hybrid_scale.model.digests import check_trained_on, model_digests
from hybrid_scale.model.export import export, push
from hybrid_scale.model.trained import FORMATS, Merging, Trained
from hybrid_scale.model.weight_files import say
from hybrid_scale.runs import RunDirectory, read_json


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["sentence-transformers"], help="one or several")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the latest)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of merged weights (default: model.dtype of the run)")
    parser.add_argument("--merge-into", choices=("original", "nf4"), default="original", help="nf4: the weights of a QLoRA run")
    parser.add_argument("--shard-size", type=float, default=1.0, metavar="GB", help="largest weight file (default 1)")
    parser.add_argument("--base", metavar="NAME", help="the base's name on the Hub, where the run's base is a folder")
    parser.add_argument("--license", default="other", help="licence of the model card (default other)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to this Hub repository")
    chosen = read_arguments(parser, given)
    if chosen.shard_size <= 0:
        parser.error("--shard-size must be above 0")
    if chosen.push and (len(chosen.format) > 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", chosen.push)):
        parser.error("--push takes USER/NAME and one --format")
    return chosen


def open_run(chosen: argparse.Namespace) -> Trained:
    run = RunDirectory(chosen.run)
    config = run.config()
    folder = run.checkpoints / folder_name(chosen.step) if chosen.step is not None else latest(run)
    reason = "there is none" if folder is None or not folder.is_dir() else damage(folder)
    if folder is None or reason:
        steps = [int(path.name.removeprefix("step_")) for path in complete(run)]
        rule = f"no whole checkpoint ({reason}); complete are those of steps {steps}"
        remedy = "Train the run, or choose another one."
        raise RunError(describe(str(run.checkpoints), chosen.step if chosen.step is not None else "latest", rule, remedy))
    step = int(folder.name.removeprefix("step_"))
    manifest = read_json(run.manifest_file) if run.manifest_file.exists() else {}
    weights, spoken = folder / "adapter", languages(config)
    say(*filter(None, [check_trained_on(folder, config, model_digests(config.model))]))
    texts = for_evaluation(load_text_encoder(config), config.evaluation)
    scores = read_scores(run, step, last=step == config.training.max_steps)
    fingerprint = manifest.get("data", {}).get("fingerprint")
    return Trained(config, weights, step, texts, chosen.base, spoken, fingerprint, scores, chosen.license)


def read_scores(run: RunDirectory, step: int, last: bool) -> tuple[dict[str, Any], ...]:
    """Results of this step: `eval/SET.json` belongs to the last one, `eval/SET.step-N.json` to step N."""
    found = sorted(run.evaluations.glob("*.json" if last else f"*.step-{step}.json"))
    results = [read_json(path) for path in found if not last or ".step-" not in path.name]
    return tuple(result for result in results if "metrics" in result)


def languages(config: RunConfig) -> tuple[str, ...]:
    manifest = Path(config.data.train) / "manifest.json"
    return config.sampler.languages or (tuple(read_json(manifest)["languages"]) if manifest.is_file() else ())


def main(given: list[str] | None = None) -> int:
    chosen = arguments(given)
    try:
        trained = open_run(chosen)
        dtype = chosen.dtype or ("bfloat16" if trained.config.model.dtype == "bfloat16" else "float32")
        merging = Merging(dtype, int(chosen.shard_size * 1e9), chosen.merge_into)
        for format in chosen.format:
            folder = chosen.to if len(chosen.format) == 1 else chosen.to / format
            export(trained, format, folder, merging)
            print(f"step {trained.step} as {format}: {folder}")
        if chosen.push:
            print(push(chosen.to, chosen.push))
    except (HybridScaleError, OSError) as error:
        print(explain(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
