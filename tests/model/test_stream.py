"""The streamed load against transformers' own: bit for bit the same model, of which each rank holds its share.

Checkpoints are causal language models in several files; the oracle is `from_pretrained` with bitsandbytes in one process.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from hybrid_scale import dist
from hybrid_scale.config import ModelSettings, RunConfig
from hybrid_scale.errors import ModelError
from hybrid_scale.model import nf4, quantise, skeleton, stream, weight_files
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.engine import make_accelerator, make_engine, read_deepspeed_config
from launch import quantize
from tests.ranks import run_ranks
from tests.train.setup import make_config, zero
from tests.train.test_step import gradients_of, nonzero_adapter

BATCH = {"input_ids": torch.arange(1, 31).remainder(23)[None], "lengths": torch.tensor([14, 3, 9, 4])}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 51}
# Packed weights of 100, 50 and 185 elements, in 7, 4 and 12 blocks, the last of each shorter than 64 weights: neither 2 nor 4
# ranks share them evenly, and every border lies inside a block.
ODD = {"hidden_size": 20, "intermediate_size": 37}
FAMILIES: dict[str, tuple[PretrainedConfig, torch.dtype, str]] = {
    "llama": (LlamaConfig(**SIZES, **ODD, head_dim=10), torch.float32, "bfloat16"),
    "qwen2": (Qwen2Config(**SIZES, hidden_size=64, intermediate_size=96), torch.bfloat16, "float32"),
    "qwen3": (Qwen3Config(**SIZES, **ODD, head_dim=10), torch.float16, "bfloat16"),
    "gemma3": (Gemma3TextConfig(**SIZES, hidden_size=64, intermediate_size=96, head_dim=32), torch.bfloat16, "bfloat16"),
}
"""Family -> config, type of its checkpoint, `model.dtype`. Float32 where there are biases: DeepSpeed's linear rounds before it
adds them, so that in bfloat16 no ZeRO-3 equals one process."""


def write_checkpoint(folder: Path, family: str) -> Path:
    """A random causal language model in several files, biases and norms away from 0 and 1."""
    config, dtype, _ = FAMILIES[family]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder / family, max_shard_size="8KB")
    assert len(list((folder / family).glob("*.safetensors"))) > 2
    return folder / family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stream")
    for family in FAMILIES:
        quantise.quantise(str(write_checkpoint(place, family)), place / f"{family}-nf4", FAMILIES[family][2])
    return place


def config_of(folder: Path, name: str, deepspeed: str | None = None, **model: Any) -> RunConfig:
    """A run over `folder/name`, a family's checkpoint or its 4-bit form."""
    family = name.removesuffix("-nf4")
    settings = {"base": str(folder / name), "dtype": FAMILIES[family][2], "quantization": "nf4", "pooling": "mean", **model}
    engine = {"engine": "deepspeed", "deepspeed": deepspeed} if deepspeed else {}
    return make_config(folder, model=settings, training=engine)


