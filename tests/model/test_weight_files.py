"""Names and parts of tensors in weight files, against safetensors' own reading; what doesn't fit is listed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from hybrid_scale.errors import ModelError
from hybrid_scale.model import skeleton, weight_files
from tests.model.families import merged, write_checkpoint

FIRST = "layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    for family in ("llama", "gemma3"):
        write_checkpoint(place, family)
    return place


def write_single(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def names_of(folder: Path, written: bool = False) -> dict[str, str]:
    model = skeleton.make_skeleton(AutoConfig.from_pretrained(folder), torch.bfloat16, "eager", four_bit=True)
    return weight_files.match_names(model, weight_files.Checkpoint(folder), written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"model.{FIRST}"), f"1 missing: {FIRST}\\."),
        (lambda t: t.update({"model.layers.7.x.weight": torch.zeros(2)}), "1 unexpected: model.layers.7.x.weight\\."),
        (lambda t: t.update({f"model.{FIRST}": torch.zeros(20, 37)}), f"1 of another shape: {FIRST} \\[20, 37\\] .*\\[37, 20\\]"),
        (lambda t: t.update({FIRST: torch.zeros(37, 20)}), "1 unexpected: "),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.1" in n],
            "9 missing: layers.1.input_layernorm.weight, (layers.1.[a-z_.]+, ){3}layers.1.[a-z_.]+\\.",
        ),
    ],
)
def test_names_that_dont_fit_are_listed(folder, tmp_path, change, message):
    tensors = merged(folder / "llama")
    change(tensors)
    with pytest.raises(ModelError, match=message):
        names_of(write_single(folder / "llama", tmp_path / "m", tensors))


def test_prefix_head_and_old_buffers(folder, tmp_path, capsys):
    """With and without `model.`; the head is named once; inverse frequencies that older checkpoints hold are passed over."""
    tensors = merged(folder / "llama")
    assert names_of(folder / "llama")[FIRST] == f"model.{FIRST}"
    assert capsys.readouterr().err.count("lm_head.weight isn't used") == 1
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)
    assert FIRST in names_of(write_single(folder / "llama", tmp_path / "old", tensors))
    bare = {name.removeprefix("model."): t for name, t in merged(folder / "llama").items() if name != "lm_head.weight"}
    capsys.readouterr()
    assert names_of(write_single(folder / "llama", tmp_path / "bare", bare))[FIRST] == FIRST
    assert capsys.readouterr().err == ""


def test_tied_embeddings_under_the_name_of_the_head(folder, tmp_path, capsys):
    tensors = merged(folder / "gemma3")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    names = names_of(write_single(folder / "gemma3", tmp_path / "tied", tensors))
    assert names["embed_tokens.weight"] == "lm_head.weight"
    assert capsys.readouterr().err == ""
    llama = merged(folder / "llama")
    llama.pop("model.embed_tokens.weight")
    with pytest.raises(ModelError, match=r"1 missing: embed_tokens\.weight"):
        names_of(write_single(folder / "llama", tmp_path / "untied", llama))


def test_no_weights_at_all(tmp_path):
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        weight_files.Checkpoint(tmp_path)


def test_parts_of_a_tensor_are_read_exactly(folder):
    checkpoint, tensors = weight_files.Checkpoint(folder / "llama"), merged(folder / "llama")
    for name in (f"model.{FIRST}", "model.norm.weight"):
        flat = tensors[name].reshape(-1)
        for start, stop in ((0, len(flat)), (7, 19), (3, 4), (5, 5), (len(flat), len(flat))):
            assert torch.equal(checkpoint.read(name, start, stop), flat[start:stop])


def test_progress_is_quiet_then_true(capsys):
    clock = iter([0.0, 1.0, 9.9, 12.0, 13.0, 22.0])
    progress = weight_files.Progress("loading", 6_000_000_000, lambda: next(clock))
    for _ in range(2):
        progress.add(1_000_000_000)
    assert capsys.readouterr().err == ""
    progress.add(1_000_000_000)
    assert capsys.readouterr().err == "loading: 3.0 of 6.0 GB, 250 MB/s, 12 s left\n"
    progress.add(1_000_000_000)
    assert capsys.readouterr().err == ""
    progress.add(1_000_000_000)
    assert "5.0 of 6.0 GB" in capsys.readouterr().err
