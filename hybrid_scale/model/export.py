"""Trained weights -> files: what a checkpoint holds, and folders for other programs (PEFT, transformers, sentence-transformers).

Knows neither the engine that gathered the weights nor the run directory; texts come in as an encoder, scores as numbers.
Weights are merged tensor by tensor: no model is ever held whole.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml
from huggingface_hub import HfApi, get_token
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils.hub import cached_file

from hybrid_scale.config import LoraSettings, ModelSettings, RunConfig, dump_config
from hybrid_scale.errors import ModelError, RunError, describe
from hybrid_scale.model.embedder import Embedder

PREFIX = "backbone."
PEFT_PREFIX = "base_model.model."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_BYTES = 1_000_000_000
SWITCHABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose `is_causal: false` in config.json is tested to give our bidirectional vectors in transformers 5.23."""
POOLINGS = {"last": "lasttoken", "mean": "mean_tokens", "weighted_mean": "weightedmean_tokens"}
"""Our poolings -> the keys `pooling_mode_...` that every release of sentence-transformers reads."""
PROBES = ("", "a", "Où est la gare ?", "東京は日本の首都です。", "मौसम कैसा है", " two  spaces\n", "0123456789 " * 2000)
"""Texts on which a written tokenizer must give our token ids."""

Format = Literal["adapter", "sentence-transformers", "merged"]
FORMATS: tuple[Format, ...] = ("adapter", "sentence-transformers", "merged")
MergeInto = Literal["original", "nf4"]


def save_trained(embedder: Embedder, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write full CPU weights, named as the embedder's parameters, in PEFT's layout (or `model.safetensors` without LoRA).

    Raises ModelError when a name of the trainable parameters is missing, or an adapter never left its initial zero.
    """
    from peft import PeftModel  # it loads bitsandbytes, and load.py must have set its logger before

    expected = {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}
    if set(weights) != expected:
        raise ModelError(f"{folder}: weights to save don't match the trained ones: {sorted(expected ^ set(weights))[:5]}.")
    folder.mkdir(parents=True, exist_ok=True)
    stripped = {name.removeprefix(PREFIX): tensor.contiguous() for name, tensor in weights.items()}
    if isinstance(embedder.backbone, PeftModel):
        embedder.backbone.peft_config["default"].save_pretrained(str(folder))
        adapter = {name.replace(".default.", "."): tensor for name, tensor in stripped.items()}
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        save_file(stripped, folder / "model.safetensors", metadata={"format": "pt"})


# What is exported


class Texts(Protocol):
    """Text -> token ids, as in training (`data.text.TextEncoder`)."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def prompts(self) -> Mapping[Any, str]: ...
    @property
    def max_tokens(self) -> Mapping[Any, int]: ...
    @property
    def begin(self) -> tuple[int, ...]: ...
    @property
    def end(self) -> int: ...
    def encode(self, role: Any, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Trained:
    """A checkpoint and what a reader of its model card wants to know."""

    config: RunConfig
    weights: Path
    """The checkpoint's `adapter/`: PEFT's layout, or `model.safetensors` without LoRA."""
    step: int
    texts: Texts
    base_name: str | None = None
    """The base's name on the Hub where `model.base` is a folder; null: `model.base` itself."""
    languages: tuple[str, ...] = ()
    fingerprint: str | None = None
    """Of the training data."""
    scores: tuple[dict[str, Any], ...] = ()
    """Results as in `eval/SET.json`: `task` and `metrics` {name: value or null} are read."""
    license: str = "other"

    @property
    def base(self) -> str:
        return self.base_name or self.config.model.base

    @property
    def public_base(self) -> str | None:
        """The base's Hub id; None for a folder, whose path means nothing elsewhere."""
        return None if Path(self.base).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.base) else self.base


@dataclass(frozen=True)
class Merging:
    """How weights are written: their type, the bytes a shard may hold, and what the adapter is added to."""

    dtype: str
    """A key of DTYPES."""
    shard_bytes: int = SHARD_BYTES
    into: MergeInto = "original"
    """`nf4`: to the 4-bit weights it was trained on, dequantised."""


def export(trained: Trained, format: Format, folder: Path, merging: Merging) -> None:
    """Write one format to a new `folder`, whole or not at all.

    Raises ModelError: the format can't hold this model; RunError: `folder` has content.
    """
    write = {"adapter": _write_adapter, "merged": _write_merged, "sentence-transformers": _write_sentence_transformers}[format]
    with new_folder(folder) as beside:
        write(trained, beside, merging)
        (beside / "README.md").write_text(model_card(trained, format, merging), encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A sibling folder to fill; renamed to `path` (files fsynced) when the block ends well, removed when it doesn't.

    Raises RunError where `path` is a file or a folder with content.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(describe(str(path), "something there already", "an export never overwrites", "Choose a new folder."))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        yield beside
        for written in beside.rglob("*"):
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def push(folder: Path, name: str) -> str:
    """Upload a written folder to the Hub repository USER/NAME, private where it is new; returns its address.

    The token comes from the environment or `hf auth login`. Raises ModelError: not logged in, refused, unreachable.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and Path(base := json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]).exists():
        rule = "nobody else has this folder, and the adapter needs its base"
        raise ModelError(describe("model.base", base, rule, "Export again with --base NAME, its name on the Hub."))
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"hybrid_scale {version('hybrid_scale')}")
    except Exception as error:  # the Hub's HTTP library, and its errors, change between releases
        said = str(error).replace(get_token() or "\0", "(token)")
        remedy = f"{folder} is written; log in with `hf auth login` or set HF_TOKEN, then upload it."
        raise ModelError(describe("--push", name, f"the Hub refused: {said}", remedy)) from None
    return f"https://huggingface.co/{name}"


# Formats


def _write_adapter(trained: Trained, folder: Path, merging: Merging) -> None:
    """PEFT's layout, and `hybrid_scale.yaml` to load it with this project."""
    if trained.config.model.lora is None:
        rule = "the run trained all weights, there is no adapter"
        raise ModelError(describe("--format", "adapter", rule, "Use merged or sentence-transformers."))
    shutil.copyfile(trained.weights / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((trained.weights / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": trained.base, "revision": trained.config.model.revision, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    _write_json(folder / "adapter_config.json", config)
    (folder / "hybrid_scale.yaml").write_text(dump_config(portable_config(trained)), encoding="utf-8")


def portable_config(trained: Trained) -> RunConfig:
    """The run's config without the paths of its machine, except that of a base which has no name on the Hub."""
    config = trained.config
    data = {"train": Path(config.data.train).name, "evaluate": tuple(Path(path).name for path in config.data.evaluate)}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"directory": f"runs/{config.run.name}"}),
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update={"base": trained.base}),
            "training": config.training.model_copy(update={"deepspeed": Path(config.training.deepspeed).name}),
        }
    )


