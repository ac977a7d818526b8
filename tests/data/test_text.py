"""Tokens of a text: prompt, cut, end token, and lengths that agree with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from hybrid_scale.data.prepared import Pairs
from hybrid_scale.data.text import length_table, load_text_encoder, make_text_encoder, write_length_tables
from hybrid_scale.errors import ModelError
from tests.train.setup import make_config, write_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("text"))


def test_prompt_cut_and_end_token(folder):
    encoder = load_text_encoder(make_config(folder, data={"max_query_tokens": 12}, model={"query_prompt": "ask: "}))
    short, long = encoder.encode("query", ["g1", "g1 " * 50])
    assert encoder.tokenizer.decode(short) == "ask: g1<|end|>"
    assert len(long) == 12
    assert long[-1] == encoder.end
    assert encoder.tokenizer.decode(long).startswith("ask: g1 g1")


def test_lengths_are_those_of_the_encoded_texts(folder):
    config = make_config(folder)
    encoder, pairs = load_text_encoder(config), Pairs(folder / "train")
    lengths = length_table(folder / "train", "passages", pairs.passages, "passage", encoder)
    rows = np.array([0, 5, 17])
    assert lengths[rows].tolist() == [len(ids) for ids in encoder.encode("passage", pairs.passages.column("text", rows))]
    summary = write_length_tables(folder / "train", encoder)
    assert summary["passages"]["longest"] == lengths.max()


def test_another_prompt_has_another_table(folder):
    encoders = [load_text_encoder(make_config(folder, model={"query_prompt": prompt})) for prompt in ("a: ", "b: ")]
    assert encoders[0].digest != encoders[1].digest


def test_collate_pads_on_the_right(folder):
    encoder = load_text_encoder(make_config(folder, model={"attention_implementation": "sdpa"}))
    batch = encoder.collate([[4, 5, 6], [7]])
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, encoder.end, encoder.end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_puts_texts_end_to_end(folder):
    batch = load_text_encoder(make_config(folder)).collate([[7], [4, 5, 6], [8, 9]])
    assert batch["input_ids"].tolist() == [[7, 4, 5, 6, 8, 9]]
    assert batch["lengths"].tolist() == [1, 3, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_the_layout_of_a_batch_has_no_part_in_the_digest(folder):
    layouts = [load_text_encoder(make_config(folder, model={"attention_implementation": name})) for name in ("packed", "sdpa")]
    assert [encoder.packed for encoder in layouts] == [True, False]
    assert layouts[0].digest == layouts[1].digest


def test_a_tokenizer_without_end_token_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        make_text_encoder(AutoTokenizer.from_pretrained(tmp_path), make_config(folder))
    assert "the tokenizer has no eos_token, and last-token pooling needs an end token" in str(caught.value)


def test_an_end_token_outside_the_vocabulary_is_refused(folder):
    with pytest.raises(ModelError, match=r"model.end_token: found '</nothing>'; not a token of the vocabulary"):
        load_text_encoder(make_config(folder, model={"end_token": "</nothing>"}))


def test_a_limit_below_the_prompt_is_refused(folder):
    with pytest.raises(ModelError, match="prompt, begin and end tokens alone take"):
        load_text_encoder(make_config(folder, data={"max_query_tokens": 4}, model={"query_prompt": "a long prompt for this: "}))


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


@pytest.mark.parametrize(
    ("template", "eos", "asked", "begin", "ends"),
    [
        ("$A <|endoftext|>", "<|im_end|>", None, "", "<|endoftext|>"),
        ("$A", "<|im_end|>", None, "", "<|im_end|>"),
        ("<s> <|im_start|> $A", "</s>", None, "<s> <|im_start|>", "</s>"),
        ("<s> $A </s> <|endoftext|>", "</s>", None, "<s>", "</s> <|endoftext|>"),
        ("<s> $A </s>", "<|im_end|>", "<|im_end|>", "<s>", "<|im_end|>"),
        ("$A </s>", None, None, "", "</s>"),
    ],
    ids=["Qwen3-Embedding", "Qwen3", "two begin tokens", "two end tokens", "asked for another", "no eos_token"],
)
def test_the_tokens_around_a_text_are_the_tokenizers_own(folder, template, eos, asked, begin, ends):
    """As the tokenizer's own template has them, cut included; the layout is told."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    tokenizer.eos_token = eos
    pieces = [(name, tokenizer.convert_tokens_to_ids(name)) for name in SPECIALS]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pieces)
    config = make_config(folder, data={"max_query_tokens": 12}, model={"query_prompt": "", "end_token": asked})
    encoder = make_text_encoder(tokenizer, config)
    tokens = lambda ids: " ".join(tokenizer.convert_ids_to_tokens(list(ids)))  # noqa: E731
    assert (tokens(encoder.begin), tokens(encoder.ends), tokens([encoder.end])) == (begin, ends, ends.split()[-1])
    short, long = encoder.encode("query", ["g1", "g1 " * 50])
    assert len(long) == 12
    for row in (short, long):
        assert row[: len(encoder.begin)] == list(encoder.begin)
        assert row[-len(encoder.ends) :] == list(encoder.ends)
    if asked is None and "$A " in template:
        assert long == tokenizer("g1 " * 50, truncation=True, max_length=12)["input_ids"]
    assert encoder.layout().startswith(f"{begin} text {ends} (".lstrip())
    said = "the tokenizer itself ends texts with </s>" if asked else "as the tokenizer itself does"
    assert said in encoder.layout() or template.endswith("$A")
