"""What names a base model: a digest of each of its files. Reads files, loads no weights."""

import hashlib
from pathlib import Path

import numpy as np
from transformers.utils.hub import cached_file

from hybrid_scale.config import ModelSettings

WHOLE_BYTES = 16 * 2**20
"""Files of a base model up to this size are hashed whole, larger ones by samples."""
SAMPLES, SAMPLE_BYTES = 64, 2**16


def model_digests(settings: ModelSettings) -> dict[str, str]:
    """`SIZE:SHA256` of each file that defines the base model: small files whole, weights by 64 samples of 64 KiB."""
    config = Path(str(cached_file(settings.base, "config.json", revision=settings.revision)))
    files = [path for path in sorted(config.parent.iterdir()) if path.suffix in (".json", ".safetensors", ".model")]
    return {path.name: f"{path.stat().st_size}:{_sampled(path)}" for path in files}


def _sampled(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        for start in np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
