"""A run under `accelerate launch` is asked to stop by signals, and nothing is lost. All of them: benchmarks/stops.py."""

from hybrid_scale.runs import RunDirectory
from tests.train.stops import config_of, go_on, same, stop_once, write_all


def test_ctrl_c_twice_within_a_step_changes_nothing(tmp_path):
    """In a step of 60 s on one rank, for which the other waits in a collective."""
    folder = write_all(tmp_path)
    config = config_of(folder, tmp_path / "run")
    go_on(config_of(folder, tmp_path / "whole"), 1)
    stop_once(config, "step", "SIGINT", 2)
    go_on(config)
    same(RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "whole"))
