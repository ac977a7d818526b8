"""A tiny random decoder with a tokenizer trained on prepared data, for trials on a CPU.

python launch/tiny_model.py data/demo/train --out models/tiny
"""

import argparse
import sys
from pathlib import Path

from hybrid_scale.command_line import read_arguments
from hybrid_scale.data.folder import new_directory
from hybrid_scale.data.prepared import Pairs
from hybrid_scale.errors import HybridScaleError, explain
from hybrid_scale.model.tiny import write_model, write_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared pairs whose texts train the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = read_arguments(parser)
    if min(given.heads, given.layers, given.hidden) < 1 or given.hidden % (2 * given.heads):
        parser.error(
            f"--hidden {given.hidden} must be a multiple of twice --heads {given.heads}, --layers {given.layers} at least 1"
        )
    try:
        pairs = Pairs(given.data)
        texts = (text for table in (pairs.queries, pairs.passages) for text in table.column("text"))
        with new_directory(given.out, "a model") as beside:
            tokenizer = write_tokenizer(texts, beside, given.vocabulary)
            model = write_model(beside, len(tokenizer), given.hidden, given.layers, given.heads, given.seed)
    except (HybridScaleError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    print(f"{given.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
