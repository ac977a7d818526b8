"""The floors of the package: who may import whom, where each heavy library lives, what imports without torch.

Reads the sources (every import counts, in functions too) and imports the torch-free set in a process where torch is refused.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_MODULES = 25
"""Far fewer than there are: guards against a walk that finds nothing."""

PLANNING = tuple(
    f"planning.{name}"
    for name in ("architecture", "hardware", "zero", "costs", "speed", "forecast", "search", "planner", "table")
)
"""In their order: each may import those before it."""
PLAIN = (
    "errors",
    "languages",
    "config",
    "runs",
    "signals",
    "command_line",
    "launched",
    "versions",
    *PLANNING,
    "statistics",
    "protocols",
    "pages",
)
"""The ground without torch."""
GROUND = (*PLAIN, "gpu", "dist", "checkpoints", "base_files")
MATERIALS = (*GROUND, "data", "model")
STUDY = ("study", "study.jobs", "study.results", "study.report")
"""In their order, as PLANNING."""
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "languages": ("errors",),
    "config": ("errors", "languages"),
    "runs": ("errors", "config"),
    "command_line": (),
    **{part: ("errors", "config", *PLANNING[:level]) for level, part in enumerate(PLANNING)},
    "gpu": ("errors",),
    "launched": ("errors",),
    "versions": ("errors",),
    "signals": (),
    "dist": ("errors", "config", "gpu", "launched", "signals"),
    "checkpoints": ("errors", "config", "runs", "dist"),
    "base_files": ("errors", "config", "dist"),
    "statistics": ("errors",),
    "protocols": (),
    "pages": ("pages",),
    "data": (*GROUND, "data"),
    "model": (*GROUND, "model"),
    "train": (*MATERIALS, "train"),
    "retrieval": (*MATERIALS, "retrieval"),
    "retrieval.baselines": (*MATERIALS, "retrieval", "retrieval.baselines"),
    "retrieval.tradeoff": (*MATERIALS, "retrieval", "retrieval.tradeoff"),
    **{part: (*PLAIN, *STUDY[: level + 1]) for level, part in enumerate(STUDY)},
    "launch": (*MATERIALS, "train", "retrieval", "retrieval.baselines", "retrieval.tradeoff", *STUDY),
}
"""Part -> the parts it may import; a module belongs to the longest name that fits. Nothing imports `launch`, itself included."""

HOMES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("hybrid_scale/train/engine.py", "hybrid_scale/model/stream.py"),
    "accelerate": ("hybrid_scale/train/engine.py",),
    "torch.distributed": ("hybrid_scale/dist.py",),
    "faiss": (
        "hybrid_scale/retrieval/index.py",
        "hybrid_scale/retrieval/tradeoff/indexes.py",
        "hybrid_scale/retrieval/tradeoff/variants.py",
    ),
    "bitsandbytes": ("hybrid_scale/model/",),
    "peft": ("hybrid_scale/model/",),
}
"""Library -> the files (or folders, ending in /) that may import it."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

TORCH_FREE = (
    *(*PLAIN, "study", "retrieval.metrics", "retrieval.bias"),
    *("retrieval.measures", "retrieval.trec", "retrieval.store", "retrieval.stored"),
    *("data.records", "data.files", "data.folder", "data.numbers", "data.prepared", "data.writing"),
    *("data.sampler", "data.strata", "data.shuffle", "data.partition", "data.sources"),
)
"""Modules (or packages with all they hold) that work on a login node without torch."""
BLOCKED = ("torch", "transformers", "deepspeed", "accelerate", "peft", "bitsandbytes", "faiss")


def part_of(name: str) -> str:
    """The row of MAY_IMPORT that a module belongs to, by its dotted name; without a row: its folder, or itself."""
    inside = name.removeprefix("hybrid_scale.")
    rows = [row for row in MAY_IMPORT if f"{inside}.".startswith(f"{row}.")]
    return max(rows, key=len, default=inside.split(".")[0])


@dataclass(frozen=True)
class Module:
    name: str
    """Dotted, e.g. hybrid_scale.train.loss or launch.train."""
    path: str
    """Relative to the repository's root, with slashes."""
    tree: ast.Module

    @property
    def part(self) -> str:
        return part_of(self.name)


@dataclass(frozen=True)
class Import:
    module: str
    name: str | None
    """`name` in `from module import name`."""
    line: int