def on_this_rank(tree: str, streamed: bool, adapter: Path | None = None) -> dict[str, Any]:
    """Embeddings and whole LoRA gradients of one batch through the run's engine, and what this rank holds of each weight."""
    config = RunConfig.model_validate_json(tree)
    dist.start()
    shards = read_deepspeed_config(config) if streamed else None
    embedder = load_embedder(config.model, config.run.seed, adapter, shards)
    trained = {n: p.detach().clone() for n, p in embedder.named_parameters() if p.requires_grad}
    held = {
        name: (tuple(p.ds_shape), p.ds_tensor.numel(), p.numel(), getattr(p.ds_secondary_tensor, "shape", None))
        for name, p in embedder.named_parameters()
        if hasattr(p, "ds_id")
    }
    nonzero_adapter(embedder)
    engine: Any = make_engine(config, make_accelerator(config, Path(config.run.directory)), embedder)
    embeddings = engine.embed(BATCH)
    weight = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))
    engine.backward((embeddings * weight).sum(), last=True)
    states = {
        name: {key: value.clone() for key, value in m.quant_state.as_dict(packed=True).items()}
        for name, m in embedder.named_modules()
        if isinstance(m, nf4.bnb.nn.Linear4bit)
    }
    return {
        "embeddings": embeddings.detach().clone(),
        "gradients": {name: torch.from_numpy(gradient) for name, gradient in gradients_of(engine).items()},
        "held": held,
        "states": states,
        "trained": trained,
    }


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str], dict[str, Any]]:
    """A family's result in one process, without DeepSpeed."""
    results: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in results:
            tree = config_of(folder, family).model_dump_json()
            results[family] = run_ranks(on_this_rank, 1, tree, False)[0]
        return results[family]

    return of


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "world"), [("llama", 2), ("llama", 4), ("qwen2", 2), ("qwen3", 4), ("gemma3", 2)])
def test_streamed_is_the_stock_model(folder, whole, family, world):
    """Forward passes equal one process, gradients equal those of the stock load under the same ZeRO-3, from both sources."""
    json_path = zero(3, folder)
    expected = whole(family)
    stock = run_ranks(on_this_rank, world, config_of(folder, family, json_path).model_dump_json(), False)
    assert not stock[0]["held"]
    for base in (family, f"{family}-nf4"):
        for result in run_ranks(on_this_rank, world, config_of(folder, base, json_path).model_dump_json(), True):
            assert torch.equal(result["embeddings"], expected["embeddings"])
            assert torch.equal(result["embeddings"], stock[0]["embeddings"])
            assert same(result["gradients"], stock[0]["gradients"])
            assert same(result["trained"], expected["trained"])
            assert result["states"].keys() == expected["states"].keys()
            assert all(same(state, expected["states"][name]) for name, state in result["states"].items())
            check_shares(result["held"], folder / family, world)
    assert max(float(gradient.abs().max()) for gradient in stock[0]["gradients"].values()) > 1e-3


def check_shares(held: dict[str, Any], source: Path, world: int) -> None:
    """Each rank holds ceil(n / W) of every weight of the backbone and nothing else of it. Counted from the source's files."""
    stored = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
    backbone = {name.removeprefix("model."): t for name, t in stored.items() if name != "lm_head.weight"}
    assert len(held) == len(backbone)
    for name, (shape, part, whole_now, second) in held.items():
        tensor = backbone[name.removeprefix("backbone.base_model.model.").replace(".base_layer", "")]
        linear = name.endswith("_proj.base_layer.weight")
        elements = tensor.numel() // 4 if linear else tensor.numel()
        assert shape == ((elements, 1) if linear else tuple(tensor.shape))
        assert part == math.ceil(elements / world)
        assert whole_now == 0
        assert second is None


@pytest.mark.distributed
def test_biases_in_bfloat16_are_those_of_the_stock_load(folder):
    quantise.quantise(str(folder / "qwen2"), folder / "qwen2-nf4-16", "bfloat16")
    tree = config_of(folder, "qwen2", zero(3, folder), dtype="bfloat16").model_dump_json()
    stock = run_ranks(on_this_rank, 2, tree, False)[0]
    for base in ("qwen2", "qwen2-nf4-16"):
        tree = config_of(folder, "qwen2", zero(3, folder), dtype="bfloat16", base=str(folder / base)).model_dump_json()
        result = run_ranks(on_this_rank, 2, tree, True)[0]
        assert torch.equal(result["embeddings"], stock["embeddings"])
        assert same(result["gradients"], stock["gradients"])


