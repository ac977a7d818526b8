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
from safetensors.torch import load_file

from hybrid_scale import dist
from hybrid_scale.config import RunConfig
from hybrid_scale.errors import ModelError
from hybrid_scale.model import nf4, quantize, stream
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.engine import make_accelerator, make_engine, read_deepspeed_config
from tests.model.families import BATCH, config_of, copy_of, same, write_families
from tests.ranks import run_ranks
from tests.train.setup import zero
from tests.train.test_step import gradients_of, nonzero_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_families(tmp_path_factory.mktemp("stream"))


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
    quantize.quantize(str(folder / "qwen2"), folder / "qwen2-nf4-16", "bfloat16")
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
