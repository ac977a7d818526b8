"""LoRA's products in the model's type or in float32: weights and gradients stay float32, files stay PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from hybrid_scale.config import ModelSettings
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.export import save_trained
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model

BATCH = {"input_ids": torch.arange(1, 31).remainder(23)[None], "lengths": torch.tensor([14, 3, 9, 4])}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    model = write_model(folder, 40, hidden=64, layers=2, heads=4)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(folder)
    return str(folder)


def adapted(base: str, compute: str, adapter: Path | None = None, **settings: Any) -> Embedder:
    """A model whose adapters are past their initial zero, the same for every `compute` and `dtype`."""
    given = {"base": base, "pooling": "mean", "gradient_checkpointing": False, "lora": {"rank": 4, "compute": compute}}
    embedder = load_embedder(ModelSettings.model_validate({**given, **settings}), seed=0, adapter=adapter)
    if adapter is None:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in embedder.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05, generator=generator)
    return embedder


def gradients(embedder: Embedder) -> dict[str, torch.Tensor]:
    embeddings = embedder(**BATCH)
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad for name, p in embedder.named_parameters() if p.requires_grad}


def types_of_products(embedder: Embedder) -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    for name, module in embedder.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            module.register_forward_hook(lambda layer, inputs, output: seen.update((inputs[0].dtype, output.dtype)))
    embedder(**BATCH)
    return seen


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("compute", "product"), [("model", torch.bfloat16), ("float32", torch.float32)])
def test_weights_and_gradients_are_float32_whatever_the_products(base, compute, product, quantization):
    embedder = adapted(base, compute, quantization=quantization)
    assert types_of_products(embedder) == {product}
    found = gradients(embedder)
    assert len(found) == 2 * 2 * 7
    assert {p.dtype for p in embedder.parameters() if p.requires_grad} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_point_the_same_way(base, quantization):
    """Products in bfloat16 against products in float32, of one bfloat16 model."""
    model, reference = (gradients(adapted(base, compute, quantization=quantization)) for compute in ("model", "float32"))
    together = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in (model, reference)]
    assert float(torch.cosine_similarity(*together, dim=0)) > 0.999
    assert not torch.equal(*together)
    for name, gradient in reference.items():
        assert float(torch.cosine_similarity(model[name].flatten(), gradient.flatten(), dim=0)) > 0.995, name


def test_gradients_of_micro_batches_add_up_in_float32(base):
    """256 times the same gradient: a bfloat16 sum (8 bits) would stop growing, or be off by a percent."""
    embedder = adapted(base, "model")
    once = {name: gradient.clone() for name, gradient in gradients(embedder).items()}
    for _ in range(255):
        total = gradients(embedder)
    for name, gradient in once.items():
        torch.testing.assert_close(total[name], 256 * gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wider_model_is_the_same_bit_for_bit(base, dtype):
    model, reference = (gradients(adapted(base, compute, dtype=dtype)) for compute in ("model", "float32"))
    assert all(torch.equal(model[name], gradient) for name, gradient in reference.items())


@pytest.mark.parametrize("saved", ["model", "float32"])
def test_an_adapter_loads_in_both_modes_and_in_plain_peft(base, tmp_path, saved):
    trained = adapted(base, saved, dtype="float32")
    weights = {name: p.detach() for name, p in trained.named_parameters() if p.requires_grad}
    save_trained(trained, weights, tmp_path / "adapter")
    for compute in ("model", "float32"):
        again = adapted(base, compute, adapter=tmp_path / "adapter")
        loaded = {name: p for name, p in again.named_parameters() if p.requires_grad}
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter"))
    parts = BATCH["input_ids"][0].split(BATCH["lengths"].tolist())
    with torch.no_grad():
        pooled = torch.stack([plain(input_ids=part[None]).last_hidden_state[0].mean(0) for part in parts])
        expected = torch.nn.functional.normalize(pooled, dim=-1)
        torch.testing.assert_close(trained(**BATCH), expected, atol=2e-6, rtol=0)