@pytest.mark.distributed
def test_a_group_holds_a_second_copy(folder, whole):
    """hpZ: two of four ranks hold one copy, from which the backward pass gathers."""
    tree = json.loads(Path(zero(3, folder)).read_text())
    tree["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "hpz.json").write_text(json.dumps(tree))
    for base in ("llama", "llama-nf4"):
        config = config_of(folder, base, str(folder / "hpz.json")).model_dump_json()
        stock = run_ranks(on_this_rank, 4, config, False)[0]
        for result in run_ranks(on_this_rank, 4, config, True):
            assert torch.equal(result["embeddings"], whole("llama")["embeddings"])
            assert same(result["gradients"], stock["gradients"])
            for shape, part, _, second in result["held"].values():
                assert part == math.ceil(math.prod(shape) / 4)
                assert second[0] == 2 * part


@pytest.mark.distributed
def test_shares_in_host_memory(folder, whole):
    tree = json.loads(Path(zero(3, folder)).read_text())
    tree["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    (folder / "offload.json").write_text(json.dumps(tree))
    config = config_of(folder, "llama", str(folder / "offload.json")).model_dump_json()
    for result in run_ranks(on_this_rank, 2, config, True):
        assert torch.equal(result["embeddings"], whole("llama")["embeddings"])


def test_what_deepspeed_must_do_itself():
    for key, value in {"offload_param": {"device": "nvme"}, "zero_quantized_weights": True}.items():
        assert stream._why_not_with({"zero_optimization": {key: value}})
    assert stream._why_not_with({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}) is None


@pytest.mark.distributed
def test_an_unquantised_base_is_streamed_too(folder):
    json_path = zero(3, folder)
    expected = run_ranks(on_this_rank, 1, config_of(folder, "qwen2", quantization="none").model_dump_json(), False)[0]
    config = config_of(folder, "qwen2", json_path, quantization="none").model_dump_json()
    for result in run_ranks(on_this_rank, 2, config, True):
        assert torch.equal(result["embeddings"], expected["embeddings"])
        assert result["held"]


@pytest.mark.distributed
def test_a_trained_adapter_is_put_back(folder, tmp_path):
    config = config_of(folder, "llama", zero(3, folder))
    embedder = load_embedder(config.model, config.run.seed)
    nonzero_adapter(embedder)
    expected = {name: p.detach().clone() for name, p in embedder.named_parameters() if p.requires_grad}
    embedder.backbone.save_pretrained(str(tmp_path))
    for result in run_ranks(on_this_rank, 2, config.model_dump_json(), True, tmp_path):
        assert same(result["trained"], expected)


# Faults of a checkpoint


def refusal_on_this_rank(tree: str) -> str:
    config = RunConfig.model_validate_json(tree)
    dist.start()
    try:
        load_embedder(config.model, 0, shards=read_deepspeed_config(config))
    except ModelError as error:
        return str(error)
    return "loaded"


@pytest.mark.distributed
def test_every_rank_refuses_a_file_cut_short(folder, tmp_path):
    base = copy_of(folder / "llama", tmp_path / "llama")
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    messages = run_ranks(refusal_on_this_rank, 2, config_of(tmp_path, "llama", zero(3, tmp_path)).model_dump_json())
    assert messages[0] == messages[1]
    assert f"model.base: found '{path}'; a whole safetensors file is expected here" in messages[0].replace("...", "")


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_single(source: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def names_of(folder: Path, written: bool = False) -> dict[str, str]:
    model = skeleton.make_skeleton(AutoConfig.from_pretrained(folder), torch.bfloat16, "eager", four_bit=True)
    return weight_files.match_names(model, weight_files.Checkpoint(str(folder)), written)


FIRST = "layers.0.mlp.up_proj.weight"


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
        weight_files.Checkpoint(str(tmp_path))


def test_parts_of_a_tensor_are_read_exactly(folder):
    checkpoint, tensors = weight_files.Checkpoint(str(folder / "llama")), merged(folder / "llama")
    for name in (f"model.{FIRST}", "model.norm.weight"):
        flat = tensors[name].reshape(-1)
        for start, stop in ((0, len(flat)), (7, 19), (3, 4), (5, 5), (len(flat), len(flat))):
            assert torch.equal(checkpoint.read(name, start, stop), flat[start:stop])


# Quantised once


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
    monkeypatch.setattr(quantise, "FILE_BYTES", 5000)
    quantise.quantise(str(folder / "llama"), tmp_path / "out", "bfloat16")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 10_000 for path in files)
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))


def test_chunks_change_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(nf4, "CHUNK", 128)
    quantise.quantise(str(folder / "llama"), tmp_path / "out", "bfloat16")
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))


def test_repeating_is_harmless_another_source_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    first = quantise.quantise(str(folder / "llama"), out, "bfloat16")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantise.quantise(str(folder / "llama"), out, "bfloat16") == first
    assert json.loads((out / quantise.MANIFEST).read_text()) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(ModelError, match="another source: digest"):
        quantise.quantise(str(folder / "qwen2"), out, "bfloat16")
    with pytest.raises(ModelError, match="another quantisation: dtype bfloat16 there, float32 wanted"):
        quantise.quantise(str(folder / "llama"), out, "float32")
    with pytest.raises(ModelError, match="isn't a quantised model"):
        quantise.quantise(str(folder / "llama"), folder / "qwen2", "bfloat16")