def _write_merged(trained: Trained, folder: Path, merging: Merging) -> None:
    """Weights, config.json and a tokenizer that puts the end token itself."""
    settings = trained.config.model
    config = AutoConfig.from_pretrained(settings.base, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
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
    skeleton = _skeleton(config)
    _write_weights(merged_weights(trained, skeleton, merging.into), folder, DTYPES[merging.dtype], merging.shard_bytes)
    config.architectures = [type(skeleton).__name__]
    config.dtype = DTYPES[merging.dtype]
    config.save_pretrained(folder)
    _write_tokenizer(trained.texts, folder)


def _write_sentence_transformers(trained: Trained, folder: Path, merging: Merging) -> None:
    """A merged folder with the modules Transformer, Pooling, Normalize. Queries are cut at their own limit by `encode_query`."""
    _write_merged(trained, folder, merging)
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
    _write_json(folder / "sentence_bert_config.json", transformer)
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": True})
    _write_json(folder / "2_Normalize" / "config.json", {})
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
        ],
    )
    named = {"query": prompts["query"], "passage": prompts["passage"], "document": prompts["passage"]}
    facts = {"model_type": "SentenceTransformer", "prompts": named, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", facts)


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


def _skeleton(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModel.from_config(config)


# The tokenizer


def _write_tokenizer(texts: Texts, folder: Path) -> None:
    """Our tokenizer, which cuts, then puts begin and end token by itself. Raises ModelError where its ids differ from ours."""
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
    end = texts.tokenizer.convert_ids_to_tokens(texts.end)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",  # classes of one model family rebuild the post-processor on loading
        "model_max_length": texts.max_tokens["passage"],
        "padding_side": "right",
        "truncation_side": "right",
        "pad_token": config.get("pad_token") or end,
    }
    _write_json(path, config)
    _compare_tokens(texts, AutoTokenizer.from_pretrained(folder))


def _template(texts: Texts) -> dict[str, Any]:
    """Post-processor: begin token if used, text, end token; truncation leaves room for both."""
    begin, end = texts.tokenizer.convert_ids_to_tokens(list(texts.begin)), texts.tokenizer.convert_ids_to_tokens(texts.end)
    assert isinstance(begin, list)
    pieces = [*zip(begin, texts.begin, strict=True), (str(end), texts.end)]
    processor = TemplateProcessing(single=[*begin, "$A", str(end)], special_tokens=pieces)
    return dict(json.loads(processor.__getstate__()))


def _compare_tokens(texts: Texts, written: PreTrainedTokenizerBase) -> None:
    for role, prompt in texts.prompts.items():
        prompted = [prompt + text for text in PROBES]
        theirs = written(prompted, truncation=True, max_length=texts.max_tokens[role])["input_ids"]
        for text, mine, other in zip(PROBES, texts.encode(role, PROBES), theirs, strict=True):
            if mine != other:
                rule = f"as a {role} the written tokenizer gives {other[:8]}, ours {mine[:8]}"
                raise ModelError(describe("tokenizer", text, rule, "Use --format adapter."))


# Merging


@dataclass(frozen=True)
class _Stored:
    """One tensor of a safetensors file."""

    path: Path
    name: str

    def read(self) -> torch.Tensor:
        # Opened anew for each tensor: an open map keeps every page that was read in memory.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def merged_weights(trained: Trained, skeleton: Any, into: MergeInto = "original") -> Iterator[tuple[str, torch.Tensor]]:
    """The backbone's weights under its own names, one at a time; adapted ones in float32, W + (alpha / rank) B A.

    `skeleton`: the backbone without storage. Raises ModelError: weights of the backbone that the base lacks, adapter
    tensors that belong to none, `nf4` for a run that wasn't trained on it.
    """
    settings = trained.config.model
    if into == "nf4" and settings.quantization != "nf4":
        raise ModelError(describe("--merge-into", into, f"the run was trained with quantization: {settings.quantization}"))
    stored = _stored_weights(trained, skeleton)
    adapter = _stored_adapter(trained, skeleton) if settings.lora else {}
    quantised = _quantised_modules(skeleton) if into == "nf4" else set()

    def merge() -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in stored.items():
            weight, module = entry.read(), name.removesuffix(".weight")
            if not weight.is_floating_point():
                raise ModelError(describe(name, str(weight.dtype), "the base must hold floating-point weights"))
            if module in quantised:
                weight = _through_nf4(weight, settings)
            if module in adapter and name.endswith(".weight"):
                assert settings.lora is not None
                weight = _add_adapter(name, weight, adapter[module], settings.lora, _module(skeleton, module))
            yield name, weight

    return merge()


def _stored_weights(trained: Trained, skeleton: Any) -> dict[str, _Stored]:
    """The backbone's weights by its own names: those of the base, or the trained ones where there is no adapter."""
    known = skeleton.state_dict().keys()
    stored = {}
    for entry in _base_tensors(trained.config.model):
        name = entry.name if entry.name in known else entry.name.removeprefix(f"{skeleton.base_model_prefix}.")
        if name in known:
            stored[name] = entry
    if trained.config.model.lora is None:
        stored |= {entry.name: entry for entry in _tensors(trained.weights / "model.safetensors")}
    missing = sorted(dict(skeleton.named_parameters()).keys() - stored.keys())
    unknown = sorted(stored.keys() - known)
    if missing or unknown:
        found = f"{len(missing)} missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}"
        raise ModelError(
            describe("model.base", trained.config.model.base, f"weights don't fit {type(skeleton).__name__}: {found}")
        )
    return stored


def _base_tensors(settings: ModelSettings) -> Iterator[_Stored]:
    """Every tensor of the base's checkpoint; fetches it where it isn't on disk."""

    def find(name: str, needed: bool) -> Path | None:
        try:
            path = cached_file(settings.base, name, revision=settings.revision, _raise_exceptions_for_missing_entries=needed)
        except OSError as error:
            raise ModelError(describe("model.base", settings.base, f"its weights can't be had: {error}")) from None
        return Path(path) if path else None

    index = find("model.safetensors.index.json", needed=False)
    files = ["model.safetensors"]
    if index is not None:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in files:
        path = find(name, needed=True)
        assert path is not None
        yield from _tensors(path)


def _tensors(path: Path) -> list[_Stored]:
    with safe_open(path, framework="pt") as file:
        return [_Stored(path, name) for name in file.keys()]  # noqa: SIM118 (a handle, not a mapping)


def _stored_adapter(trained: Trained, skeleton: Any) -> dict[str, dict[str, _Stored]]:
    """Module -> its A and B. Raises ModelError listing the tensors that belong to no weight of the backbone."""
    adapter: dict[str, dict[str, _Stored]] = {}
    unmatched = []
    weights = {name.removesuffix(".weight") for name, _ in skeleton.named_parameters() if name.endswith(".weight")}
    for entry in _tensors(trained.weights / "adapter_model.safetensors"):
        found = re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])\.weight", entry.name)
        if found and found[1] in weights:
            adapter.setdefault(found[1], {})[found[2]] = entry
        else:
            unmatched.append(entry.name)
    unmatched += [f"{module}: only {'A' if 'A' in pair else 'B'}" for module, pair in adapter.items() if len(pair) < 2]
    if unmatched:
        rule = f"{len(unmatched)} tensors of the adapter belong to no weight of {type(skeleton).__name__}"
        raise ModelError(f"{trained.weights}: {rule}: {', '.join(unmatched)}.")
    return adapter


