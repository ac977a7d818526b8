"""The table of private names: whole, true of what is installed, and what is said where it isn't."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hybrid_scale import versions
from hybrid_scale.errors import RunError
from hybrid_scale.versions import TABLE, TRIED, Private, check
from tests.test_repository import constraints, project

ROOT = Path(__file__).resolve().parent.parent
OWN = {"_exit"}
"""Of Python."""


def private_names(path: Path) -> set[str]:
    """Attributes with one leading underscore that a file asks of anything but its own objects."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    } - OWN


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    listed = {word for row in TABLE for word in re.split(r"[.:@]", row.name)}
    files = [ROOT / "hybrid_scale" / "dist.py", *(ROOT / "hybrid_scale" / "model").glob("*.py")]
    files += (ROOT / "hybrid_scale" / "train").glob("*.py")
    used = {name: path.name for path in files for name in private_names(path)}
    own = {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(used) > 8
    assert {name: path for name, path in used.items() if name not in listed | own} == {}


def test_no_row_stands_twice_and_each_says_what_breaks() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE) > 40
    assert {row.package for row in TABLE} == set(TRIED)
    assert all(row.breaks and row.used_by.endswith(".py") for row in TABLE)


def test_ranges_are_those_of_the_project() -> None:
    ranges = {canonicalize_name(wanted.name): wanted.specifier for wanted in map(Requirement, project()["dependencies"])}
    for package, (low, high) in TRIED.items():
        assert {str(part) for part in ranges[canonicalize_name(package)]} == {f">={low}", f"<{high}"}, package
        assert ranges[canonicalize_name(package)].contains(constraints()[canonicalize_name(package)])


def test_what_is_installed_has_every_name() -> None:
    assert check(TRIED) == []


@pytest.mark.parametrize("name", ["torch.distributed:_gone", "torch.gone:x", "torch.nn:Module._gone", "torch.nn:Module@_gone"])
def test_an_absent_name_is_refused_with_the_version_that_has_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(versions, "TABLE", (Private("torch", name, "dist.py", "ranks don't meet", since="2.13.1"),))
    with pytest.raises(RunError) as caught:
        check(["torch"])
    said = str(caught.value)
    assert f"dist.py needs {name}, seen since 2.13.1, which it lacks; without it ranks don't meet." in said
    assert said.endswith("Install torch>=2.13.1,<2.14.")
    assert "\n" not in said


@pytest.mark.parametrize(("found", "warned"), [("2.13.0+cpu", False), ("2.13.7", False), ("2.12.1", True), ("2.14.0.dev1", True)])
def test_an_untried_version_is_warned_of(monkeypatch: pytest.MonkeyPatch, found: str, warned: bool) -> None:
    monkeypatch.setattr(versions, "version", lambda package: found)
    said = [f"torch {found} was not tried (torch>=2.13,<2.14 was); it has every name that is needed"]
    assert check(["torch"]) == (said if warned else [])


def test_an_absent_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise versions.PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", absent)
    with pytest.raises(RunError, match=r"peft: found 'not installed'; must be peft>=0.21,<0.22. Install it."):
        check(["peft"])
