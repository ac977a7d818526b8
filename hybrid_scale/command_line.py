"""How the scripts in launch/ read their arguments: options, files and key=value in any order. Knows no setting.

The `deepspeed` launcher and `python -m torch.distributed.launch` add --local_rank=N to the command of every process. The
environment says the same, so that the option is accepted and not read.
"""

import argparse
import sys
from collections.abc import Sequence
from types import TracebackType


def read_arguments(
    parser: argparse.ArgumentParser, given: Sequence[str] | None = None, into: argparse.Namespace | None = None
) -> argparse.Namespace:
    """The arguments `given` (None: those of this process), added to `into`. Ends the process with code 2 if they are wrong.

    From here on Ctrl-C ends it with a line where nobody catches it; whatever is made inside a `with` is taken away first.
    """
    sys.excepthook = _interrupted
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(given, into)


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook without a traceback for KeyboardInterrupt, after which Python ends by SIGINT (130 in a shell)."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)
