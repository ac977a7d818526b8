"""Exported folders against our own encoder and model: token ids, vectors, weights, memory, refusals.

The oracle is the run's TextEncoder and Embedder with the checkpoint loaded; the folders are opened by sentence-transformers,
PEFT and transformers alone.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.errors import ModelError, RunError
from hybrid_scale.model import export as exporting
from hybrid_scale.model.card import model_card
from hybrid_scale.model.export import export, new_folder, push, save_trained
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model, write_tokenizer
from hybrid_scale.model.trained import FORMATS, Merging, Trained
from tests.train.setup import make_config

TEXTS = [
    "",
    "a",
    "Where is the station?",
    "Où est la gare ? Straße, naïve.",
    "東京は日本の首都です。人口は千四百万人。",
    "मौसम आज बहुत अच्छा है",
    "القاهرة عاصمة مصر",
    "Москва — столица России",
    " two  spaces\n\tand more ",
    "long text that is cut " * 60,
    "ein Wort",
    "長い" * 200,
]
TOLERANCE = 1e-5
"""Largest difference between numbers of two float32 vectors of length 1. Seen: 3e-7."""
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention is far from uniform, with its tokenizer."""
    folder = tmp_path_factory.mktemp("inputs") / "model"
    tokenizer = write_tokenizer(TEXTS, folder, vocabulary=400)
    model = write_model(folder, len(tokenizer), hidden=32, layers=2, heads=4)
    spread(model)
    model.save_pretrained(folder)
    return folder


def spread(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))


def trained(base: Path, folder: Path, facts: dict[str, Any] | None = None, **model: Any) -> Trained:
    """A run's checkpoint with an adapter (or full weights) as far from its start as after real training."""
    config = make_config(base.parent, model={"base": str(base), **model})
    embedder = load_embedder(config.model, seed=1)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, parameter in embedder.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
    save_trained(embedder, weights, folder / "adapter")
    return Trained(config, folder / "adapter", 3, load_text_encoder(config), **(facts or {}))


def our_vectors(run: Trained, role: Any, limit: int | None = None) -> np.ndarray:
    """[len(TEXTS), D], texts padded together; `limit` replaces the role's longest text."""
    embedder = load_embedder(run.config.model, seed=0, adapter=run.weights).eval()
    encoder = load_text_encoder(run.config)
    if limit is not None:
        encoder.max_tokens[role] = limit
    with torch.no_grad():
        return embedder(**encoder.collate(encoder.encode(role, TEXTS))).numpy()


def distance(first: np.ndarray, second: Any) -> float:
    return float(np.abs(first - np.asarray(second)).max())


# sentence-transformers


@pytest.mark.parametrize("pooling", ["last", "mean", "weighted_mean"])
@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 6.0}, None], ids=["lora", "full"])
def test_sentence_transformers_gives_our_vectors(base, tmp_path, pooling, lora):
    run = trained(base, tmp_path, pooling=pooling, lora=lora)
    export(run, "sentence-transformers", tmp_path / "out", Merging("float32"))
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.similarity_fn_name == "cosine"
    passages, queries = our_vectors(run, "passage"), our_vectors(run, "query")
    assert distance(passages, model.encode(TEXTS, prompt_name="passage")) <= TOLERANCE
    assert distance(passages, model.encode_document(TEXTS, batch_size=5)) <= TOLERANCE
    assert distance(queries, model.encode_query(TEXTS, batch_size=1)) <= TOLERANCE
    assert distance(our_vectors(run, "query", limit=64), model.encode(TEXTS, prompt_name="query")) <= TOLERANCE
    assert distance(queries, passages) > 0.01, "prompts matter"
    untrained = load_embedder(run.config.model, seed=0).eval()
    encoder = load_text_encoder(run.config)
    with torch.no_grad():
        assert distance(passages, untrained(**encoder.collate(encoder.encode("passage", TEXTS)))) > 0.01, "training matters"


