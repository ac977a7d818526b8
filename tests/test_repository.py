"""The repository itself: what installs it, what it pins, what may not be in it."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
SHARD_GROUP_FILLS = {"stage": 3, "zero_hpz_partition_size": 2}
"""What `training.shard_group: 2` writes over the two "auto" of zero_auto.json."""
CPU_AND_GPU = "cpu and gpu exclude each other"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return dict(tomllib.loads(read("pyproject.toml"))["project"])


def requirements() -> list[Requirement]:
    """Direct dependencies, those of all extras included."""
    extras = project()["optional-dependencies"]
    return [Requirement(line) for line in [*project()["dependencies"], *(line for lines in extras.values() for line in lines)]]


def constraints() -> dict[str, str]:
    """Canonical name -> version, from the lines of constraints.txt that aren't comments."""
    pinned: dict[str, str] = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), f"constraints.txt: {line}: not name==version"
            name, version = line.split("==")
            assert canonicalize_name(name) not in pinned, f"constraints.txt: {name} stands twice"
            pinned[canonicalize_name(name)] = version
    return pinned


# Dependencies


def test_every_dependency_states_its_reason() -> None:
    lines = [line for line in read("pyproject.toml").split("[tool.", 1)[0].splitlines() if re.match(r'\s+"', line)]
    assert len(lines) == len(requirements()) > 20
    assert [line for line in lines if not re.search(r'",\s+# \w.{9,}', line)] == []


def test_every_dependency_is_a_range_and_its_pin_lies_in_it() -> None:
    pinned = constraints()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert requirement.specifier, f"{name}: no range"
        assert not any(part.operator == "==" for part in requirement.specifier), (
            f"{name}: exact versions belong in constraints.txt"
        )
        assert name in pinned, f"{name}: not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{name}: {pinned[name]} is outside {requirement.specifier}"


def test_faiss_has_two_exclusive_extras() -> None:
    extras = project()["optional-dependencies"]
    owners = {extra: [line for line in lines if "faiss" in line] for extra, lines in extras.items()}
    assert {extra for extra, lines in owners.items() if lines} == {"cpu", "gpu"}
    assert not any("faiss" in line for line in project()["dependencies"])
    conflicts = tomllib.loads(read("pyproject.toml"))["tool"]["uv"]["conflicts"]
    assert conflicts == [[{"extra": "cpu"}, {"extra": "gpu"}]]


# Installation


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what .ci/install reads, with a venv whose python only notes its arguments in `calls`."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/install", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    interpreter = tmp_path / "venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\n')
    interpreter.chmod(0o755)
    return tmp_path


def install(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / ".ci/install"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False)


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_install_is_constrained_and_happens_once(checkout: Path) -> None:
    for _ in range(2):
        assert install(checkout, "venv", "cpu", "dev").returncode == 0
    (call,) = calls(checkout)
    assert "-m pip install" in call
    assert "--constraint constraints.txt --editable .[cpu,dev]" in call
    assert install(checkout, "venv", "cpu").stdout == ""
    assert len(calls(checkout)) == 1, "a part of what is installed needs no install"


def test_install_keeps_earlier_extras_and_notices_changes(checkout: Path) -> None:
    install(checkout, "venv", "cpu")
    install(checkout, "venv", "dev")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    install(checkout, "venv", "cpu")
    assert [call.rsplit(" ", 1)[1] for call in calls(checkout)] == [".[cpu]", ".[cpu,dev]", ".[cpu,dev]"]


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    interpreter = checkout / "venv/bin/python"
    good = interpreter.read_text()
    interpreter.write_text("#!/bin/sh\nexit 1\n")
    failed = install(checkout, "venv", "cpu")
    assert failed.returncode == 2
    assert "pip failed" in failed.stderr
    interpreter.write_text(good)
    assert install(checkout, "venv", "cpu").returncode == 0
    assert len(calls(checkout)) == 1


