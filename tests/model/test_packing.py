"""Texts end to end equal the same texts padded: embeddings, gradients, on eight architectures; and nothing sees padding.

The reference is transformers' own padded path (sdpa; eager for Gemma 2, whose soft cap sdpa lacks). Weights are drawn large
enough for attention to be far from uniform, and `test_the_cases_can_tell` shows that a wrong window or soft cap would be seen.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError
from hybrid_scale.model import load, packing
from hybrid_scale.model.embedder import Embedder
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.pooling import pool_packed

SHAPE: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GEMMA: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, head_dim=8, sliding_window=6),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=2.0, **GEMMA),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, **GEMMA),
    "embedding_gemma": Gemma3TextConfig(**SHAPE, head_dim=8, **GEMMA, use_bidirectional_attention=True),
}
LENGTHS = {
    "mixed": [5, 17, 1, 9, 9, 9, 2, 16, 1, 15, 3],
    "falling": [17, 16, 15, 9, 9, 9, 5, 3, 2, 1, 1],
    "rising": [1, 1, 2, 3, 5, 9, 9, 9, 15, 16, 17],
    "equal": [8] * 6,
    "dummy": [1],
}
ATOL = 2e-6
GRADIENT = 1e-5
"""Relative norm of the difference, per tensor, float32."""


@pytest.fixture(autouse=True)
def padding_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as on a GPU; on a CPU they hold texts of one length only."""
    monkeypatch.setitem(packing.WASTE, "cpu", packing.WASTE["gpu"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small random models, named as in CONFIGS."""
    folder = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        for key, parameter in model.named_parameters():
            parameter.data.normal_(std=0.5 if "q_proj" in key or "k_proj" in key else 0.15)
        model.save_pretrained(folder / name)
    return folder


def embedder_of(bases: Path, name: str, implementation: str, **settings: Any) -> Embedder:
    given = {"dtype": "float32", "lora": None, "gradient_checkpointing": False, **settings}
    given |= {"base": str(bases / name), "attention_implementation": implementation}
    return load_embedder(ModelSettings.model_validate(given), seed=0)


def reference(name: str) -> str:
    return "eager" if name == "gemma2" else "sdpa"


def texts_of(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 90, (length,), generator=generator) for length in lengths]


def padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def packed(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.cat(texts)[None], "lengths": torch.tensor([len(text) for text in texts])}


def outcome(embedder: Embedder, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Embeddings and the gradients of a fixed random projection of them."""
    embeddings = embedder(**batch)
    projection = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))
    (embeddings * projection).sum().backward()
    return embeddings.detach(), {name: p.grad for name, p in embedder.named_parameters() if p.grad is not None}


def assert_same(found: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]):
    torch.testing.assert_close(found[0], expected[0], atol=ATOL, rtol=0)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(gradient.norm()) for gradient in expected[1].values())
    assert scale > 0.1
    for name, gradient in expected[1].items():
        # A tensor whose true gradient is zero (key biases: softmax doesn't see a constant) holds rounding only.
        size = max(float(gradient.norm()), 1e-3 * scale)
        assert float((found[1][name] - gradient).norm()) < GRADIENT * size, name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
@pytest.mark.parametrize("waste", packing.WASTE.values())
def test_packed_equals_padded(bases, name, attention, pooling, waste, monkeypatch):
    monkeypatch.setitem(packing.WASTE, "cpu", waste)
    settings = {"attention": attention, "pooling": pooling}
    texts = texts_of(LENGTHS["mixed"])
    expected = outcome(embedder_of(bases, name, reference(name), **settings), padded(texts))
    assert_same(outcome(embedder_of(bases, name, "packed", **settings), packed(texts)), expected)