def test_content_hash_sees_a_changed_weight(folder, tmp_path):
    base = copy_of(folder / "llama", tmp_path / "llama")
    before, quick = quantise.source_digest(base, content=True), quantise.source_digest(base)
    path = sorted(base.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert quantise.source_digest(base) == quick
    assert quantise.source_digest(base, content=True)["content"] != before["content"]
    (base / "config.json").write_text((base / "config.json").read_text() + " ")
    assert quantise.source_digest(base)["digest"] != quick["digest"]


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
    manifest = json.loads((base / quantise.MANIFEST).read_text())
    manifest["quantisation"]["double_quant"] = False
    (base / quantise.MANIFEST).write_text(json.dumps(manifest))
    settings = ModelSettings(base=str(base), quantization="nf4")
    with pytest.raises(ModelError, match="double_quant False there, True wanted"):
        quantise.check_written(settings)


def test_sources_that_are_not_written(folder, tmp_path):
    with pytest.raises(ModelError, match="quantised already"):
        quantise.quantise(str(folder / "llama-nf4"), tmp_path / "twice", "bfloat16")
    assert not (tmp_path / "twice").exists()


def test_the_door(folder, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["quantize.py", str(folder / "llama"), out, "--hash"])
    assert quantize.main() == 0
    assert same(merged(tmp_path / "out"), merged(folder / "llama-nf4"))
    assert "in 4 bits from" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["quantize.py", str(folder / "llama"), out, "--dtype", "float32"])
    assert quantize.main() == 2
    assert "error: out: found" in capsys.readouterr().err


# Layout and the parts that need no model


def test_cuts_worked_by_hand():
    assert [stream.cut(10, 4, rank) for rank in range(4)] == [
        stream.Cut(0, 3, 3),
        stream.Cut(3, 6, 3),
        stream.Cut(6, 9, 3),
        stream.Cut(9, 10, 3),
    ]
    assert [stream.cut(5, 4, rank) for rank in range(4)] == [
        stream.Cut(0, 2, 2),
        stream.Cut(2, 4, 2),
        stream.Cut(4, 5, 2),
        stream.Cut(5, 5, 2),
    ]


def test_bytes_worked_by_hand():
    """A 64 x 128 weight: 8,192 weights, 2,048 stored, 128 blocks (1 nested); a norm of 10 in bfloat16; 3 ranks."""
    slots = [nf4.Slot("a", (64, 128), True), nf4.Slot("b", (10,), False)]
    found = stream.share_bytes(slots, torch.bfloat16, 3)
    assert found["4-bit weights"] == 683 * 2
    assert found["other weights"] == 4 * 2
    assert found["quantisation state"] == 128 + 4 + 4 * (256 + 16)


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


class ExtraBuffer(LlamaModel):
    """A model whose initialisation forgets a buffer."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.norm.register_buffer("forgotten", torch.ones(3), persistent=False)


def test_a_buffer_that_nothing_computes_is_an_error():
    config = FAMILIES["llama"][0]
    with torch.device("meta"):
        good, bad = LlamaModel(config), ExtraBuffer(config)
    skeleton.fill_buffers(good, torch.device("cpu"))
    assert torch.equal(good.rotary_emb.inv_freq, LlamaModel(config).rotary_emb.inv_freq)
    with pytest.raises(ModelError, match=r"ExtraBuffer: nothing computes the buffers \['norm.forgotten'\]"):
        skeleton.fill_buffers(bad, torch.device("cpu"))


def test_merged_experts_are_left_to_transformers():
    config = MixtralConfig(**SIZES, hidden_size=32, intermediate_size=48, num_local_experts=2)
    reason = skeleton.why_not(skeleton.make_skeleton(config, torch.bfloat16, "eager", four_bit=True))
    assert reason == "transformers renames or merges its weights"
    for config, _, _ in FAMILIES.values():
        assert skeleton.why_not(skeleton.make_skeleton(config, torch.bfloat16, "eager", four_bit=True)) is None
