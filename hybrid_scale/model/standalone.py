"""Folders that need nothing of this project: merged weights with config and tokenizer, and sentence-transformers' modules.

The tokenizer is written so that it cuts and puts begin and end token by itself, and compared with ours before anything is kept.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.base import read_config, skeleton
from hybrid_scale.model.merge import merged_weights, write_weights
from hybrid_scale.model.trained import DTYPES, Merging, Texts, Trained

SWITCHABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose `is_causal: false` in config.json is tested to give our bidirectional vectors in transformers 5.23."""
POOLINGS = {"last": "lasttoken", "mean": "mean_tokens", "weighted_mean": "weightedmean_tokens"}
"""Our poolings -> the keys `pooling_mode_...` that every release of sentence-transformers reads."""
PROBES = ("", "a", "Où est la gare ?", "東京は日本の首都です。", "मौसम कैसा है", " two  spaces\n", "0123456789 " * 2000)
"""Texts on which a written tokenizer must give our token ids."""


def write_merged(trained: Trained, folder: Path, merging: Merging) -> None:
    """Weights, config.json and a tokenizer that puts the end token itself."""
    settings = trained.config.model
    config = read_config(settings)
    for key, rule in (
        ("auto_map", "the model needs code of its own, which this folder wouldn't hold"),
        ("quantization_config", "its weights are quantised, and an adapter is merged into whole ones"),
    ):
        if getattr(config, key, None) is None:
            continue
        raise ModelError(describe("model.base", settings.base, rule, "Use --format adapter."))
    if settings.attention == "bidirectional":
        _check_switchable(trained, config)
        config.is_causal = False
    model = skeleton(config)
    write_weights(merged_weights(trained, model, merging.into), folder, DTYPES[merging.dtype], merging.shard_bytes)
    config.architectures = [type(model).__name__]
    config.dtype = DTYPES[merging.dtype]
    config.save_pretrained(folder)
    _write_tokenizer(trained.texts, folder)


def write_sentence_transformers(trained: Trained, folder: Path, merging: Merging) -> None:
    """A merged folder with the modules Transformer, Pooling, Normalize. Queries are cut at their own limit by `encode_query`."""
    write_merged(trained, folder, merging)
    limits, prompts = trained.texts.max_tokens, trained.texts.prompts
    transformer: dict[str, Any] = {"max_seq_length": limits["passage"], "do_lower_case": False}
    if limits["query"] != limits["passage"]:
        transformer |= {"query_length": limits["query"], "document_length": limits["passage"]}
    width = AutoConfig.from_pretrained(folder).get_text_config().hidden_size
    modes = {f"pooling_mode_{key}": key == POOLINGS[trained.config.model.pooling] for key in ("cls_token", *POOLINGS.values())}
    kinds = ("Transformer", "Pooling", "Normalize")
    places = ("", "1_Pooling", "2_Normalize")
    for place in places[1:]:
        (folder / place).mkdir()
    write_json(folder / "sentence_bert_config.json", transformer)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": True})
    write_json(folder / "2_Normalize" / "config.json", {})
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
        ],
    )
    named = {"query": prompts["query"], "passage": prompts["passage"], "document": prompts["passage"]}
    facts = {"model_type": "SentenceTransformer", "prompts": named, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", facts)


def _check_switchable(trained: Trained, config: PretrainedConfig) -> None:
    """Raises ModelError where `is_causal: false` wouldn't give the attention of the run."""
    longest, window = max(trained.texts.max_tokens.values()), getattr(config, "sliding_window", None)
    if config.model_type not in SWITCHABLE:
        rule = f"a config.json can't take the causal mask from '{config.model_type}'"
    elif window is not None and longest > window // 2:
        rule = f"transformers would keep to a window of {window} tokens, the run didn't"
    else:
        return
    remedy = "Use --format adapter and hybrid_scale."
    raise ModelError(describe("model.attention", "bidirectional", rule, remedy))


# The tokenizer


def _write_tokenizer(texts: Texts, folder: Path) -> None:
    """Our tokenizer, which cuts, then puts begin and end tokens by itself. Raises ModelError where its ids differ from ours."""
    backend = getattr(texts.tokenizer, "backend_tokenizer", None)
    if backend is None:
        rule = "only a fast tokenizer can put the end token after the cut by itself"
        raise ModelError(describe("tokenizer", type(texts.tokenizer).__name__, rule, "Use --format adapter."))
    texts.tokenizer.save_pretrained(folder)
    _update_json(folder / "tokenizer.json", {"truncation": None, "padding": None, "post_processor": _template(texts)})
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("add_bos_token", "add_eos_token", "is_local", "local_files_only", "auto_map"):
        config.pop(key, None)
    end = texts.tokenizer.convert_ids_to_tokens(texts.ends[-1])
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # classes of one model family rebuild the post-processor on loading
        "model_max_length": texts.max_tokens["passage"],
        "padding_side": "right",
        "truncation_side": "right",
        "pad_token": config.get("pad_token") or end,
    }
    write_json(path, config)
    _compare_tokens(texts, AutoTokenizer.from_pretrained(folder))


def _template(texts: Texts) -> dict[str, Any]:
    """Post-processor: begin tokens if used, text, end tokens; truncation leaves room for all."""
    begin, ends = (list(map(str, texts.tokenizer.convert_ids_to_tokens(list(ids)))) for ids in (texts.begin, texts.ends))
    pieces = [*zip(begin, texts.begin, strict=True), *zip(ends, texts.ends, strict=True)]
    processor = TemplateProcessing(single=[*begin, "$A", *ends], special_tokens=list(dict(pieces).items()))
    return dict(json.loads(processor.__getstate__()))


def _compare_tokens(texts: Texts, written: PreTrainedTokenizerBase) -> None:
    for role, prompt in texts.prompts.items():
        prompted = [prompt + text for text in PROBES]
        theirs = written(prompted, truncation=True, max_length=texts.max_tokens[role])["input_ids"]
        for text, mine, other in zip(PROBES, texts.encode(role, PROBES), theirs, strict=True):
            if mine != other:
                rule = f"as a {role} the written tokenizer gives {other[:8]}, ours {mine[:8]}"
                raise ModelError(describe("tokenizer", text, rule, "Use --format adapter."))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _update_json(path: Path, values: dict[str, Any]) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})