@pytest.mark.parametrize(("first", "second"), [(("cpu", "gpu"), ()), (("gpu", "dev", "cpu"), ()), (("cpu",), ("gpu",))])
def test_install_refuses_cpu_and_gpu_together(checkout: Path, first: tuple[str, ...], second: tuple[str, ...]) -> None:
    done = install(checkout, "venv", *first)
    if second:
        assert done.returncode == 0
        done = install(checkout, "venv", *second)
    assert done.returncode == 2
    assert CPU_AND_GPU in done.stderr


def test_install_says_what_is_wrong(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    assert "usage: .ci/install VENV" in install(checkout).stderr
    assert "unknown extra 'cuda'. Known: cpu, gpu, dev, bench, eval." in install(checkout, "venv", "cuda").stderr
    assert "is Python 3.9.2; Python 3.11 or newer is needed" in install(checkout, "new", "cpu", PYTHON=str(old)).stderr
    assert "no 'python9.9' on PATH" in install(checkout, "new", "cpu", PYTHON="python9.9").stderr
    assert calls(checkout) == []


def dockerfile_steps() -> list[str]:
    """Instructions, continuation lines joined, comments dropped."""
    lines = [line for line in read("Dockerfile").splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def test_dockerfile_installs_by_the_same_script_without_root() -> None:
    steps = dockerfile_steps()
    installs = [index for index, step in enumerate(steps) if step.startswith("RUN .ci/install ")]
    assert len(installs) == 1
    assert steps[installs[0]].split()[2:4] == ["/opt/venv", "gpu"]
    users = [index for index, step in enumerate(steps) if step.startswith("USER ")]
    assert len(users) == 1, "set once, never back to root"
    assert users[0] < installs[0]
    assert steps[users[0]].split()[1] not in ("root", "0")
    assert not any(re.search(r"\bpip3? install", step) for step in steps)
    environment = " ".join(step for step in steps if step.startswith("ENV "))
    assert "PATH=/opt/venv/bin:" in environment
    assert "HF_HOME=" in environment
    assert "TORCH_EXTENSIONS_DIR=" in environment


def test_dockerfile_copies_what_exists_and_what_the_install_needs() -> None:
    copied = [name for step in dockerfile_steps() if step.startswith("COPY ") for name in step.split()[1:-1] if name[0] != "-"]
    assert {"pyproject.toml", "constraints.txt", ".ci/install", "LICENSE"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = read(".dockerignore").split()
    assert not set(copied) & set(ignored)
    assert ".git" in ignored


def test_dockerfile_has_the_cuda_release_that_torch_was_built_for() -> None:
    (base,) = [step.split()[1] for step in dockerfile_steps() if step.startswith("FROM ")]
    image = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04", base)
    assert image, f"{base}: not an exact tag with a compiler"
    assert image[1] == ".".join(constraints()["cuda-toolkit"].split(".")[:2])


@pytest.mark.parametrize("target", ["install", "quickstart", "test", "lint", "format", "bench", "clean", "help"])
def test_make_knows_its_targets(target: str) -> None:
    if not shutil.which("make"):
        pytest.skip("make isn't installed")
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_shell_script_parses() -> None:
    scripts = shell_scripts()
    assert {ROOT / ".ci/install", ROOT / ".ci/run"} <= set(scripts)
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        assert script.suffix or os.access(script, os.X_OK), f"{script.name}: not executable"


def shell_scripts() -> list[Path]:
    return [path for folder in (".ci", "slurm", "tests") for path in (ROOT / folder).glob("*") if is_shell(path)]


def test_shell_scripts_pass_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck isn't installed (.ci/run installs it)")
    command = ["shellcheck", "--shell=bash", *(str(path) for path in shell_scripts())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("works", [True, False])
def test_ci_installs_its_tools_or_says_what_it_skipped(tmp_path: Path, root: bool, works: bool) -> None:
    """With stand-ins for make, apt-get, sudo and id: what is asked for, and the last lines where that fails."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = tmp_path / "bin"
    tools.mkdir()
    install = (
        f'for tool in "$@"; do [ "$tool" = chromium ] && ln -s /bin/true {tools}/chromium; done; exit 0' if works else "exit 100"
    )
    programs = {
        "make": 'echo "make $1"',
        "id": f"echo {0 if root else 1000}",
        "sudo": '[ "$1" = -n ] && shift && "$@"',
        "apt-get": f'echo "apt-get $1 ${{*: -2}}" >>{tmp_path}/asked; {install}',
    }
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "env", "dirname", "ln"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [str(tmp_path / ".ci" / "run")], env={"PATH": str(tools)}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("make")] == ["make install", "make lint", "make test"]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0].startswith("apt-get update")
    assert asked[1:] == (["apt-get install shellcheck chromium"] if works else [])
    skipped = [line for line in done.stderr.splitlines() if line.startswith("SKIPPED")]
    left = ["SKIPPED: shell scripts were only parsed: no shellcheck", "SKIPPED: the report was not drawn: no Chromium"]
    assert skipped == (left[:1] if works else left)  # the stand-in installs Chromium alone


def is_shell(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:40].split(b"\n")[0] in (b"#!/usr/bin/env bash", b"#!/bin/bash")


# DeepSpeed configurations


def test_there_are_four_deepspeed_configs() -> None:
    assert [path.name for path in DS_CONFIGS] == ["zero2.json", "zero3.json", "zero3_offload.json", "zero_auto.json"]


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_config_is_complete(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["gradient_clipping"] == "auto", "DeepSpeed clips at 1.0 when it is missing; the run config fills it in"
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1, (
        "the step's plan counts, not DeepSpeed"
    )
    assert config["bf16"] == config["fp16"] == {"enabled": False}, "a bf16 engine accumulates gradients in bf16"
    assert config["zero_allow_untested_optimizer"] is True, "the optimizer comes from the trainer"
    assert "optimizer" not in config
    assert "scheduler" not in config
    zero = config["zero_optimization"]
    automatic = {key for key, value in walk(config) if value == "auto"}
    if path.stem == "zero_auto":
        assert automatic == {"gradient_clipping", *(f"zero_optimization.{key}" for key in SHARD_GROUP_FILLS)}
    else:
        assert zero["stage"] == int(path.stem[4])
        assert automatic == {"gradient_clipping"}
    floats = [key for key, value in walk(config) if isinstance(value, float)]
    assert floats == [], "sizes are integers"
    if path.stem.endswith("offload"):
        assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}
        assert config["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed refuses a client optimizer with offload otherwise"


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_knows_every_zero_key(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    known = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}
    assert set(zero) <= known
    if path.stem == "zero_auto":
        zero |= SHARD_GROUP_FILLS
    assert DeepSpeedZeroConfig(**zero).stage == zero["stage"]


def walk(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# What may not be in the repository

FOREIGN = {
    "path of one machine": [f"/{name}/" for name in ("work", "root", "home/runner")] + ["/" + "opt/wheels", "/" + "opt/pypi"],
    "package index": [".".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))],
    "index option": ["--" + "index-url", "--" + "extra-index-url", "--" + "find-links", "file:" + "///"],
}


def foreign_in(text: str) -> list[str]:
    return [f"{kind} {pattern}" for kind, patterns in FOREIGN.items() for pattern in patterns if pattern in text]


def tracked_files() -> list[Path]:
    """Files of the commit and those about to be added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout, so there are no tracked files to search")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_machine_or_an_index() -> None:
    files = tracked_files()
    assert len(files) > 30
    faults = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in files
        for fault in foreign_in(path.read_bytes().decode("utf-8", "ignore"))
    ]
    assert faults == []


def test_foreign_text_is_found() -> None:
    assert foreign_in("torch @ file:" + "///x") == ["index option file:" + "///"]
    assert foreign_in("/" + "work/main") != []
    assert foreign_in("launch/train.py, framework/x") == []
