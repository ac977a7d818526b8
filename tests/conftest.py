"""What every test may rely on, also under a bare `pytest`: no GPU, no hub, one thread, caches of its own, the same examples.

pytest --hypothesis-profile=random      other examples of the property tests than the ones that are always run
"""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.notes import NOTES

CACHES = tempfile.mkdtemp(prefix="hybrid-scale-tests-")
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)

# Read when libraries are imported, hence set here and not by a fixture.
os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HOME=f"{CACHES}/huggingface",
    HF_HUB_OFFLINE="1",
    MTEB_CACHE=f"{CACHES}/mteb",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
# Of a job or a launcher that these tests run in. HS_CLUSTER: tests/cluster.sh.
INHERITED = re.compile(
    r"(SLURM|SBATCH|SQUEUE|HS(?!_CLUSTER$)|ACCELERATE|FSDP|PMI|OMPI|MV2)_.*|(LOCAL_)?(RANK|WORLD_SIZE|SIZE)"
    r"|MASTER_(ADDR|PORT)|HF_(DATASETS|HUB)_CACHE"
)
for name in filter(INHERITED.fullmatch, list(os.environ)):
    del os.environ[name]

# No clock: a busy machine may take any time for an example, or for drawing one.
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **SLOW)
settings.register_profile("random", print_blob=True, **SLOW)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait more than they compute come first, so that under pytest-xdist another worker computes meanwhile."""
    waiting = [Path(__file__).parent / place for place in ("study/jobs", "train")]
    items.sort(key=lambda item: not any(item.path.is_relative_to(place) for place in waiting))


def pytest_sessionfinish(session: Any) -> None:
    """Under pytest-xdist the tests run in worker processes, which hand their notes to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = NOTES


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    NOTES.extend(getattr(node, "workeroutput", {}).get("notes", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for note in NOTES:
        terminalreporter.write_line(note, yellow=note.startswith("NO "), bold=True)
