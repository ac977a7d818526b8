"""Train one run: accelerate launch launch/train.py CONFIG.yaml [section.key=value ...] [--dry-run [--ranks N] | --replay FAILURE]

A text is taken as it was typed: model.query_prompt="Query: " keeps its space, model.query_prompt= is an empty text.
Exit code 0: done; 2: a setting or an input is wrong; 3: stopped by a signal (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1) or the time limit
with a checkpoint of the last finished step, start again to go on; 4: another rank died, hangs or failed (the message says which),
start again to go on from the last checkpoint; 130: a second Ctrl-C came before the state could be saved.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hybrid_scale.signals import LISTENER, NOTICE, REQUESTS

if __name__ == "__main__":
    LISTENER.start((*REQUESTS, NOTICE))  # loading the libraries takes seconds, in which Ctrl-C is no traceback either

from hybrid_scale import dist
from hybrid_scale.command_line import read_arguments
from hybrid_scale.config import RunConfig, load_config
from hybrid_scale.data.text import TextEncoder
from hybrid_scale.errors import ConfigError, HybridScaleError, describe, explain, nearest
from hybrid_scale.retrieval.benchmark import evaluate_run
from hybrid_scale.retrieval.parts import open_sets
from hybrid_scale.retrieval.spill import remove_left
from hybrid_scale.runs import RunDirectory
from hybrid_scale.train.engine import Engine, check
from hybrid_scale.train.replay import replay
from hybrid_scale.train.run import train
from hybrid_scale.train.settle import dry_run
from hybrid_scale.train.watch import EXIT_CODE, RankLost


def evaluate(config: RunConfig, run: RunDirectory, encoder: TextEncoder, engine: Engine, step: int | None) -> None:
    evaluate_run(config, run, encoder, engine.embed, step)


def check_sets(config: RunConfig) -> None:
    """Open what will be scored when the training is over. Raises DataError; ConfigError for names that collide or are unknown."""
    names = [Path(directory).name for directory in config.data.scored]
    for directory in config.data.scored:
        open_sets(directory)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        rule = "results are kept by the folder's name, and these stand for two sets"
        raise ConfigError(describe("data.evaluate", twice, rule, "Rename one, or leave it out."))
    best = config.training.keep_best
    judged = [Path(directory).name for directory in config.data.scored_at(1)]
    if best and best.partition(":")[0] not in judged:
        raise ConfigError(
            describe("training.keep_best", best, "no such set is scored during training", nearest(best.partition(":")[0], judged))
        )


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} ranks: at least 1 is needed")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and every derived number, train nothing"
    )
    parser.add_argument("--ranks", type=positive, default=1, help="with --dry-run: the number of ranks to plan for")
    parser.add_argument("--replay", type=Path, metavar="FAILURE", help="compute a failed step again (runs/.../failures/step_N)")
    arguments = read_arguments(parser)
    LISTENER.quiet = dist.launched_rank() != 0
    failed = True
    try:
        config = load_config(arguments.config, arguments.overrides)
        warnings = check(config)
        if dist.launched_rank() == 0:
            print("".join(f"warning: {warning}\n" for warning in warnings), end="", file=sys.stderr, flush=True)
        if not arguments.replay:
            check_sets(config)
        if arguments.dry_run:
            print(dry_run(config, arguments.ranks))
            return 0
        if arguments.replay:
            print(replay(config, arguments.replay))
            return 0
        dist.start()
        run = RunDirectory(config.run.directory)  # holds its lock until this process ends
        dist.first_rank_does(run.hold)
        dist.first_rank_does(lambda: remove_left(run.embeddings))
        train(config, evaluate)
        failed = False
        return 0
    except RankLost as error:
        print(f"error: rank {dist.launched_rank()}: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the process group can't be taken down with a rank missing
    except (HybridScaleError, OSError) as error:
        if dist.launched_rank() == 0:
            print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        dist.stop(failed)


def leave(code: int) -> NoReturn:
    """End at once. While Python takes itself apart, a thread of ours that comes back from the ranks' store (train.watch) aborts
    the process with SIGABRT after a run that went well.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
