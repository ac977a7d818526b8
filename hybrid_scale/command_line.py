"""How the scripts in launch/ read their arguments: options, files and key=value in any order. Knows no setting.

The `deepspeed` launcher and `python -m torch.distributed.launch` add --local_rank=N to the command of every process. The
environment says the same, so that the option is accepted and not read.
"""

import argparse
from collections.abc import Sequence


def read_arguments(
    parser: argparse.ArgumentParser, given: Sequence[str] | None = None, into: argparse.Namespace | None = None
) -> argparse.Namespace:
    """The arguments `given` (None: those of this process), added to `into`. Ends the process with code 2 if they are wrong."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(given, into)
