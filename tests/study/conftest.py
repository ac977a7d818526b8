import os
from pathlib import Path

import pytest

from hybrid_scale.study.grid import Plan, plan_study
from tests.study.fabricate import Known, known_truth, write_study
from tests.study.jobs.fakeslurm import ARMS, MODELS, FakeSlurm
from tests.test_floors import ROOT


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's programs on PATH; the working directory is the checkout."""
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{slurm.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    return slurm


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two arms on one model, scored on a set after the training."""
    return plan_study(write_study(tmp_path, arms=ARMS, seeds=[0], models=MODELS, evaluate=["data/nq"], site={}))


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The study of known truth, judged once for all tests."""
    return Known.of(known_truth(tmp_path_factory.mktemp("truth")))
