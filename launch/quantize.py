"""Quantise a model once: python launch/quantize.py MODEL OUT [--dtype bfloat16] [--revision REV] [--hash]

OUT then stands in for MODEL as `model.base` of a QLoRA run (`model.quantization: nf4`): each rank reads its own bytes of it and
quantises nothing. Written one tensor at a time, on a GPU if there is one. Repeated, it says that OUT is there already.
"""

import argparse
import sys
from pathlib import Path

from hybrid_scale.command_line import read_arguments
from hybrid_scale.errors import HybridScaleError, explain
from hybrid_scale.model.quantize import quantize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hugging Face id of a model in 16 or 32 bits")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="model.dtype of the runs to come")
    parser.add_argument("--revision")
    parser.add_argument("--hash", action="store_true", help="note a hash of all source bytes as well (reads them once more)")
    given = read_arguments(parser)
    try:
        manifest = quantize(given.model, given.out, given.dtype, given.revision, given.hash)
    except (HybridScaleError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    held = sum(path.stat().st_size for path in given.out.glob("*.safetensors"))
    print(f"{given.out}: {held / 1e9:.2f} GB in 4 bits from {manifest['source']['bytes'] / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