@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_any_order(bases, name, order):
    texts = texts_of(LENGTHS[order])
    expected = outcome(embedder_of(bases, name, reference(name), pooling="mean"), padded(texts))
    assert_same(outcome(embedder_of(bases, name, "packed", pooling="mean"), packed(texts)), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_with_reentrant_checkpointing(bases, name, attention):
    texts = texts_of(LENGTHS["mixed"])
    expected = outcome(embedder_of(bases, name, reference(name), attention=attention), padded(texts))
    checkpointed = embedder_of(bases, name, "packed", attention=attention, gradient_checkpointing=True)
    assert_same(outcome(checkpointed, packed(texts)), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_adapters(bases, name, checkpointing):
    settings = {"lora": {"rank": 4}, "pooling": "mean"}
    texts, outcomes = texts_of(LENGTHS["mixed"]), []
    for implementation, make in ((reference(name), padded), ("packed", packed)):
        embedder = embedder_of(bases, name, implementation, **settings, gradient_checkpointing=checkpointing and make is packed)
        generator = torch.Generator().manual_seed(3)
        for key, parameter in embedder.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.1, generator=generator)
        outcomes.append(outcome(embedder, make(texts)))
    assert len(outcomes[0][1]) == 2 * 2 * 7
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma2", {"attn_logit_softcapping": 100.0}),
        ("gemma3", {"sliding_window": 100}),
    ],
)
def test_the_cases_can_tell(bases, name, changed):
    """Without the window or the soft cap, packed embeddings move by a thousand times the tolerance."""
    embedder, other = embedder_of(bases, name, "packed"), embedder_of(bases, name, "packed")
    config = AutoConfig.from_pretrained(bases / name, **changed)
    config._attn_implementation = packing.NAME
    other.backbone = AutoModel.from_config(config)
    other.backbone.load_state_dict(embedder.backbone.state_dict())
    batch = packed(texts_of(LENGTHS["mixed"]))
    with torch.no_grad():
        moved = (embedder(**batch) - other.eval()(**batch)).abs().amax(dim=1)
    assert float(moved.max()) > 1000 * ATOL
    if "sliding_window" in changed:  # texts within the window don't
        assert float(moved[torch.tensor(LENGTHS["mixed"]) <= 6].max()) < ATOL


