"""What names a base model: a digest of each file that its vectors depend on. Reads files, loads no weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybrid_scale import dist
from hybrid_scale.base_files import locate
from hybrid_scale.config import ModelSettings, RunConfig
from hybrid_scale.errors import RunError
from hybrid_scale.model.weight_files import weight_files
from hybrid_scale.runs import read_json

WHOLE_BYTES = 16 * 2**20
"""Files of a base model up to this size are hashed whole, larger ones by samples."""
SAMPLES, SAMPLE_BYTES = 64, 2**16
READ = (
    *("config.json", "quantised.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
)
"""Beside weights, `*.model` and code: the files of a base from which model or tokenizer are made."""
SINCE_FIRST = ("merges.txt", "vocab.txt", ".py")
"""Ends of names that the first checkpoints didn't note."""


def model_digests(settings: ModelSettings) -> dict[str, str]:
    """`SIZE:SHA256` of each file that the base's vectors depend on: small files whole, weights by 64 samples of 64 KiB.

    Of a Hub repository everything is fetched first. Raises ModelError: the base can't be had, or lacks weights.
    """
    folder = locate(settings)
    weights = {path.name for path in weight_files(folder)}
    code = {path.name for path in folder.glob("*.py")} if settings.trust_remote_code else set()
    files = [path for path in sorted(folder.iterdir()) if path.name in weights | code or _is_read(path.name)]
    return {path.name: f"{path.stat().st_size}:{_sampled(path)}" for path in files}


def agreed_digests(settings: ModelSettings) -> dict[str, str]:
    """`model_digests`, which must be the same on every node. Collective. Raises RunError where they aren't."""
    found = dist.together(lambda: model_digests(settings) if dist.first_of_node() else None)
    nodes = [digests for digests in dist.gather_objects(found) if digests is not None]
    for other in nodes[1:]:
        if lines := changes(nodes[0], other):
            raise RunError(f"{settings.base}: the nodes hold different copies of the base: {'; '.join(lines)}.")
    first: dict[str, str] = nodes[0]
    return first


def _is_read(name: str) -> bool:
    return name in READ or name.endswith(".model")


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs between two bases, one line a file: `model NAME: before -> now`. Files that nothing reads don't count."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        counts = _is_read(name) or name.endswith((".safetensors", ".py"))
        unnoted = name not in before and name.endswith(SINCE_FIRST) and not any(n.endswith(SINCE_FIRST) for n in before)
        if counts and not unnoted and before.get(name) != now.get(name):
            lines.append(f"model {name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}")
    return lines


def check_trained_on(checkpoint: Path, config: RunConfig, now: Mapping[str, str]) -> str | None:
    """Compare a checkpoint's base with the one that is here, `now`; None where they agree.

    Raises RunError where they differ; with `training.resume_despite: [model]` the difference is returned, to be said.
    """
    noted = read_json(checkpoint / "trainer.json")["model"]
    lines = changes(noted, now)
    if not lines:
        return None
    found = f"{config.model.base}: this is another base than {checkpoint} was trained on: {'; '.join(lines)}."
    if "model" in config.training.resume_despite:
        return f"warning: training.resume_despite: {found}"
    remedy = "Put the base of the training back, or pin it (model.revision)."
    raise RunError(f"{found} The adapter would be added to the wrong weights. {remedy}")


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        for start in np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