def _module(skeleton: Any, name: str) -> nn.Module:
    module: nn.Module = skeleton.get_submodule(name)
    return module


def _quantised_modules(skeleton: Any) -> set[str]:
    """The linear layers that transformers loads in 4 bits."""
    kept = set(get_keys_to_not_convert(skeleton))
    return {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in kept}


def _through_nf4(weight: torch.Tensor, settings: ModelSettings) -> torch.Tensor:
    """A weight as the 4-bit model multiplies with it: NF4 in blocks of 64, double quantisation, from `model.dtype`."""
    import bitsandbytes.functional as bnb  # seconds, and needed for this alone

    wide = weight.to(getattr(torch, settings.dtype))
    packed, state = bnb.quantize_4bit(wide, blocksize=64, compress_statistics=True, quant_type="nf4")
    return bnb.dequantize_4bit(packed, state)


def _add_adapter(
    name: str, weight: torch.Tensor, pair: dict[str, _Stored], lora: LoraSettings, module: nn.Module
) -> torch.Tensor:
    """W [out, in] + (alpha / rank) B [out, rank] A [rank, in] in float32 (2106.09685); a Conv1D holds W [in, out]."""
    delta = pair["B"].read().float() @ pair["A"].read().float()
    delta = delta.T if isinstance(module, Conv1D) else delta
    if delta.shape != weight.shape:
        raise ModelError(
            describe(name, tuple(delta.shape), f"the adapter was trained on a base with another shape than {tuple(weight.shape)}")
        )
    return delta.mul_(lora.alpha / lora.rank).add_(weight)


