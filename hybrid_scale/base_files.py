"""Where the files of a base model lie: a folder, or a snapshot of a Hub repository, fetched once a node and then fixed.

Whoever reads a base asks here, so that tokenizer, config, weights, code and digests are those of one commit even where `main`
moves meanwhile. Knows what the files are called, not what is in them.
"""

import json
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hybrid_scale import dist
from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError, describe

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""What a Hub repository is asked for before anything else; code (`*.py`) only where it may run."""
COMMIT = re.compile(r"[0-9a-f]{7,40}")
MESSAGE_CHARACTERS = 300
FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, HfHubHTTPError.__bases__[0])
"""What the Hub's library raises; the last is the base of its HTTP library's errors, as for a connection cut within a file."""

_folders: dict[tuple[str, str | None], Path] = {}
"""(base, revision) -> the snapshot that this process reads, set when it is first asked for."""
_whole: set[Path] = set()
"""Snapshots whose weights were fetched."""


def locate(settings: ModelSettings, weights: bool = True) -> Path:
    """The folder that holds the files of `model.base`, those of a Hub repository fetched where they aren't cached.

    Without `weights` only what is small is fetched: config, tokenizer, index. Raises ModelError: there is no such folder or
    repository, it can't be reached, or `trust_remote_code` would run code that no commit pins.
    """
    base = Path(settings.base)
    if base.is_dir():
        return base
    if base.is_absolute() or settings.base.startswith((".", "~")):
        raise ModelError(describe("model.base", settings.base, "there is no such folder", "Check the path."))
    _check_pinned(settings)
    key = (settings.base, settings.revision)
    if key not in _folders:
        _folders[key] = _download(settings.base, settings.revision, _small(settings))
    folder = _folders[key]
    if weights and folder not in _whole:
        _download(settings.base, folder.name, _weight_names(folder))
        _whole.add(folder)
    return folder


def fetch(settings: ModelSettings) -> None:
    """Have all files of the base on every node: rank 0 decides the commit, the first rank of each node downloads. Collective.

    Raises ModelError as `locate` does, on every rank.
    """
    commit = dist.first_rank_does(lambda: locate(settings)).name
    dist.together(lambda: _take(settings, commit) if dist.first_of_node() else None)
    dist.together(lambda: _take(settings, commit))


def _take(settings: ModelSettings, commit: str) -> None:
    """Read the base at this commit from now on."""
    key = (settings.base, settings.revision)
    if not Path(settings.base).is_dir() and key not in _folders:
        _folders[key] = _download(settings.base, commit, _small(settings))
    locate(settings)


def code_revision(settings: ModelSettings) -> str | None:
    """The commit from which a base's own code is taken where its config names the repository."""
    return settings.revision if settings.trust_remote_code else None


def _check_pinned(settings: ModelSettings) -> None:
    if settings.trust_remote_code and not COMMIT.fullmatch(settings.revision or ""):
        rule = "with trust_remote_code it must be a commit, which pins the code that will run along with the weights"
        remedy = "Set the commit hash that you have read (`git ls-remote` or the Hub's page lists it)."
        raise ModelError(describe("model.revision", settings.revision, rule, remedy))


def _weight_names(folder: Path) -> tuple[str, ...]:
    """Names of the weight files that a snapshot's index lists, and that of a single one."""
    index = folder / INDEX
    if not index.is_file():
        return (SINGLE,)
    return (SINGLE, *sorted(set(read_index(index).values())))


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, of a checkpoint in several files. Raises ModelError where it isn't such an index."""
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "an index of weight files must hold a `weight_map`"
        raise ModelError(describe(str(path), repr(error), rule, "Copy or download it again.")) from None


def _small(settings: ModelSettings) -> tuple[str, ...]:
    return (*SMALL, "*.py") if settings.trust_remote_code else SMALL


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except FAILURES as error:
        rule = f"it is no folder, and can't be had from the Hub: {_one_line(error)}"
        offline = " HF_HUB_OFFLINE is set: nothing is downloaded." if constants.HF_HUB_OFFLINE else ""
        at = f"{name}@{revision}" if revision else name
        raise ModelError(describe("model.base", at, rule, f"Check name, revision and access.{offline}")) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MESSAGE_CHARACTERS else text[: MESSAGE_CHARACTERS - 3] + "..."