def read_modules(root: Path) -> list[Module]:
    modules = []
    for path in sorted([*root.glob("hybrid_scale/**/*.py"), *root.glob("launch/**/*.py")]):
        relative = path.relative_to(root)
        dotted = relative.with_suffix("").parts
        name = ".".join(dotted[:-1] if dotted[-1] == "__init__" else dotted)
        modules.append(Module(name, relative.as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(relative))))
    return modules


def imports_of(module: Module) -> Iterator[Import]:
    """Every import at any depth, `importlib.import_module("literal")` included. A relative import has module ''."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import("" if node.level else node.module or "", alias.name, node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, None, node.lineno)


def target_of(found: Import, names: set[str]) -> str:
    """The module that an import reaches: `from hybrid_scale.data import records` is hybrid_scale.data.records."""
    whole = f"{found.module}.{found.name}"
    return whole if found.name and whole in names else found.module


def floor_faults(modules: list[Module]) -> list[str]:
    """Imports upwards, sideways, relative, of `launch` or of a package as a whole."""
    names = {module.name for module in modules}
    faults = []
    for module in modules:
        allowed = MAY_IMPORT.get(module.part)
        for found in imports_of(module):
            where = f"{module.path}:{found.line}"
            target = target_of(found, names)
            first = target.split(".")[0]
            if not found.module:
                faults.append(f"{where}: relative import of {found.name}; write the whole path")
            if first not in ("hybrid_scale", "launch"):
                continue
            if allowed is None:
                faults.append(f"{where}: '{module.part}' has no row in MAY_IMPORT")
            elif part_of(target) not in allowed:
                faults.append(f"{where}: '{module.part}' may not import {target}")
    return faults


def reexport_faults(modules: list[Module]) -> list[str]:
    """`from hybrid_scale.x import name` where x doesn't define `name` itself."""
    defined = {module.name: names_defined_in(module.tree) for module in modules}
    faults = []
    for module in modules:
        for found in imports_of(module):
            if found.module not in defined or not found.name or f"{found.module}.{found.name}" in defined:
                continue
            if found.name not in defined[found.module]:
                faults.append(f"{module.path}:{found.line}: {found.module} doesn't define '{found.name}' itself")
    return faults