def _write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """safetensors files of at most `shard_bytes` (one tensor may be more), and their index where there are several."""
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    held = total = count = 0

    def flush() -> None:
        nonlocal count, held
        save_file(shard, folder / f"{count}.part", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, count))
        shard.clear()
        count, held = count + 1, 0

    for name, weight in weights:
        rounded = weight.to(dtype).contiguous()
        if shard and held + rounded.nbytes > shard_bytes:
            flush()
        shard[name] = rounded
        held, total = held + rounded.nbytes, total + rounded.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        os.replace(folder / f"{number}.part", folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[place] for name, place in places.items()}}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _update_json(path: Path, values: dict[str, Any]) -> None:
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


# The model card


def model_card(trained: Trained, format: Format, merging: Merging) -> str:
    """README.md of a written folder: YAML front matter as the Hub reads it, then what it is, how to load it, its scores."""
    front = yaml.safe_dump(_front_matter(trained, format), sort_keys=False, allow_unicode=True)
    name = trained.config.run.name
    parts = [
        f"---\n{front}---\n\n# {name}",
        _introduction(trained, format, merging),
        f"## Load\n\n{_how_to_load(trained, format)}",
        f"## Scores\n\n{_score_table(trained.scores)}" if trained.scores else "",
        f"## Settings\n\n{_table(('setting', 'value'), _settings(trained))}",
        f"Written by hybrid_scale {version('hybrid_scale')}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(trained: Trained, format: Format) -> dict[str, Any]:
    library = {"adapter": "peft", "merged": "transformers", "sentence-transformers": "sentence-transformers"}[format]
    languages = list(dict.fromkeys(found[0] for tag in trained.languages if (found := re.match(r"[a-z]{2,3}(?![a-z])", tag))))
    front: dict[str, Any] = {
        "license": trained.license,
        "language": languages,
        "library_name": library,
        "pipeline_tag": "feature-extraction",
        "base_model": trained.public_base,
        "base_model_relation": ("adapter" if format == "adapter" else "finetune") if trained.public_base else None,
        "tags": ["sentence-transformers", "feature-extraction"],
    }
    return {key: value for key, value in front.items() if value}


def _introduction(trained: Trained, format: Format, merging: Merging) -> str:
    settings = trained.config.model
    lines = [
        f"A text embedding model: {_base_text(trained)} after {trained.step} steps of contrastive training"
        f" ({'all weights' if settings.lora is None else 'LoRA'}). Vectors have length 1; similarity is their dot product."
    ]
    if trained.languages:
        lines.append(f"Languages of the training data: {', '.join(trained.languages)}.")
    if trained.fingerprint:
        lines.append(f"Fingerprint of the training data: `{trained.fingerprint}`.")
    if format != "adapter":
        lines.append(_merge_note(settings, merging))
    if format == "sentence-transformers":
        lines.append(_limit_note(trained.texts.max_tokens))
    if format != "adapter" and settings.attention == "bidirectional":
        lines.append("Attention is bidirectional: `is_causal: false` in config.json. Tested with transformers 5.23.")
    return "\n\n".join(lines)


def _base_text(trained: Trained) -> str:
    revision = trained.config.model.revision
    name = trained.public_base or Path(trained.base).name
    return f"`{name}`" + (f" (revision `{revision}`)" if revision else "")


def _merge_note(settings: ModelSettings, merging: Merging) -> str:
    if settings.lora is None:
        return f"The weights are the trained ones, in {merging.dtype}."
    note = f"The adapter is merged into the weights (added in float32, rounded to {merging.dtype} once)."
    if settings.quantization == "nf4":
        note += (
            " It was trained on 4-bit (NF4) weights and is merged into those weights, dequantised."
            if merging.into == "nf4"
            else " It was trained on 4-bit (NF4) weights and is merged into the original ones: vectors differ slightly from"
            " those of the training run."
        )
    return note


def _limit_note(limits: Mapping[Any, int]) -> str:
    note = f"Texts are cut at {limits['passage']} tokens, prompt and end token included."
    if limits["query"] == limits["passage"]:
        return note
    return (
        f"{note} Queries were cut at {limits['query']} in training: `encode_query` does so"
        ' (sentence-transformers 6 or newer), `encode(..., prompt_name="query")` doesn\'t.'
    )


def _how_to_load(trained: Trained, format: Format) -> str:
    if format == "sentence-transformers":
        code = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
queries = model.encode_query(["..."])
passages = model.encode_document(["..."])
scores = model.similarity(queries, passages)"""
    elif format == "adapter":
        code = """from pathlib import Path

from hybrid_scale.config import load_config
from hybrid_scale.data.text import load_text_encoder
from hybrid_scale.model.load import load_embedder

folder = Path("FOLDER")
config = load_config(folder / "hybrid_scale.yaml")
embedder = load_embedder(config.model, seed=0, adapter=folder).eval()
encoder = load_text_encoder(config)
vectors = embedder(**encoder.collate(encoder.encode("query", ["..."])))"""
    else:
        prompt = trained.texts.prompts["query"]
        code = f"""from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # puts the end token after the cut
model = AutoModel.from_pretrained("FOLDER").eval()
batch = tokenizer([{prompt!r} + "..."], padding=True, truncation=True, return_tensors="pt")
states = model(**batch).last_hidden_state  # then pool ({trained.config.model.pooling}) and normalise"""
    return f"```python\n{code}\n```"


def _score_table(scores: Sequence[dict[str, Any]]) -> str:
    """A row a measure, a column a set."""
    names = list(dict.fromkeys(name for score in scores for name in score["metrics"]))
    rows = []
    for name in names:
        values = [score["metrics"].get(name) for score in scores]
        rows.append((name, *("-" if value is None else f"{value:.4f}" for value in values)))
    return _table(("measure", *(str(score["task"]) for score in scores)), rows)


def _settings(trained: Trained) -> list[tuple[str, str]]:
    config = trained.config
    model, lora = config.model, config.model.lora
    shown: dict[str, object] = {
        "base": _base_text(trained).replace("`", ""),
        "pooling": model.pooling,
        "attention": model.attention,
        "query prompt": json.dumps(model.query_prompt, ensure_ascii=False),
        "passage prompt": json.dumps(model.passage_prompt, ensure_ascii=False),
        "end token": trained.texts.tokenizer.convert_ids_to_tokens(trained.texts.end),
        "longest query, passage (tokens)": f"{config.data.max_query_tokens}, {config.data.max_passage_tokens}",
        "weights in training": f"{model.dtype}, quantization: {model.quantization}",
        "LoRA": "none" if lora is None else f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {lora.targets}",
        "batches": f"{config.sampler.arm}, mono share {config.sampler.mono_share:g}, {config.sampler.composition}",
        "global batch (rows)": config.sampler.global_batch,
        "hard negatives a row": config.sampler.hard_negatives,
        "temperature": f"{config.loss.temperature:g}",
        "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}",
        "steps": f"{trained.step} of {config.training.max_steps}",
        "seed": config.run.seed,
    }
    return [(name, str(value)) for name, value in shown.items()]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
