"""What a base says of itself before any weight is read: its config.json, the config of its text model, a model without storage.

A base for pictures and texts is its text model here: nothing else of it is loaded, trained or exported.
"""

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from hybrid_scale.base_files import code_revision, locate
from hybrid_scale.config import ModelSettings
from hybrid_scale.errors import ModelError, describe

OTHER_CODE = "--"
"""Parts a repository from a class in config.json's `auto_map`."""


def raw_config(settings: ModelSettings) -> dict[str, Any]:
    """The content of config.json as it is written. Raises ModelError: there is none, or it isn't JSON."""
    folder = locate(settings, weights=False)
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(
            other.parent.name for other in folder.glob("*/config.json") if (other.parent / "tokenizer.json").is_file()
        )
        remedy = f"Name {folder / inside[0]}, which holds a model." if inside else "Name the folder of the model itself."
        raise ModelError(describe("model.base", settings.base, "its config.json can't be read: there is none", remedy))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(describe("model.base", settings.base, f"its config.json can't be read: {error}")) from None
    if not isinstance(content, dict):
        raise ModelError(describe(str(path), content, "a config.json must be a mapping", "Copy or download it again."))
    return content


def read_config(settings: ModelSettings) -> PretrainedConfig:
    """The text model's config as transformers reads it. Raises ModelError: not readable, or of a type that it doesn't know."""
    raw_config(settings)
    _check_code(settings)
    try:
        whole = AutoConfig.from_pretrained(
            locate(settings, weights=False),
            trust_remote_code=settings.trust_remote_code,
            code_revision=code_revision(settings),
        )
        text: PretrainedConfig = whole.get_text_config()  # ValueError: it has several
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())
        raise ModelError(describe("model.base", settings.base, f"its config.json can't be read: {said}")) from None
    if text is not whole:
        text.name_or_path = settings.base
        found = getattr(whole, "quantization_config", None)
        if found is not None and not hasattr(text, "quantization_config"):
            text.quantization_config = found
    return text


def _check_code(settings: ModelSettings) -> None:
    """Raises ModelError where the code that would run lies where no commit of the base pins it."""
    if not settings.trust_remote_code:
        return
    for name in raw_config(settings).get("auto_map", {}).values():
        repository, parts, _ = str(name).partition(OTHER_CODE)
        if parts and repository != settings.base:
            rule = f"its code lies in another repository ({repository}), which model.revision doesn't pin"
            remedy = "Copy that code into a folder with the model, and name it in auto_map without the repository."
            raise ModelError(describe("model.base", settings.base, rule, remedy))


def is_multimodal(settings: ModelSettings) -> bool:
    """Whether the base holds more than its text model."""
    return "text_config" in raw_config(settings)


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False, attention: str | None = None) -> Any:
    """The model without storage (the `meta` device): 1.5 s for 80 layers."""
    options = {"attn_implementation": attention} if attention else {}
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=trust_remote_code, **options)


def check_packable(config: PretrainedConfig, settings: ModelSettings) -> None:
    """Raises ModelError where texts end to end would reach each other."""
    architecture = type(skeleton(config, settings.trust_remote_code))
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not getattr(architecture, "_supports_attention_backend", False):
        fault = "doesn't go through transformers' attention interface"
    elif getattr(architecture, "_is_stateful", False):
        fault = "carries a state from token to token, across texts"
    elif layers:
        fault = f"has layers that mix neighbouring tokens in other ways ({', '.join(sorted(layers))})"
    else:
        return
    rule = f"it puts texts end to end, and {architecture.__name__} {fault}"
    remedy = f"Use {'sdpa' if getattr(architecture, '_supports_sdpa', False) else 'eager'}."
    raise ModelError(describe("model.attention_implementation", settings.attention_implementation, rule, remedy))
