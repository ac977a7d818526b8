"""Files in 4 bits, written once: what transformers itself would save, refused where they don't fit a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError
from hybrid_scale.model import nf4, quantize
from hybrid_scale.model.load import load_embedder
from launch import quantize as door
from tests.model.families import BATCH, FAMILIES, config_of, copy_of, merged, same, write_families


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_families(tmp_path_factory.mktemp("quantise"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_written_folder_is_what_transformers_saves(folder, tmp_path, family):
    """Names, types and bytes against `save_pretrained` of the stock 4-bit model; transformers loads ours to the same output."""
    dtype = getattr(torch, FAMILIES[family][2])
    options: dict[str, Any] = {"dtype": dtype, "quantization_config": nf4.nf4(dtype)}
    AutoModel.from_pretrained(folder / family, **options).save_pretrained(tmp_path / "stock")
    ours, theirs = merged(folder / f"{family}-nf4"), merged(tmp_path / "stock")
    assert same({n: t.reshape(-1).view(torch.uint8) for n, t in ours.items()}, bytes_of(theirs))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    written = load_embedder(config_of(folder, f"{family}-nf4").model, 0)
    stock = load_embedder(config_of(folder, family).model, 0)
    assert torch.equal(written(**BATCH), stock(**BATCH))


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def test_files_are_begun_anew_at_a_size(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "FILE_BYTES", 5000)
    quantize.quantize(str(folder / "llama"), tmp_path / "out", "bfloat16")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 10_000 for path in files)
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))


def test_chunks_change_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK", 128)
    quantize.quantize(str(folder / "llama"), tmp_path / "out", "bfloat16")
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))


def test_repeating_is_harmless_another_source_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    first = quantize.quantize(str(folder / "llama"), out, "bfloat16")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize.quantize(str(folder / "llama"), out, "bfloat16") == first
    assert json.loads((out / quantize.MANIFEST).read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(ModelError, match="another source: digest"):
        quantize.quantize(str(folder / "qwen2"), out, "bfloat16")
    with pytest.raises(ModelError, match="another quantisation: dtype bfloat16 there, float32 wanted"):
        quantize.quantize(str(folder / "llama"), out, "float32")
    with pytest.raises(ModelError, match="isn't a quantised model"):
        quantize.quantize(str(folder / "llama"), folder / "qwen2", "bfloat16")


def test_content_hash_sees_a_changed_weight(folder, tmp_path):
    base = copy_of(folder / "llama", tmp_path / "llama")
    before, quick = quantize.source_digest(base, content=True), quantize.source_digest(base)
    path = sorted(base.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert quantize.source_digest(base) == quick
    assert quantize.source_digest(base, content=True)["content"] != before["content"]
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert quantize.source_digest(base)["digest"] != quick["digest"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, "other settings: dtype bfloat16 there, float32 wanted"),
        ({"quantization": "none"}, "model.quantization: found 'none'; .*holds 4-bit weights"),
    ],
)
def test_a_folder_of_other_settings_is_refused(folder, settings, message):
    config = config_of(folder, "llama-nf4", **settings)
    with pytest.raises(ModelError, match=message):
        load_embedder(config.model, 0)


def test_a_folder_without_double_quantisation_is_refused(folder, tmp_path):
    base = copy_of(folder / "llama-nf4", tmp_path / "llama")
    manifest = json.loads((base / quantize.MANIFEST).read_text())
    manifest["quantisation"]["double_quant"] = False
    (base / quantize.MANIFEST).write_text(json.dumps(manifest))
    settings = ModelSettings(base=str(base), quantization="nf4")
    with pytest.raises(ModelError, match="double_quant False there, True wanted"):
        quantize.check_written(settings)


def test_sources_that_are_not_written(folder, tmp_path):
    with pytest.raises(ModelError, match="quantised already"):
        quantize.quantize(str(folder / "llama-nf4"), tmp_path / "twice", "bfloat16")
    assert not (tmp_path / "twice").exists()


def test_the_door(folder, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["quantize.py", str(folder / "llama"), out, "--hash"])
    assert door.main() == 0
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))
    assert "in 4 bits from" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["quantize.py", str(folder / "llama"), out, "--dtype", "float32"])
    assert door.main() == 2
    assert "error: out: found" in capsys.readouterr().err