@pytest.mark.parametrize("name", CONFIGS)
def test_only_real_tokens_reach_a_linear_layer(bases, name):
    embedder, rows = embedder_of(bases, name, "packed"), []
    for module in embedder.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda layer, inputs, output: rows.append(inputs[0].numel() // layer.in_features))
    embedder(**packed(texts_of(LENGTHS["mixed"])))
    assert rows == [sum(LENGTHS["mixed"])] * (2 * 7)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_no_tensor_over_all_pairs_of_tokens(bases, name, attention):
    texts = texts_of([12, 11] * 50)
    tokens = sum(map(len, texts))
    embedder, largest = embedder_of(bases, name, "packed", attention=attention), Largest()
    with largest:
        embedder(**packed(texts)).sum().backward()
    assert tokens * SHAPE["intermediate_size"] <= largest.elements <= tokens * 100 < tokens * tokens / 10


def test_texts_are_described_once_a_forward(bases, monkeypatch):
    seen: list[tuple[Any, Any]] = []

    def recorded(*arguments: Any, **named: Any) -> Any:
        seen.append((arguments[4], named["segments"]))
        return packing.packed_attention(*arguments, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, packing.NAME, recorded)
    embedder_of(bases, "gemma3", "packed")(**packed(texts_of(LENGTHS["mixed"])))
    assert len(seen) == 2
    assert all(mask is None and segments is seen[0][1] for mask, segments in seen)


def test_bfloat16_stays_close(bases):
    texts, found = texts_of(LENGTHS["mixed"]), []
    for implementation, make in (("sdpa", padded), ("packed", packed)):
        embedder = embedder_of(bases, "llama", implementation, dtype="bfloat16", lora={"rank": 4})
        found.append(embedder(**make(texts)))
    assert found[1].dtype == torch.float32
    assert float((found[0] * found[1]).sum(dim=1).min().detach()) > 0.999


def varlen_by_hand(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """What flash attention does with transformers' varlen arguments, text by text, as its own documentation says."""
    assert attention_mask is None
    assert named["cu_seq_lens_q"].dtype == named["cu_seq_lens_k"].dtype == torch.int32
    assert type(named["max_length_q"]) is type(named["max_length_k"]) is int
    borders = named["cu_seq_lens_q"].tolist()
    assert borders == named["cu_seq_lens_k"].tolist()
    assert named["max_length_q"] == named["max_length_k"] == max(np.diff(borders))
    causal = module.is_causal if named.get("is_causal") is None else named["is_causal"]
    repeat = query.shape[1] // key.shape[1]
    attended = []
    for first, end in pairwise(borders):
        q, k, v = query[0, :, first:end], key[0, :, first:end], value[0, :, first:end]
        scores = q @ k.repeat_interleave(repeat, 0).mT * named["scaling"]
        if named.get("softcap"):
            scores = named["softcap"] * torch.tanh(scores / named["softcap"])
        behind = torch.arange(end - first)[:, None] - torch.arange(end - first)
        hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
        if named.get("sliding_window"):
            hidden = hidden | (behind.abs() >= named["sliding_window"])
        attended.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(repeat, 0))
    return torch.cat(attended, dim=1).transpose(0, 1)[None], None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_arguments_of_flash_attention(bases, name, attention, monkeypatch):
    """The kernel needs a GPU: here its arguments alone are tried, on an attention written out in their terms."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", varlen_by_hand)
    settings = {"base": str(bases / name), "attention": attention, "attention_implementation": "flash_attention_2"}
    config = load.loaded_config(ModelSettings.model_validate({**settings, "dtype": "float32", "lora": None}))
    backbone = AutoModel.from_config(config)
    expected = embedder_of(bases, name, reference(name), attention=attention, pooling="mean")
    backbone.load_state_dict(expected.backbone.state_dict())
    config._attn_implementation = "flash_attention_2"  # set late: transformers looks for the kernel when it is asked for it
    texts = texts_of(LENGTHS["mixed"])
    found = outcome(Embedder(backbone, "mean", attention), packed(texts))
    assert_same(found, outcome(expected, padded(texts)))


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4), "BloomModel doesn't go through transformers'"),
        (Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]), r"Lfm2Model has layers that mix .* \(conv\)"),
        (Qwen3NextConfig(**SHAPE, num_experts=2), "Qwen3NextModel doesn't go through"),
    ],
)
@pytest.mark.parametrize("implementation", ["packed", "flash_attention_2"])
def test_an_architecture_that_mixes_texts_is_refused_before_its_weights(tmp_path, config, fault, implementation, monkeypatch):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    settings = ModelSettings.model_validate({"base": str(tmp_path), "attention_implementation": implementation})
    with pytest.raises(
        ModelError, match=f"model.attention_implementation: found '{implementation}'; .*{fault}.*Use (sdpa|eager)"
    ):
        load_embedder(settings, seed=0)


def test_a_batch_of_the_other_kind_is_refused(bases):
    texts = texts_of([3, 2])
    with pytest.raises(ModelError, match=r"found 'sdpa'; it knows no texts end to end"):
        embedder_of(bases, "llama", "sdpa")(**packed(texts))
    with pytest.raises(ModelError, match=r"found 'packed'; texts must come end to end"):
        embedder_of(bases, "llama", "packed")(**padded(texts))


def test_an_unknown_argument_of_attention_is_refused():
    layout = packing.make_layout(torch.tensor([3]), True, torch.device("cpu"))
    query = torch.randn(1, 2, 3, 4)
    arguments = {"segments": layout.segments, "position_ids": layout.positions, "output_attentions": False}
    packing.packed_attention(nn.Module(), query, query, query, None, **arguments)
    with pytest.raises(ModelError, match=r"the model's attention layers use s_aux, which it doesn't know"):
        packing.packed_attention(nn.Module(), query, query, query, None, **arguments, s_aux=torch.zeros(2))


def test_layout_by_hand():
    layout = packing.make_layout(torch.tensor([2, 20, 1, 19]), True, torch.device("cpu"))
    assert layout.lengths.tolist() == [20, 19, 2, 1]
    assert layout.positions[0].tolist() == [*range(20), *range(19), 0, 1, 0]
    assert layout.tokens.tolist() == [*range(2, 22), *range(23, 42), 0, 1, 22]
    assert layout.texts.tolist() == [2, 0, 3, 1]
    long, two, one = layout.segments.groups
    assert [(group.texts, group.width, group.tokens) for group in (long, two, one)] == [(2, 20, 39), (1, 2, 2), (1, 1, 1)]
    assert two.gather is two.scatter is two.real is one.real is None
    assert long.scatter.tolist() == list(range(39))
    assert long.gather.tolist()[:39] == list(range(39))
    assert long.real.flatten().tolist() == [True] * 39 + [False]


def test_texts_that_come_longest_first_are_not_moved():
    layout = packing.make_layout(torch.tensor([5, 5, 2]), True, torch.device("cpu"))
    assert layout.tokens is layout.texts is None


@pytest.mark.parametrize("waste", packing.WASTE.values())
def test_groups_hold_little_padding(waste, monkeypatch):
    monkeypatch.setitem(packing.WASTE, "cpu", waste)
    generator = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.sort(generator.integers(1, 200, generator.integers(1, 60)))[::-1]
        groups = packing.make_layout(torch.from_numpy(lengths.copy()), True, torch.device("cpu")).segments.groups
        assert sum(group.texts for group in groups) == len(lengths)
        assert sum(group.tokens for group in groups) == lengths.sum()
        assert all(group.texts * group.width <= (1 + waste) * group.tokens for group in groups)
        following = [(a, b) for a, b in pairwise(groups) if a.width * (a.texts + 1) <= (1 + waste) * (a.tokens + b.width)]
        assert not following, "a text more would have fitted"


def test_ragged_pooling_by_hand():
    hidden = torch.tensor([[1.0], [2.0], [4.0], [9.0], [6.0]])
    lengths, positions = torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2, 0, 0])
    assert pool_packed(hidden, lengths, positions, "last").flatten().tolist() == [4.0, 9.0, 6.0]
    assert pool_packed(hidden, lengths, positions, "mean").flatten().tolist() == pytest.approx([7 / 3, 9.0, 6.0])
    assert pool_packed(hidden, lengths, positions, "weighted_mean").flatten().tolist() == pytest.approx([17 / 6, 9.0, 6.0])
