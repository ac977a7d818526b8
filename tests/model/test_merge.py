"""Merged weights against PEFT's own merge and by hand: both kinds of base, other layers, memory, what doesn't fit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from hybrid_scale.errors import ModelError
from hybrid_scale.model.export import export
from hybrid_scale.model.tiny import write_model
from hybrid_scale.model.trained import Merging
from tests.model.exports import SHAPE, TEXTS, TOLERANCE, copy_of, distance, on, our_vectors, spread, trained, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("inputs") / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("saved", ["backbone", "causal lm"])
def test_merged_weights_equal_peft(base, tmp_path, dtype, saved):
    """PEFT's own merge of the adapter on the whole model, rounded once; the base saved with and without its head."""
    folder = base
    if saved == "causal lm":
        folder = tmp_path / "lm" / "model"
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=len(tokenizer)))
        spread(model)
        model.save_pretrained(folder, max_shard_size="60KB")
        tokenizer.save_pretrained(folder)
        assert (folder / "model.safetensors.index.json").is_file()
    run = trained(folder, tmp_path, lora={"rank": 4, "alpha": 6.0, "targets": ["q_proj", "down_proj"]})
    export(run, "merged", tmp_path / "out", Merging(dtype, shard_bytes=30_000))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(files):05d}\.safetensors", path.name) for path in files)
    shards = {path.name: load_file(path) for path in files}
    sizes = [sum(t.nbytes for t in shard.values()) for shard in shards.values()]
    assert all(size <= 30_000 or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(folder, dtype=torch.float32), str(run.weights))
    expected = plain.merge_and_unload().state_dict()
    assert index["weight_map"].keys() == expected.keys()
    for name, weight in expected.items():
        found = shards[index["weight_map"][name]][name]
        assert found.dtype == getattr(torch, dtype)
        torch.testing.assert_close(found, weight.to(found.dtype), rtol=2**-7 if dtype == "bfloat16" else 1e-6, atol=1e-7)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert (loaded.dtype, loaded.config.architectures) == (getattr(torch, dtype), ["LlamaModel"])


def test_merging_a_weight_by_hand(base, tmp_path):
    """W + (alpha / rank) B A of one layer, in float64 by numpy."""
    run = trained(base, tmp_path, lora={"rank": 4, "alpha": 6.0, "targets": ["k_proj"]})
    export(run, "merged", tmp_path / "out", Merging("float32"))
    name = "layers.1.self_attn.k_proj"
    adapter = load_file(run.weights / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
    before = load_file(base / "model.safetensors")[f"{name}.weight"].double().numpy()
    after = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(after[f"{name}.weight"].numpy(), before + 1.5 * b @ a, atol=1e-6)
    untouched = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(after[untouched], load_file(base / "model.safetensors")[untouched])


def test_a_conv1d_is_merged_the_other_way_round(base, tmp_path):
    """GPT-2 keeps weights as [in, out]; its square ones would take a transposed delta without a word."""
    folder = tmp_path / "in" / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(tokenizer), n_positions=128))
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = trained(folder, tmp_path, lora={"rank": 4, "targets": ["c_proj", "c_attn"]}, attention_implementation="sdpa")
    export(run, "sentence-transformers", tmp_path / "out", Merging("float32"))
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, prompt_name="passage")
    assert distance(our_vectors(run, "passage"), found) <= TOLERANCE


def test_qlora_merges_into_the_weights_it_was_trained_on(base, tmp_path):
    """`nf4`: the vectors of the 4-bit run; `original`: others, by far more than rounding."""
    run = trained(base, tmp_path, quantization="nf4", pooling="mean")
    expected = our_vectors(run, "passage")
    vectors = {}
    for into in ("nf4", "original"):
        export(run, "sentence-transformers", tmp_path / into, Merging("float32", into=into))
        vectors[into] = SentenceTransformer(str(tmp_path / into), device="cpu").encode(TEXTS, prompt_name="passage")
    assert distance(expected, vectors["nf4"]) <= TOLERANCE
    assert distance(expected, vectors["original"]) > 1e-3
    assert "merged into the original ones" in (tmp_path / "original" / "README.md").read_text()
    assert "merged into those weights, dequantised" in (tmp_path / "nf4" / "README.md").read_text()


def test_what_doesnt_fit_is_listed(base, tmp_path):
    run = trained(base, tmp_path, lora={"rank": 4, "targets": ["q_proj"]})
    path = run.weights / "adapter_model.safetensors"
    whole = load_file(path)
    strange = {"base_model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32), "other": torch.ones(1)}
    for change, said in (
        (strange, r"2 tensors of the adapter .*LlamaModel: base_model\.model\.layers\.7\.mlp\.up_proj\.lora_A\.weight, other"),
        ({"base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, "layers.0.mlp.up_proj: only A"),
        ({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}, r"\(32, 16\).*\(32, 32\)"),
    ):
        save_file({**whole, **change}, path)
        with pytest.raises(ModelError, match=said):
            export(run, "merged", tmp_path / "out", Merging("float32"))
    with pytest.raises(ModelError, match="--merge-into: found 'nf4'; the run was trained with quantization: none"):
        export(run, "merged", tmp_path / "out", Merging("float32", into="nf4"))
    for key, said in (("auto_map", "code of its own"), ("quantization_config", "its weights are quantised")):
        other = copy_of(base, tmp_path / key / "model")
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, key: {"quant_method": "fp8"}}))
        with pytest.raises(ModelError, match=said):
            export(on(other, run), "merged", tmp_path / "out", Merging("float32"))
    poor = copy_of(base, tmp_path / "poor" / "model")
    weights = load_file(base / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "norm.weight"}, poor / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \['norm.weight'\]"):
        export(on(poor, run), "merged", tmp_path / "out", Merging("float32"))
    assert not (tmp_path / "out").exists()


MERGE_IN_CHILD = """
import sys
from pathlib import Path
from hybrid_scale.config import RunConfig
from hybrid_scale.model import load
from hybrid_scale.model.export import export
from hybrid_scale.model.trained import Merging, Trained
from hybrid_scale.data.text import load_text_encoder

def memory(kind):
    return int(next(line for line in open("/proc/self/status") if line.startswith(kind)).split()[1]) * 1024

def merge(tree, weights, out):
    config = RunConfig.model_validate_json(tree)
    export(Trained(config, Path(weights), 1, load_text_encoder(config)), "merged", Path(out), Merging("float32", 20_000_000))

merge(*sys.argv[1:4])  # a small one first: what libraries load on first use isn't the model's
open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = memory("VmRSS")
merge(*sys.argv[4:7])
print(memory("VmHWM") - before)
"""


def test_merging_holds_a_shard_not_the_model(base, tmp_path):
    """A base of 200 MB: at most four tensors of its largest size and two shards of 20 MB. Seen: 27 MB."""
    folder = tmp_path / "large" / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    write_model(folder, len(tokenizer), hidden=640, layers=11, heads=4)
    tokenizer.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 200e6
    small, large = trained(base, tmp_path / "a"), trained(folder, tmp_path / "b")
    arguments = [
        x
        for run, out in ((small, "small"), (large, "out"))
        for x in (run.config.model_dump_json(), str(run.weights), str(tmp_path / out))
    ]
    done = subprocess.run([sys.executable, "-c", MERGE_IN_CHILD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    largest = 640 * 640 * 3 * 4
    assert 20e6 < int(done.stdout) <= 4 * largest + 2 * 20e6 < size / 2
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10
