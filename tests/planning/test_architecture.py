"""Shapes of decoders against transformers' own models on the meta device, and against the published sizes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError
from hybrid_scale.model.shape import read_shape
from hybrid_scale.planning.architecture import KNOWN, Architecture, find, from_config

PUBLISHED = {  # billions, the head counted unless tied: model cards
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "mistral-7b-v0.1": 7.24,
    "mistral-7b-v0.3": 7.25,
    "mistral-nemo": 12.25,
    "mistral-small-24b": 23.57,
    "mistral-large": 122.61,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen3-0.6b": 0.60,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "gemma-2-2b": 2.61,
    "gemma-2-9b": 9.24,
    "gemma-2-27b": 27.23,
    "gemma-3-270m": 0.27,
    "gemma-3-1b": 1.00,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.77,
    "gemma-3-27b": 27.01,
}


def as_config(a: Architecture) -> dict[str, object]:
    """The config.json of a shape, as the hub writes it."""
    return {
        "model_type": a.family,
        "hidden_size": a.hidden,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.key_value_heads,
        "head_dim": a.head_size,
        "intermediate_size": a.intermediate,
        "vocab_size": a.vocabulary,
        "tie_word_embeddings": a.tied,
    }


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_totals_are_the_published_ones(name: str, billions: float) -> None:
    assert KNOWN[name].total / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    "name", ["llama-3.1-70b", "llama-3.2-1b", "mistral-nemo", "qwen2.5-7b", "qwen3-32b", "gemma-2-27b", "gemma-3-1b"]
)
def test_weights_of_each_kind_equal_transformers_own(name: str) -> None:
    """Exactly, at full size, from a model without storage: encoder, linear layers, small weights, the head."""
    a = KNOWN[name]
    config = CONFIG_MAPPING[a.family](**{key: value for key, value in as_config(a).items() if key != "model_type"})
    with torch.device("meta"):
        encoder = AutoModel.from_config(config)
        whole = AutoModelForCausalLM.from_config(config)
    linear = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    small = sum(p.numel() for p in encoder.parameters() if p.dim() == 1)
    assert a.linear == linear
    assert a.small == small
    assert a.embedding == encoder.get_input_embeddings().weight.numel()
    assert a.encoder == sum(p.numel() for p in encoder.parameters())
    assert a.total == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-0.5b", "qwen3-4b", "gemma-3-27b"])
def test_a_config_json_gives_the_same_shape(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(as_config(KNOWN[name])))
    found = find(str(tmp_path))
    assert (found.total, found.linear, found.small) == (KNOWN[name].total, KNOWN[name].linear, KNOWN[name].small)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-nemo", "qwen2.5-0.5b", "qwen3-4b", "gemma-2-9b", "gemma-3-1b"])
def test_trainer_and_planner_read_the_same_shape(tmp_path: Path, name: str) -> None:
    """transformers' own config, written and read back by AutoConfig, and by the planner from its JSON."""
    a = KNOWN[name]
    CONFIG_MAPPING[a.family](**{key: value for key, value in as_config(a).items() if key != "model_type"}).save_pretrained(
        tmp_path
    )
    shape = read_shape(ModelSettings(base=str(tmp_path)))
    assert shape == find(str(tmp_path))
    assert (shape.linear, shape.total, shape.small, shape.dropout) == (a.linear, a.total, a.small, False)


def test_a_trainer_accepts_types_that_the_planner_has_no_shape_for(tmp_path: Path) -> None:
    """Starcoder2 draws random numbers; Olmo names no key-value heads of its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    for kind, heads, drops in (("starcoder2", 2, True), ("olmo", 4, False)):
        options = {"num_key_value_heads": 2, "residual_dropout": 0.1} if kind == "starcoder2" else {}
        CONFIG_MAPPING[kind](**sizes, **options).save_pretrained(tmp_path)
        shape = read_shape(ModelSettings(base=str(tmp_path)))
        found = (shape.hidden, shape.layers, shape.key_value_heads, shape.head_size, shape.dropout)
        assert found == (64, 2, heads, 16, drops)
        with pytest.raises(ModelError, match="the planner has no shape for this type"):
            find(str(tmp_path))
    layers = {**sizes, "intermediate_size": [256, 128], "layer_types": ["full_attention", "full_attention"]}
    for kind, options, heads, inside in (
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}, 1, 128),
        ("gemma3n_text", {**layers, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]}, 4, 192),
        ("gemma4_text", {**sizes, "global_head_dim": 32, "num_kv_shared_layers": 0}, 4, 256),
        ("opt", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}, 4, 96),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100}, 4, 256),
    ):
        CONFIG_MAPPING[kind](**options).save_pretrained(tmp_path)
        shape = read_shape(ModelSettings(base=str(tmp_path)))
        assert (kind, shape.hidden, shape.layers, shape.heads, shape.intermediate) == (kind, 64, 2, heads, inside)
    CONFIG_MAPPING["musicgen"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its config.json can't be read: Multiple valid text configs"):
        read_shape(ModelSettings(base=str(tmp_path)))
    CONFIG_MAPPING["resnet"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"config.json: found .* is missing"):
        read_shape(ModelSettings(base=str(tmp_path)))
    with pytest.raises(ModelError, match=r"model.base: found '.*none'; there is no such folder"):
        read_shape(ModelSettings(base=str(tmp_path / "none")))


def test_a_nested_config_json_is_read() -> None:
    """Gemma 3 from 4B on: the decoder's keys lie in `text_config`."""
    a = KNOWN["gemma-3-4b"]
    nested = from_config({"model_type": "gemma3", "text_config": {**as_config(a), "model_type": "gemma3_text"}}, "x")
    assert nested.total == a.total


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("mistralai/Mistral-Small-24B-Base-2501", "mistral-small-24b"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
    ],
)
def test_hub_names_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str, known: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find(base).total == KNOWN[known].total
    assert find(base).name == base


def test_the_hubs_cache_wins_over_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(as_config(KNOWN["qwen2.5-7b"]) | {"num_hidden_layers": 2}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find("Qwen/Qwen2.5-7B").layers == 2


def test_lora_by_hand() -> None:
    """Llama 3.1 8B, rank 16: q and o 2 x 8192, k and v 2 x 5120, the MLP 3 x 18432, in 32 layers."""
    a = KNOWN["llama-3.1-8b"]
    assert a.lora(16) == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert a.lora(8, ("q_proj", "self_attn.v_proj")) == 32 * 8 * (8192 + 5120)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.base: found 'meta/llama-3.1-71b'.*Did you mean 'llama-3.1-70b'"):
        find("meta/llama-3.1-71b")
    with pytest.raises(ModelError, match="model_type: found 'bert'; the planner has no shape"):
        from_config({"model_type": "bert"}, "x")
    with pytest.raises(ModelError, match="'intermediate_size' is missing"):
        from_config({k: v for k, v in as_config(KNOWN["qwen3-8b"]).items() if k != "intermediate_size"}, "x")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        find(str(tmp_path))
    with pytest.raises(ModelError, match="'c_attn'; no linear layer of this name"):
        KNOWN["qwen3-8b"].lora(8, ("c_attn",))
