"""Variables of launchers, pods, jobs and shells: a rank, one process with what was ignored said, or a refusal."""

import re
from pathlib import Path

import pytest

from hybrid_scale import dist, gpu
from hybrid_scale.errors import RunError
from hybrid_scale.launched import Started, is_rank, settle
from tests.ranks import free_port, run_ranks

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
ONE = "one process: no launcher started it, so these variables are ignored: "


def test_a_rank_of_torchrun() -> None:
    environment = {**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    kept = dict(environment)
    assert settle(environment) == Started(True)
    assert environment == kept


def test_a_rank_of_deepspeeds_launcher_knows_its_machine() -> None:
    environment = {**TORCHRUN, "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert settle(environment).launched
    assert environment["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("left_over", "said"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        ({"WORLD_SIZE": "2"}, ONE + "WORLD_SIZE=2. Start ranks with `accelerate launch` or `torchrun`."),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}, ONE + "WORLD_SIZE=8."),
        ({"RANK": "1"}, ONE + "RANK=1."),
        ({"LOCAL_RANK": "3", "WORLD_SIZE": "4"}, ONE + "LOCAL_RANK=3, WORLD_SIZE=4."),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ONE + "RANK=0, WORLD_SIZE=1."),
        ({"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}, ONE + "SLURM_NTASKS=16."),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS": "4"}, ONE + "LOCAL_WORLD_SIZE=4, SLURM_NTASKS=4."),
    ],
)
def test_one_process_and_what_is_ignored(left_over: dict[str, str], said: str | None) -> None:
    environment = dict(left_over)
    started = settle(environment)
    assert not started.launched
    assert [note.startswith(said or "") for note in started.notes] == ([True] if said else [])
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & environment.keys()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE: found '2'; mpirun or srun may have started 2 of these processes"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_SIZE: found '4'; mpirun may have",
        ),
        ({"MV2_COMM_WORLD_SIZE": "3"}, "MV2_COMM_WORLD_SIZE: found '3'; mpirun may"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS: found '2'; srun may have started 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0"}, "launcher: found 'RANK=0, WORLD_SIZE=2, no LOCAL_RANK'"),
        ({"RANK": "1", "LOCAL_RANK": "x", "WORLD_SIZE": "2"}, "launcher: found 'RANK=1, WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "4"}, "found 'RANK=4, LOCAL_RANK=1, WORLD_SIZE=4'; must be LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR: found ''; 4 ranks must be told where to meet"),
        ({name: TORCHRUN[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}, "MASTER_PORT: found None"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "with --cpu (or use_cpu in its config file) it starts one process, whatever --num_processes says. Say",
        ),
        (
            {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "with a machine without several GPUs, and no flag for ranks, it starts one process",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)) as caught:
        settle(environment)
    assert "\n" not in str(caught.value)


# Accelerate


def test_settings_of_accelerate_are_taken_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "accelerate" / "default_config.yaml"
    neutral = {
        **{"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        **{"ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_MIXED_PRECISION": "no", "FSDP_VERSION": "2"},
        **{"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"},
    }
    environment = {**TORCHRUN, **neutral, "ACCELERATE_CPU_AFFINITY": "1", "PATH": "/bin"}
    assert settle(environment) == Started(True)
    assert environment == {**TORCHRUN, "ACCELERATE_CPU_AFFINITY": "1", "PATH": "/bin"}
    loud = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    said = "ignored, the run's own config counts: ACCELERATE_DEEPSPEED_ZERO_STAGE=3, ACCELERATE_MIXED_PRECISION=bf16, "
    assert settle({**TORCHRUN, **neutral, **loud}).notes == (
        f"{said}ACCELERATE_USE_FSDP=true: flags of accelerate launch or its config file.",
    )
    file.parent.mkdir()
    file.write_text("")
    (note,) = settle({"ACCELERATE_MIXED_PRECISION": "fp8"}).notes
    assert note.endswith(f"ACCELERATE_MIXED_PRECISION=fp8: flags of accelerate launch or its config file (by default {file}).")


def test_a_single_process_of_accelerate_is_known() -> None:
    assert settle({"ACCELERATE_USE_CPU": "False"}) == Started(False, (), False, "accelerate launch for one device")
    by_cpu = settle({"ACCELERATE_USE_CPU": "True"})
    assert (by_cpu.cpu, by_cpu.alone) == (True, "accelerate launch --cpu (or use_cpu in its config file)")


# Joining


def test_cpu_beside_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(gpu, "present", lambda: True)
    with pytest.raises(RunError, match=r"accelerate launch: found '--cpu'; this process sees a GPU"):
        dist.start()


def test_leftovers_are_said_once_and_forgotten(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    dist.start()
    dist.start()
    assert capsys.readouterr().err.count("these variables are ignored: LOCAL_RANK=1, WORLD_SIZE=2.") == 1
    assert (dist.world_size(), dist.launched(), dist.launched_rank(), is_rank()) == (1, False, 0, False)


def test_a_number_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HS_EXPECT_WORLD", "all")
    with pytest.raises(RunError, match="HS_EXPECT_WORLD: found 'all'; must be a number of ranks"):
        dist.start()


def test_a_rank_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The variables of a launcher that ended, in a shell: nobody else comes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "JOIN_SAID_SECONDS", 0.1)
    monkeypatch.setattr(dist, "JOIN_SECONDS", 2.0)
    with pytest.raises(RunError, match=r"rank 0 of 4'; the ranks must meet at 127.0.0.1:\d+ within 2 s .* are to be unset."):
        dist.start()
    assert f"rank 0 of 4 waits for the others at 127.0.0.1:{place['MASTER_PORT']}, at most 2 s" in capfd.readouterr().err


def timeouts() -> list[float]:
    import torch.distributed as c10d

    dist.start(timeout_seconds=4321)
    own = c10d.new_group([0, 1])  # as DeepSpeed makes them: torch's time-out
    groups = (c10d.group.WORLD, own)

    def seconds() -> list[float]:
        return [group._get_backend(dist.torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    before = seconds()
    dist.share_timeout()
    return before + seconds()


def test_groups_of_libraries_wait_as_long_as_ours() -> None:
    for found in run_ranks(timeouts, 2):
        assert found == [4321, 1800, 4321, 4321]
