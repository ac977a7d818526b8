"""Padding side, padding amount and pooling must not change what they shouldn't."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.export import save_trained
from hybrid_scale.model.load import load_embedder, load_trained
from hybrid_scale.model.pooling import pool
from tests.train.setup import write_inputs

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
BACKBONES = {
    "llama": lambda: LlamaModel(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralModel(MistralConfig(**SHAPE)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"})),
    "gemma": lambda: GemmaModel(GemmaConfig(**SHAPE)),
}
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("model"))


def padded(texts: list[list[int]], side: str, extra: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, texts)) + extra
    ids, mask = torch.full((len(texts), width), 1), torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
def test_padding_changes_nothing(name, attention, pooling):
    torch.manual_seed(0)
    embedder = Embedder(BACKBONES[name]().eval(), pooling, attention)
    with torch.no_grad():
        alone = torch.cat([embedder(**padded([text], "right")) for text in TEXTS])
        for side, extra in (("right", 0), ("left", 0), ("right", 5), ("left", 5)):
            torch.testing.assert_close(embedder(**padded(TEXTS, side, extra)), alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(3))


def test_attention_looks_ahead_only_when_bidirectional():
    """A change of the last token reaches the first position's state in bidirectional attention alone."""
    torch.manual_seed(0)
    backbone = BACKBONES["llama"]().eval()
    one, other = padded([[5, 6, 7]], "right"), padded([[5, 6, 8]], "right")
    mask = torch.tensor([[1, 1, 1]])
    first = {"causal": [], "bidirectional": []}
    for attention, states in first.items():
        embedder = Embedder(backbone, "mean", attention)
        given = mask if attention == "causal" else embedder._bidirectional(mask)
        for batch in (one, other):
            with torch.no_grad():
                states.append(backbone(input_ids=batch["input_ids"], attention_mask=given).last_hidden_state[0, 0])
    assert torch.equal(*first["causal"])
    assert not torch.allclose(*first["bidirectional"])


def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [9.0]], [[9.0], [1.0], [2.0], [6.0]]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert pool(hidden, mask, "last").flatten().tolist() == [4.0, 6.0]
    assert pool(hidden, mask, "mean").flatten().tolist() == pytest.approx([7 / 3, 3.0])
    assert pool(hidden, mask, "weighted_mean").flatten().tolist() == pytest.approx([17 / 6, 23 / 6])


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_saved_weights_load_back(folder, tmp_path, lora):
    settings = ModelSettings.model_validate({"base": str(folder / "model"), "dtype": "float32", "lora": lora})
    trained = load_embedder(settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    weights = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
    save_trained(trained, weights, tmp_path / "adapter")
    again = load_embedder(settings, seed=7, adapter=tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[token for text in TEXTS for token in text]]), "lengths": torch.tensor([3, 7, 1])}
    assert torch.equal(trained(**batch), again(**batch))


def test_an_adapter_with_other_names_is_refused(folder, tmp_path):
    settings = ModelSettings.model_validate({"base": str(folder / "model"), "dtype": "float32", "lora": {"rank": 4}})
    only_queries = ModelSettings.model_validate(
        {"base": str(folder / "model"), "dtype": "float32", "lora": {"rank": 4, "targets": ["q_proj"]}}
    )
    small = load_embedder(only_queries, seed=0)
    weights = {name: p.detach() for name, p in small.named_parameters() if p.requires_grad}
    save_trained(small, weights, tmp_path / "adapter")
    with pytest.raises(ModelError, match="24 weights are missing"):
        load_trained(load_embedder(settings, seed=0), tmp_path / "adapter")


def test_a_target_that_the_model_lacks_is_refused(folder):
    settings = ModelSettings.model_validate({"base": str(folder / "model"), "lora": {"targets": ["nothing"]}})
    with pytest.raises(ModelError, match=r"model.lora.targets"):
        load_embedder(settings, seed=0)


def test_a_base_that_lacks_a_weight_is_refused(folder, tmp_path):
    """transformers would leave it random and go on."""
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    gone = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({name: weight for name, weight in weights.items() if name != gone}, tmp_path / "model/model.safetensors")
    settings = ModelSettings.model_validate({"base": str(tmp_path / "model"), "lora": {"rank": 4}})
    with pytest.raises(ModelError, match=r"lack 1 of the model's weights. The first: .*layers.1.mlp.up_proj.weight"):
        load_embedder(settings, seed=0)
    content = (folder / "model/model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model.base: found .*a whole safetensors file is expected here"):
        load_embedder(settings, seed=0)


def test_a_missing_base_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model.base: found .*there is no such folder"):
        load_embedder(ModelSettings(base=str(tmp_path / "absent")), seed=0)