def names_defined_in(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def home_faults(modules: list[Module]) -> list[str]:
    """A heavy library imported, or `torch.distributed` reached through `torch`, outside its home."""
    faults = []
    for module in modules:
        reached = [(found.line, path) for found in imports_of(module) for path in (found.module, f"{found.module}.{found.name}")]
        reached += [
            (node.lineno, "torch.distributed")
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
        for library, homes in HOMES.items():
            at_home = any(module.path == home or (home.endswith("/") and module.path.startswith(home)) for home in homes)
            lines = sorted({line for line, path in reached if path == library or path.startswith(f"{library}.")})
            if not at_home:
                faults += [f"{module.path}:{line}: {library} lives in {' and '.join(homes)}" for line in lines]
    return faults


def launcher_faults(modules: list[Module]) -> list[str]:
    """The launcher's variables named outside dist.py and launched.py."""
    return [
        f"{module.path}:{node.lineno}: '{node.value}' is read in dist.py alone"
        for module in modules
        if module.path not in ("hybrid_scale/dist.py", "hybrid_scale/launched.py")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and node.value in LAUNCHER_VARIABLES
    ]


def cycle_in(modules: list[Module]) -> list[str]:
    """The modules of one import cycle; empty when there is none."""
    names = {module.name for module in modules}
    graph = {module.name: {target_of(found, names) for found in imports_of(module)} & names for module in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules(ROOT)


def test_the_walk_sees_the_package(modules: list[Module]) -> None:
    names = {module.name for module in modules}
    assert len(modules) >= MINIMUM_MODULES
    assert {"hybrid_scale.errors", "hybrid_scale.config", "hybrid_scale.runs", "hybrid_scale.dist", "launch"} <= names
    assert sum(1 for module in modules for _ in imports_of(module)) >= 5 * MINIMUM_MODULES


def test_imports_go_down_only(modules: list[Module]) -> None:
    assert floor_faults(modules) == []


def test_no_import_cycle(modules: list[Module]) -> None:
    assert cycle_in(modules) == []


def test_names_are_imported_from_where_they_are_defined(modules: list[Module]) -> None:
    assert reexport_faults(modules) == []


def test_init_files_are_empty(modules: list[Module]) -> None:
    packages = [module for module in modules if module.path.endswith("__init__.py")]
    assert len(packages) >= 6
    assert [module.path for module in packages if (ROOT / module.path).read_text(encoding="utf-8").strip()] == []


def test_heavy_libraries_stay_at_home(modules: list[Module]) -> None:
    assert home_faults(modules) == []


def test_launcher_variables_are_read_in_dist_alone(modules: list[Module]) -> None:
    assert launcher_faults(modules) == []


REFUSE_AND_IMPORT = """
import importlib, sys

blocked = set(sys.argv[1].split(","))

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Refuse())
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def import_blocked(names: list[str]) -> str:
    """What fails when `names` are imported, one after another, in a process without BLOCKED."""
    command = [sys.executable, "-c", REFUSE_AND_IMPORT, ",".join(BLOCKED), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_free_modules_import_without_torch(modules: list[Module]) -> None:
    prefixes = tuple(f"hybrid_scale.{name}" for name in TORCH_FREE)
    names = [m.name for m in modules if m.name in prefixes or m.name.startswith(tuple(f"{prefix}." for prefix in prefixes))]
    assert {"hybrid_scale.config", "hybrid_scale.runs", "hybrid_scale.data.records"} <= set(names)
    assert import_blocked(names) == ""


def test_blocking_is_effective() -> None:
    assert "hybrid_scale.dist: ModuleNotFoundError: torch" in import_blocked(["hybrid_scale.dist"])


def write_tree(root: Path, **sources: str) -> list[Module]:
    """Modules from sources keyed by path with __ for / (`train__loss` is hybrid_scale/train/loss.py)."""
    for key, source in sources.items():
        base = root if key.startswith("launch__") else root / "hybrid_scale"
        path = base.joinpath(*key.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return read_modules(root)


@pytest.mark.parametrize(
    ("key", "source", "fault"),
    [
        ("data__records", "from hybrid_scale.model import pooling", "'data' may not import hybrid_scale.model"),
        ("train__loop", "import hybrid_scale.retrieval.index", "'train' may not import hybrid_scale.retrieval.index"),
        ("study__grid", "def f():\n    from hybrid_scale.dist import rank", "'study' may not import hybrid_scale.dist"),
        ("study__grid", "from hybrid_scale.data.records import x", "'study' may not import hybrid_scale.data.records"),
        ("planning__costs", "import hybrid_scale.planning.speed", "'planning.costs' may not import hybrid_scale.planning.speed"),
        (
            "study__jobs__queue",
            "import hybrid_scale.study.report.plots",
            "'study.jobs' may not import hybrid_scale.study.report.plots",
        ),
        ("config", "from hybrid_scale import runs", "'config' may not import hybrid_scale"),
        ("train__loop", "from launch.train import main", "'train' may not import launch.train"),
        ("launch__train", "import launch.plan", "'launch' may not import launch.plan"),
        ("train__loop", "from . import loss", "relative import of loss"),
        ("data__sources__hub", "import importlib\nimportlib.import_module('hybrid_scale.train.loss')", "'data' may not import"),
        ("extra", "import hybrid_scale.errors", "'extra' has no row"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, key: str, source: str, fault: str) -> None:
    faults = floor_faults(write_tree(tmp_path, **{key: source}))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("key", "source", "library"),
    [
        ("train__loop", "def f():\n    import deepspeed.comm", "deepspeed"),
        ("train__engine", "import torch.distributed as c10d", "torch.distributed"),
        ("train__engine", "from torch import distributed", "torch.distributed"),
        ("train__engine", "import torch\nx = torch.distributed.get_rank()", "torch.distributed"),
        ("retrieval__evaluate", "import faiss", "faiss"),
        ("launch__train", "from peft import PeftModel", "peft"),
        ("train__loop", "from accelerate.utils import gather", "accelerate"),
    ],
)
def test_a_library_abroad_is_found(tmp_path: Path, key: str, source: str, library: str) -> None:
    faults = home_faults(write_tree(tmp_path, **{key: source}))
    assert len(faults) == 1
    assert f": {library} lives in " in faults[0]


def test_other_faults_are_found(tmp_path: Path) -> None:
    modules = write_tree(
        tmp_path,
        train__loss="from hybrid_scale.train.gradcache import Path\nimport os\nworld = os.environ['WORLD_SIZE']",
        train__gradcache="from pathlib import Path\nimport hybrid_scale.train.loss",
    )
    assert reexport_faults(modules) == ["hybrid_scale/train/loss.py:1: hybrid_scale.train.gradcache doesn't define 'Path' itself"]
    assert launcher_faults(modules) == ["hybrid_scale/train/loss.py:3: 'WORLD_SIZE' is read in dist.py alone"]
    assert set(cycle_in(modules)) == {"hybrid_scale.train.loss", "hybrid_scale.train.gradcache"}
