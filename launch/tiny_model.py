"""A tiny random decoder with a tokenizer trained on prepared data, for trials on a CPU.

python launch/tiny_model.py data/demo/train --out models/tiny
"""

import argparse
import sys
from pathlib import Path

from hybrid_scale.data.prepared import Pairs
from hybrid_scale.errors import HybridScaleError, ModelError, describe, explain
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
    given = parser.parse_args()
    try:
        if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
            found = "a non-empty folder" if given.out.is_dir() else "a file"
            raise ModelError(describe(str(given.out), found, "a model is never overwritten", "Choose another --out."))
        pairs = Pairs(given.data)
        texts = (text for table in (pairs.queries, pairs.passages) for text in table.column("text"))
        tokenizer = write_tokenizer(texts, given.out, given.vocabulary)
        model = write_model(given.out, len(tokenizer), given.hidden, given.layers, given.heads, given.seed)
    except (HybridScaleError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    print(f"{given.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
