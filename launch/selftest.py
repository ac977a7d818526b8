"""The first command on a new cluster: accelerate launch --use_deepspeed --num_processes 8 ... launch/selftest.py

Takes a minute and needs neither data nor a model. Prints each rank's GPU, then whether collectives, the checkpoints' own group,
4-bit weights, attention and one step of QLoRA under ZeRO-3 give what they must, and how fast the network is. Start it as the
training will be started: in a Slurm job with the same nodes. Exit code 0: all good; 2: the listed checks failed.
"""

import argparse
import sys

from hybrid_scale import dist
from hybrid_scale.command_line import read_arguments
from hybrid_scale.train.selftest import report


def check() -> None:
    said = report()
    if dist.rank() == 0:
        print(said, flush=True)


def main() -> int:
    read_arguments(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    return dist.run_door(check)


if __name__ == "__main__":
    sys.exit(main())
