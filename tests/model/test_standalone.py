"""Folders for sentence-transformers and transformers against our own encoder and model: token ids, vectors, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    MistralConfig,
    MistralModel,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.errors import ModelError
from hybrid_scale.model.export import export
from hybrid_scale.model.load import load_embedder
from hybrid_scale.model.tiny import write_model
from hybrid_scale.model.trained import FORMATS, Merging, Trained
from tests.model.exports import SHAPE, TEXTS, TOLERANCE, distance, our_vectors, rest, spread, trained, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("inputs") / "model")


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
