from pathlib import Path

import pytest

from hybrid_scale.planning.hardware import GPUS, Cluster
from hybrid_scale.planning.planner import plan_run
from hybrid_scale.runs import RunDirectory, write_json
from hybrid_scale.study.grid import plan_study
from hybrid_scale.study.results.collect import collect
from hybrid_scale.study.results.usage import allocated_gib, gpu_named, is_gpu, measured
from tests.study.fabricate import fabricated, scaled, write_study


def test_costs_of_a_run_by_hand() -> None:
    records = [
        {"step": 5, "seconds": 4.0, "peak_gib": 1.5},
        {"step": 10, "seconds": 1.0, "peak_gib": 2.5},
        {"step": 15, "seconds": 1.0, "peak_gib": 2.0},
    ]
    assert measured(records) == {
        "steps": 15,
        "step_seconds": 2.0,
        "median_step_seconds": 1.0,
        "training_seconds": 30.0,
        "peak_gib": 2.5,
    }
    assert measured([])["training_seconds"] is None


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA B200", None),
    ],
)
def test_devices_are_known_by_the_drivers_names(device: str, name: str | None) -> None:
    assert gpu_named(device) == (GPUS[name] if name else None)
    assert is_gpu(device)


def test_the_prediction_is_the_planners(tmp_path: Path) -> None:
    plan = scaled(tmp_path, models=["7B"], seeds=[0], questions=4)
    row = collect(plan).runs.iloc[0]
    expected = plan_run(plan.runs[0].config, Cluster(GPUS["h100"], 1, 8))
    assert row["predicted_step_seconds"] == expected.seconds.total
    assert row["predicted_gib"] == allocated_gib(expected)
    # the planner's own total holds 2 lines more: what CUDA takes and what the allocator holds in reserve
    assert row["predicted_gib"] * 2**30 < expected.memory
    assert row["predicted_device_hours"] == expected.gpu_hours
    assert row["device_hours"] == pytest.approx((0.5 + 0.4 * 7) * 20 * 8 / 3600)
    assert row["size"] == expected.architecture.encoder


def test_what_cant_be_predicted_says_why(tmp_path: Path) -> None:
    plan = fabricated(tmp_path)
    for run, device in zip(plan.runs, ("x86_64", "NVIDIA B200", None), strict=False):
        write_json(RunDirectory(run.directory).manifest_file, {"world_size": 2, "device": device})
    rows = collect(plan).runs
    assert list(rows["not_predicted"])[:3] == [
        "x86_64: the planner knows GPUs alone",
        "NVIDIA B200 isn't in the planner's table",
        "not started, and the study names no site.gpu_type",
    ]
    assert rows["predicted_gib"].isna().all()


def test_before_the_start_the_site_names_the_gpu(tmp_path: Path) -> None:
    study = write_study(tmp_path, seeds=[0], site={"gpu_type": "a100"})
    row = collect(plan_study(study)).runs.iloc[0]
    expected = plan_run(plan_study(study).runs[0].config, Cluster(GPUS["a100-80"], 1, 1))
    assert row["predicted_step_seconds"] == expected.seconds.total
    assert row["device_hours"] != row["device_hours"]  # null: nothing was measured
