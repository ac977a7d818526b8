"""Which bases are accepted, rule by rule, on tiny models of real families; what is said of those that are."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_scale.base_files import INDEX, SINGLE
from hybrid_scale.errors import ModelError
from hybrid_scale.model.acceptance import accept, unquantised
from hybrid_scale.model.base import read_config
from hybrid_scale.model.load import load_embedder
from hybrid_scale.train.settle import dry_run
from tests.model.bases import FAMILIES, PICTURES, run_over, write_base, write_config

DENSE = sorted(set(FAMILIES) - {"qwen3_moe", "mixtral", "gpt_oss", "bert", "t5", *PICTURES})
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 0], [9, 8, 7, 6]]), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
ATTENTION = {"rank": 4, "targets": ["q_proj", "v_proj"]}


def refused(config, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        accept(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", DENSE)
def test_dense_families_train_with_adapters_on_all_linear_layers(tmp_path, family):
    """Every adapter gets a gradient, also where there is no `intermediate_size`; padding changes nothing."""
    config = run_over(write_base(tmp_path, family))
    assert accept(config) == []
    embedder = load_embedder(config.model, 0)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    embedder.eval()
    found = embedder(**BATCH)
    alone = embedder(input_ids=BATCH["input_ids"][:1, :3], attention_mask=torch.ones(1, 3, dtype=torch.int64))
    torch.testing.assert_close(found[:1], alone, atol=1e-5, rtol=0)
    found[:, 0].sum().backward()
    assert [name for name, p in embedder.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes, 4 bits (fp4)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits (nf4)"),
    ],
)
def test_bases_quantised_otherwise_are_refused(tmp_path, written, shown):
    base = write_config(tmp_path, "llama", quantization_config=written)
    refused(run_over(base), f"model.base: found .*quantised already \\({re.escape(shown)}\\), and model.quantization is none")
    if written.get("bnb_4bit_quant_type") != "nf4":
        refused(run_over(base, quantization="nf4"), f"quantised already \\({re.escape(shown)}\\), and model.quantization is nf4")


def test_nf4_of_another_type_of_products_is_refused(tmp_path):
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = write_config(tmp_path, "llama", quantization_config={**nf4, "bnb_4bit_compute_dtype": "bfloat16"})
    refused(run_over(base, quantization="nf4"), "multiply in bfloat16, and model.dtype is float32")


def test_quantised_weights_without_a_word_in_config_json_are_refused(tmp_path):
    base = write_base(tmp_path, "llama")
    weights = load_file(base / SINGLE)
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, base / SINGLE, metadata={"format": "pt"})
    refused(run_over(base), f"{name} is stored as F8_E4M3, and weights must be floating-point numbers")


@pytest.mark.parametrize(("family", "held"), [("qwen3_moe", 24_576), ("mixtral", 24_576), ("gpt_oss", 24_576), ("falcon", 0)])
def test_models_that_nf4_leaves_mostly_in_full_are_refused(tmp_path, family, held):
    """24,576: projections of 64 x 64, 64 x 32, 64 x 32 and 64 x 64 in two layers. Falcon's linear layers are of its own class."""
    config = run_over(write_config(tmp_path, family), quantization="nf4", lora={"rank": 4})
    refused(config, f"model.quantization: found 'nf4'; {held:,} of [0-9,]+ parameters would be held in 4 bits")
    assert unquantised(read_config(config.model), config.model)[1] == held


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_models_that_nf4_takes_whole_are_accepted(tmp_path, family):
    config = run_over(write_config(tmp_path, family))
    left, held = unquantised(read_config(config.model), config.model)
    assert held > 20 * sum(left.values()) or set(left) <= {"wpe.weight"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_adapters_on_experts_are_refused_and_beside_them_accepted(tmp_path, family):
    base = write_base(tmp_path, family)
    refused(run_over(base), r"model.lora.targets: found 'all-linear'; .*has experts.*k_proj, o_proj, q_proj, v_proj")
    refused(run_over(base, lora={"rank": 4, "targets": ["q_proj", "experts"]}), "experts")
    config = run_over(base, lora=ATTENTION)
    assert len(accept(config)) == 1
    assert "its experts stay as they are" in accept(config)[0]
    trained = [name for name, p in load_embedder(config.model, 0).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("self_attn" in name for name in trained)


@pytest.mark.parametrize(
    ("family", "targets", "match"),
    [
        ("phi3", ["q_proj", "o_proj", "gate_proj"], "found 'q_proj, gate_proj'; 2 of 3 targets match no layer of Phi3Model"),
        ("llama", ["query_key_value"], "found 'query_key_value'; 1 of 1 targets match no layer of LlamaModel"),
        ("gpt2", ["c_attn", "k_proj"], "found 'k_proj'; 1 of 2 targets match no layer of GPT2Model"),
        ("llama", ["q_prj"], r"Did you mean 'q_proj'\?"),
        (
            "llama",
            ["q_proj", "embed_tokens"],
            "found 'embed_tokens'; adapters must sit on linear layers, and embed_tokens is Emb",
        ),
        ("qwen3", ["norm"], "found 'norm'; adapters must sit on linear layers, and norm is Qwen3RMSNorm"),
    ],
)
def test_targets_that_match_nothing_or_something_else_are_named(tmp_path, family, targets, match):
    refused(run_over(write_config(tmp_path, family), lora={"rank": 4, "targets": targets}), match)


def test_a_dry_run_refuses_before_it_opens_data_or_weights(tmp_path):
    base = write_config(tmp_path, "olmo2")
    with pytest.raises(ModelError, match="found 'qkv_proj'; 1 of 1 targets match no layer of Olmo2Model"):
        dry_run(run_over(base, lora={"rank": 4, "targets": ["qkv_proj"]}), 8)
    with pytest.raises(ModelError, match="for 512 positions"):
        dry_run(run_over(base, passage=600), 8)


@pytest.mark.parametrize(("family", "most"), [("llama", 512), ("gpt2", 128), ("opt", 128), ("gemma3_text", 512)])
def test_texts_longer_than_the_positions_are_refused(tmp_path, family, most):
    base = write_base(tmp_path, family)
    accept(run_over(base, passage=most))
    refused(run_over(base, passage=most + 1), f"data.max_passage_tokens: found {most + 1}; .*for {most} positions")
    accept(run_over(base, evaluation={"max_query_tokens": most}))
    longer = run_over(base, evaluation={"max_query_tokens": most + 1})
    refused(longer, f"evaluation.max_query_tokens: found {most + 1}; .*for {most} positions")


def test_a_model_without_positions_takes_any_length(tmp_path):
    accept(run_over(write_base(tmp_path, "bloom"), passage=4000))


@pytest.mark.parametrize("limits", [(32, 57), (57, 32)])
def test_rotary_factors_that_follow_the_longest_text_are_refused(tmp_path, limits):
    base = write_base(tmp_path, "longrope")
    refused(run_over(base, *limits), "found 57; .*'longrope' rotary factors.*longer than 56 tokens.*at most 56")
    assert accept(run_over(base, 56, 56)) == []


@pytest.mark.parametrize("family", ["longrope", "dynamic"])
def test_within_the_original_length_a_longer_neighbour_changes_nothing(tmp_path, family):
    embedder = load_embedder(run_over(write_base(tmp_path, family)).model, 0).eval()
    short = embedder(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.int64))
    ids, mask = torch.zeros(2, 56, dtype=torch.int64), torch.ones(2, 56, dtype=torch.int64)
    ids[0, :3], mask[0, 3:] = torch.tensor([5, 6, 7]), 0
    torch.testing.assert_close(embedder(input_ids=ids, attention_mask=mask)[:1], short, atol=1e-5, rtol=0)


def test_encoders_and_models_of_two_parts_are_refused(tmp_path):
    base = write_config(tmp_path / "bert", "bert")
    refused(run_over(base), "'bert' is an encoder, whose tokens look at later ones whatever model.attention says")
    refused(run_over(write_config(tmp_path / "t5", "t5")), "'t5' has an encoder and a decoder")


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_bidirectional_attention_is_refused_where_it_cant_be_had(tmp_path, family):
    refused(run_over(write_config(tmp_path, family), attention="bidirectional"), f"'{family}' can't attend to later tokens")


def test_an_adapter_is_no_base(tmp_path):
    base = write_base(tmp_path, "llama")
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    refused(run_over(base), "it is an adapter of some/model, and a base must be a whole model")


# Weight files


def split(base: Path, scale: float) -> None:
    """The same folder's weights once more, times `scale`, as two files and their index."""
    weights = {name: tensor * scale for name, tensor in load_file(base / SINGLE).items()}
    names, where = sorted(weights), {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    (base / INDEX).write_text(json.dumps({"weight_map": where}))


def test_two_sets_of_other_weights_are_refused_and_of_the_same_taken(tmp_path):
    base = write_base(tmp_path, "llama")
    split(base, 1.0)
    assert accept(run_over(base)) == []
    split(base, 1.5)
    refused(run_over(base), "model.safetensors and the files of .* hold different weights")
    with pytest.raises(ModelError, match="hold different weights"):
        load_embedder(run_over(base).model, 0)


def test_a_folder_without_config_json_names_the_one_inside(tmp_path):
    """An old folder of sentence-transformers, and one of several checkpoints."""
    refused(run_over(tmp_path), "config.json can't be read: there is none. Name the folder of the model itself")
    for inside in ("0_Transformer", "checkpoint-500"):
        write_base(tmp_path / inside, "llama")
        refused(run_over(tmp_path), r"there is none. Name .*/0_Transformer, which holds a model")
    assert accept(run_over(tmp_path / "0_Transformer")) == []


def test_missing_files_and_other_formats_are_named(tmp_path):
    base = write_base(tmp_path, "llama")
    split(base, 1.0)
    (base / SINGLE).unlink()
    (base / "model-1.safetensors").unlink()
    refused(run_over(base), r"1 of 2 files are missing \(model-1.safetensors\)")
    (base / INDEX).unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    refused(run_over(base), "Convert pytorch_model.bin to safetensors")


def test_an_embedding_of_another_size_than_config_json_says_is_refused(tmp_path):
    base = write_base(tmp_path, "llama")
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 310}))
    refused(run_over(base), r"its embedding has 300 rows, and its config.json says 310 \(vocab_size\)")


# What is said


def test_of_a_model_for_pictures_the_text_model_alone_is_loaded(tmp_path):
    """As the whole model embeds a text: with transformers' own class."""
    from transformers import AutoModel

    config = run_over(write_base(tmp_path, "gemma3"))
    assert accept(config) == [
        f"{tmp_path}: of this 'gemma3' its text model alone (Gemma3TextModel) is loaded, trained and exported."
    ]
    embedder = load_embedder(config.model, 0).eval()
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    states = whole(input_ids=BATCH["input_ids"][1:], attention_mask=BATCH["attention_mask"][1:]).last_hidden_state
    expected = torch.nn.functional.normalize(states[:, -1], dim=-1)
    torch.testing.assert_close(embedder(**BATCH)[1:], expected, atol=1e-6, rtol=0)


def test_what_of_a_sentence_transformers_model_is_taken_over(tmp_path):
    base = write_base(tmp_path, "llama", causal=False)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    )
    (base / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "Q: ", "document": ""}}))
    (said,) = accept(run_over(base))
    assert "its Transformer's weights are taken over; not taken over: " in said
    for part in ("pooling (mean_tokens; model.pooling is last)", '"query": "Q: "', "its module Dense (2_Dense)"):
        assert part in said