@pytest.mark.parametrize("begin", [False, True], ids=["no begin", "begin"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_written_tokenizer_gives_our_ids(base, tmp_path, begin, side):
    """A base that pads and cuts on the left and puts a begin token, or none; an end token that isn't its eos_token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    if begin:
        number = tokenizer.convert_tokens_to_ids("<|begin|>")
        processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", number)])
        tokenizer.backend_tokenizer.post_processor = processor
    folder = tmp_path / "in" / "model"
    write_model(folder, len(tokenizer), hidden=32, layers=1, heads=4)
    tokenizer.save_pretrained(folder)
    given = json.loads((folder / "tokenizer_config.json").read_text())
    sides = {"padding_side": side, "truncation_side": side}
    (folder / "tokenizer_config.json").write_text(json.dumps({**given, **sides}))
    run = trained(folder, tmp_path, end_token="Ġa" if "Ġa" in tokenizer.get_vocab() else "a")
    export(run, "merged", tmp_path / "out", Merging("float32"))
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (written.padding_side, written.truncation_side, written.model_max_length) == ("right", "right", 64)
    for role, limit in (("query", 32), ("passage", 64)):
        prompted = [run.texts.prompts[role] + text for text in TEXTS]
        expected = run.texts.encode(role, TEXTS)
        assert written(prompted, truncation=True, max_length=limit)["input_ids"] == expected
        assert {len(row) for row in expected} >= {limit}
        assert {row[-1] for row in expected} == {run.texts.end} != {tokenizer.eos_token_id}
        assert all((row[0] == number) == begin for row in expected) if begin else not run.texts.begin


ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], Any]] = {
    "mistral": (MistralConfig, MistralModel),
    "qwen2": (Qwen2Config, Qwen2Model),
    "qwen3": (Qwen3Config, Qwen3Model),
}


@pytest.mark.parametrize("architecture", ["llama", *ARCHITECTURES])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_architectures_and_attention(base, tmp_path, architecture, attention):
    """Every architecture whose attention may be switched, with and without padding in a batch."""
    folder = base
    if architecture != "llama":
        kind, model_class = ARCHITECTURES[architecture]
        folder = tmp_path / "in" / "model"
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = model_class(kind(**SHAPE, vocab_size=len(tokenizer), head_dim=8))
        spread(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run = trained(folder, tmp_path, attention=attention, attention_implementation="sdpa", pooling="mean")
    export(run, "sentence-transformers", tmp_path / "out", Merging("float32"))
    expected = our_vectors(run, "passage")
    for implementation in ("sdpa", "eager"):
        given = {"attn_implementation": implementation}
        model = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs=given)
        for size in (len(TEXTS), 1):
            assert distance(expected, model.encode(TEXTS, prompt_name="passage", batch_size=size)) <= TOLERANCE
    other = {"causal": "bidirectional", "bidirectional": "causal"}[attention]
    switched = Trained(
        run.config.model_copy(update={"model": run.config.model.model_copy(update={"attention": other})}), *rest(run)
    )
    assert distance(expected, our_vectors(switched, "passage")) > 0.01


def copy_of(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder))


def on(base: Path, run: Trained) -> Trained:
    """The same checkpoint with another base."""
    model = run.config.model.model_copy(update={"base": str(base)})
    return Trained(run.config.model_copy(update={"model": model}), *rest(run))


def rest(run: Trained) -> tuple[Any, ...]:
    return run.weights, run.step, run.texts


def test_bidirectional_attention_is_refused_where_it_cant_be_said(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, config, said in (
        ("gpt2", GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=len(tokenizer)), "can't take the causal mask from 'gpt2'"),
        ("window", MistralConfig(**SHAPE, vocab_size=len(tokenizer), head_dim=8, sliding_window=60), "window of 60 tokens"),
    ):
        folder = tmp_path / name / "model"
        AutoModel.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run = trained(folder, tmp_path / name, attention="bidirectional", attention_implementation="sdpa")
        for format in FORMATS[1:]:
            with pytest.raises(ModelError, match=f"{said}.*adapter"):
                export(run, format, tmp_path / "out", Merging("float32"))
        assert list(tmp_path.glob("*out*")) == []


# Merging


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


# Adapter


def test_the_adapter_folder_loads_in_peft_and_here(base, tmp_path):
    run = trained(base, tmp_path)
    export(run, "adapter", tmp_path / "out", Merging("float32"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["inference_mode"]) == (str(base), None, True)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), str(tmp_path / "out"))
    expected = our_vectors(run, "query")
    with torch.no_grad():
        states = [plain(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in run.texts.encode("query", TEXTS)]
    assert distance(expected, torch.nn.functional.normalize(torch.stack(states), dim=-1)) <= TOLERANCE
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].replace("FOLDER", str(tmp_path / "out")).replace('["..."]', "texts"), scope | {"texts": TEXTS}, scope)
    assert distance(expected, scope["vectors"].detach()) <= TOLERANCE


def test_an_adapter_folder_of_a_full_run_is_refused(base, tmp_path):
    run = trained(base, tmp_path, lora=None)
    with pytest.raises(ModelError, match="the run trained all weights"):
        export(run, "adapter", tmp_path / "out", Merging("float32"))


# The card


def test_the_card_is_yaml_and_says_what_was_done(base, tmp_path):
    results = ({"task": "xquad", "metrics": {"map": 0.25, "mono_map": None}}, {"task": "mlqa", "metrics": {"map": 0.5}})
    facts = {
        "base_name": "org/base-7b",
        "languages": ("en", "no", "zh-Hant", "sr-Latn", "zh"),
        "fingerprint": "f1n9er",
        "scores": results,
        "license": "apache-2.0",
    }
    run = trained(base, tmp_path, facts, query_prompt="a | b\n")
    card = model_card(run, "sentence-transformers", Merging("bfloat16"))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "language": ["en", "no", "zh", "sr"],
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "base_model": "org/base-7b",
        "base_model_relation": "finetune",
        "tags": ["sentence-transformers", "feature-extraction"],
    }
    for line in (
        "| measure | xquad | mlqa |",
        "| map | 0.2500 | 0.5000 |",
        "| mono_map | - | - |",
        '| query prompt | "a \\| b\\n" |',
        "| longest query, passage (tokens) | 32, 64 |",
        "Fingerprint of the training data: `f1n9er`.",
    ):
        assert f"\n{line}\n" in body
    assert "rounded to bfloat16 once" in body
    assert "cut at 32 in training" in body
    assert str(base) not in card
    plain = model_card(Trained(run.config, *rest(run)), "adapter", Merging("float32"))
    assert "## Scores" not in plain
    assert "base_model" not in yaml.safe_load(plain.split("---\n")[1]), "a folder's path is no name on the Hub"
    assert str(base) not in plain


# Folders and the Hub


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(RunError, match="an export never overwrites"), new_folder(tmp_path / name):
            raise AssertionError("not reached")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "broken") as beside:
        (beside / "absent").rename(beside / "half")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as beside:
        (beside / "whole").touch()
        assert list((tmp_path / "empty").iterdir()) == []
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_push_uploads_the_folder_and_never_shows_the_token(tmp_path, monkeypatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **given: Any) -> None:
            calls.append((name, given))

        def upload_folder(self, **given: Any) -> None:
            calls.append(("upload", given))
            if given["repo_id"] == "me/refused":
                raise OSError("403 for hf_secret")

    monkeypatch.setattr(exporting, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert push(tmp_path, "me/model").endswith("/me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][1].items() >= {"repo_id": "me/model", "folder_path": tmp_path}.items()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelError, match="nobody else has this folder"):
        push(tmp_path, "me/model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match=r"--push: found 'me/refused'; the Hub refused: 403 for \(token\)") as caught:
        push(tmp_path, "me/refused")
    assert "hf_secret" not in str(caught.value)
