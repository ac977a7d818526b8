"""Which bases are accepted: what can't be trained, saved or exported is refused before any weight is loaded.

Each rule is a small function over what config.json, tokenizer and the headers of the weight files say, and over the model without
storage. Used by trainings (with --dry-run as well), evaluations, exports and quantisation. Loads no weights, knows no rank.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hybrid_scale.base_files import locate
from hybrid_scale.config import ModelSettings, RunConfig
from hybrid_scale.errors import ModelError, describe
from hybrid_scale.model.adapters import add_lora, expert_modules
from hybrid_scale.model.base import check_packable, is_multimodal, raw_config, read_config, skeleton
from hybrid_scale.model.nf4 import slots_of
from hybrid_scale.model.quantize import check_written, read_manifest
from hybrid_scale.model.skeleton import make_skeleton
from hybrid_scale.model.weight_files import Checkpoint, embedding_name, text_prefix, weight_files
from hybrid_scale.planning.architecture import following_rotary, positions_of

LEFT_SHARE = 0.1
"""Of a model's matrices, embeddings left out, that `nf4` may leave as they are."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights in safetensors' headers that a model can be trained and merged with."""
ONE_WAY = {"bloom": "its attention takes no mask of single pairs", "gpt_neo": "its attention masks later tokens by itself"}
"""Model types that can't look at later tokens."""


@dataclass(frozen=True)
class Base:
    """What is known of a base before its weights are read."""

    settings: ModelSettings
    folder: Path
    config: PretrainedConfig
    """Of its text model."""
    limits: dict[str, int]
    """Setting -> longest text in tokens."""

    @cached_property
    def raw(self) -> dict[str, Any]:
        return raw_config(self.settings)

    @cached_property
    def model(self) -> Any:
        """Without storage."""
        asked = self.settings.attention_implementation
        try:
            return skeleton(self.config, self.settings.trust_remote_code, asked if asked in ("sdpa", "eager") else None)
        except (ValueError, ImportError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            remedy = "Choose a decoder that transformers knows, or another attention_implementation."
            raise ModelError(describe("model.base", self.settings.base, f"its model can't be built: {said}", remedy)) from None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The headers of its weight files; None where they aren't on this machine yet."""
        if self.folder != Path(self.settings.base) and not _fetched(self.folder):
            return None
        return Checkpoint(self.folder)

    def refuse(self, rule: str, remedy: str, where: str = "model.base", found: object = None) -> ModelError:
        return ModelError(describe(where, self.settings.base if found is None else found, rule, remedy))


def _fetched(folder: Path) -> bool:
    try:
        weight_files(folder)
    except ModelError:
        return False
    return True


def accept(config: RunConfig, weights: bool = True) -> list[str]:
    """Apply every rule to a run's base; returns the sentences that are to be said of it.

    Without `weights` nothing but config and tokenizer is fetched from the Hub. Raises ModelError: the first rule that is broken.
    """
    settings = config.model
    folder = locate(settings, weights)
    refuse_adapter(settings, folder)
    stated = {"data": config.data, "evaluation": config.evaluation}
    keys = [(section, f"max_{role}_tokens") for section in stated for role in ("query", "passage")]
    limits = {f"{section}.{key}": getattr(stated[section], key) for section, key in keys}
    given = {key: longest for key, longest in limits.items() if longest is not None}
    base = Base(settings, folder, read_config(settings), given)
    for rule in RULES:
        rule(base)
    return [sentence for note in NOTES for sentence in note(base)]


# ----------------------------------------------------------------------------------------------------------------- rules


def refuse_adapter(settings: ModelSettings, folder: Path) -> None:
    """A folder of PEFT's: transformers would load another model than this one, and put the adapter into it."""
    path = folder / "adapter_config.json"
    if path.is_file():
        under = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        rule = f"it is an adapter of {under}, and a base must be a whole model"
        raise ModelError(describe("model.base", settings.base, rule, "Merge it first, or name the model it belongs to."))


def refuse_other_quantisation(base: Base) -> None:
    """Weights that someone else quantised: transformers takes them as they are, whatever `model.quantization` says."""
    if read_manifest(base.folder) is not None:
        check_written(base.settings)
        return
    found = _quantisation(base.raw)
    if found is None:
        return
    method, name = str(found.get("quant_method", "unknown")), base.settings.quantization
    nf4 = method == "bitsandbytes" and found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4"
    kind = f"bitsandbytes, {'4 bits (' + str(found.get('bnb_4bit_quant_type')) + ')' if found.get('load_in_4bit') else '8 bits'}"
    kind = kind if method == "bitsandbytes" else method
    if not nf4 or name != "nf4":
        remedy = "Name the model that it was made from." + (" Or set model.quantization: nf4." if nf4 else "")
        raise base.refuse(f"its weights are quantised already ({kind}), and model.quantization is {name}", remedy)
    compute = str(found.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    if compute != base.settings.dtype:
        rule = f"its 4-bit weights were written to multiply in {compute}, and model.dtype is {base.settings.dtype}"
        raise base.refuse(rule, f"Set model.dtype: {compute}, or name the model that it was made from.")


def _quantisation(raw: dict[str, Any]) -> dict[str, Any] | None:
    places = (raw, raw.get("text_config") or {})
    found = [place.get(key) for place in places for key in ("quantization_config", "compression_config")]
    return next((one for one in found if one), None)


def refuse_no_decoder(base: Base) -> None:
    """Encoders, which look at later tokens under `attention: causal`, and models of two parts."""
    kind = base.config.model_type
    if base.config.is_encoder_decoder:
        raise base.refuse(f"'{kind}' has an encoder and a decoder, and a base must be a decoder", "Choose a decoder.")
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(base.config, "is_decoder", False)
    if encoder and base.settings.attention == "causal":
        rule = f"'{kind}' is an encoder, whose tokens look at later ones whatever model.attention says"
        raise base.refuse(rule, "Set model.attention: bidirectional and a mean pooling, or choose a decoder.")


def refuse_no_bidirectional(base: Base) -> None:
    """Architectures that go on masking later tokens, or can't be told which pairs to mask."""
    if base.settings.attention == "causal":
        return
    kind, layers = base.config.model_type, set(getattr(base.config, "layer_types", None) or ())
    reason = ONE_WAY.get(kind)
    if kind == "falcon" and getattr(base.config, "alibi", False):
        reason = ONE_WAY["bloom"]
    if getattr(type(base.model), "_is_stateful", False) or any("attention" not in layer or "linear" in layer for layer in layers):
        reason = "some of its layers carry a state from token to token"
    if reason:
        rule = f"'{kind}' can't attend to later tokens: {reason}"
        raise base.refuse(rule, "Set model.attention: causal.", "model.attention", "bidirectional")


def refuse_unpackable(base: Base) -> None:
    """Texts end to end would reach each other."""
    if base.settings.packed:
        check_packable(base.config, base.settings)


def refuse_too_long(base: Base) -> None:
    """Texts longer than the positions that a model was made for."""
    most = positions_of(base.config.to_dict())
    for key, longest in base.limits.items():
        if most is not None and longest > most:
            rule = f"{base.settings.base} was made for {most} positions (max_position_embeddings), and a text must not be longer"
            raise base.refuse(rule, f"Set it to at most {most}.", key, longest)


def refuse_following_rotary(base: Base) -> None:
    """Rotary factors that follow the longest text of a forward pass: how texts are spread over micro-batches would matter."""
    found = following_rotary(base.config.to_dict())
    if found is None:
        return
    kind, most = found
    for key, longest in base.limits.items():
        if longest > most:
            rule = (
                f"{base.settings.base} has '{kind}' rotary factors, which change for a whole micro-batch when one text is"
                f" longer than {most} tokens: results would depend on how texts are spread over micro-batches"
            )
            raise base.refuse(rule, f"Set it to at most {most}.", key, longest)


def refuse_left_in_full(base: Base) -> None:
    """`nf4` for a model whose weights bitsandbytes mostly leaves as they are (experts, linear layers of another class)."""
    if base.settings.quantization != "nf4" or _quantisation(base.raw) is not None:
        return
    left, held = unquantised(base.config, base.settings)
    if sum(left.values()) <= LEFT_SHARE * (held + sum(left.values())):
        return
    total = sum(parameter.numel() for parameter in base.model.parameters())
    name, most = max(left.items(), key=lambda item: item[1])
    rule = (
        f"{held:,} of {total:,} parameters would be held in 4 bits: bitsandbytes takes torch's linear layers alone, and leaves"
        f" {sum(left.values()):,} (as {name}, {most:,})"
    )
    raise base.refuse(rule, "Set quantization: none, or choose a dense model.", "model.quantization", "nf4")


def unquantised(config: PretrainedConfig, settings: ModelSettings) -> tuple[dict[str, int], int]:
    """Elements of matrices that aren't held in 4 bits, embeddings left out, by name; elements that are."""
    model = make_skeleton(config, torch.float32, "eager", True, settings.trust_remote_code)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    slots = list(slots_of(model))
    left = {slot.name: slot.weights for slot in slots if not slot.four_bit and len(slot.shape) > 1 and slot.name not in tables}
    return left, sum(slot.weights for slot in slots if slot.four_bit)


def refuse_adapters(base: Base) -> None:
    """LoRA targets that match nothing, other layers, or experts; made on the model without storage, as they will be with it."""
    if base.settings.lora is not None:
        add_lora(skeleton(base.config, base.settings.trust_remote_code), base.settings.lora, seed=0)


def refuse_weights(base: Base) -> None:
    """Weight files that aren't whole, are there twice, or hold other types than floating-point numbers."""
    checkpoint = base.checkpoint
    if checkpoint is None:
        return
    checkpoint.close()
    if _quantisation(base.raw) is not None:
        return
    prefix, known = text_prefix(base.model, checkpoint.where), dict(base.model.named_parameters())
    for name, kind in checkpoint.types.items():
        used = name in known or name.removeprefix(prefix) in known or (name.startswith(prefix) and name.endswith(".weight"))
        if used and kind not in FLOATS:
            rule = f"{name} is stored as {kind}, and weights must be floating-point numbers ({', '.join(FLOATS)})"
            raise base.refuse(rule, "Name the model that it was made from.")
    refuse_embedding_of_other_size(base, checkpoint, prefix)


def refuse_embedding_of_other_size(base: Base, checkpoint: Checkpoint, prefix: str) -> None:
    """An embedding table with other rows than config.json says: tokens would be read from nowhere."""
    name = embedding_name(base.model)
    stored = checkpoint.shapes.get(f"{prefix}{name}", checkpoint.shapes.get(str(name)))
    rows = base.model.get_input_embeddings().weight.shape[0]
    if stored is not None and stored[0] != rows:
        rule = f"its embedding has {stored[0]:,} rows, and its config.json says {rows:,} (vocab_size)"
        raise base.refuse(rule, "Copy the model again, or write it anew with both sizes equal.")


def refuse_unmergeable(base: Base) -> None:
    """Adapters on weights that lie in the files in another form: trained, they couldn't be exported."""
    if base.settings.lora is None or base.checkpoint is None or _quantisation(base.raw) is not None:
        return
    model = add_lora(skeleton(base.config, base.settings.trust_remote_code), base.settings.lora, seed=0)
    prefix, names = text_prefix(base.model, base.checkpoint.where), base.checkpoint.where
    for adapted in (name.rpartition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name):
        weight = adapted.removeprefix("base_model.model.") + ".weight"
        if weight not in names and f"{prefix}{weight}" not in names:
            rule = f"{weight} lies in its files in another form, so that an adapter on it couldn't be merged when it is exported"
            raise base.refuse(rule, "Name other layers in model.lora.targets.")


RULES: tuple[Callable[[Base], None], ...] = (
    refuse_other_quantisation,
    refuse_no_decoder,
    refuse_no_bidirectional,
    refuse_unpackable,
    refuse_too_long,
    refuse_following_rotary,
    refuse_left_in_full,
    refuse_adapters,
    refuse_weights,
    refuse_unmergeable,
)
"""In the order in which they are applied."""


# ----------------------------------------------------------------------------------------------------------------- notes


def note_absent_weights(base: Base) -> Iterator[str]:
    if base.checkpoint is None:
        yield f"{base.settings.base}: its weights aren't on this machine yet, so that their files weren't looked at."


def note_text_model(base: Base) -> Iterator[str]:
    if is_multimodal(base.settings):
        yield (
            f"{base.settings.base}: of this '{base.raw.get('model_type')}' its text model alone ({type(base.model).__name__})"
            " is loaded, trained and exported."
        )


def note_experts(base: Base) -> Iterator[str]:
    if base.settings.lora is not None and expert_modules(base.model):
        yield f"{base.settings.base}: its experts stay as they are; adapters are trained on {base.settings.lora.targets} alone."


def note_merged_export(base: Base) -> Iterator[str]:
    """Formats of launch/export.py that won't take the run."""
    reason = None
    if _quantisation(base.raw) is not None:
        reason = "its weights are quantised, and an adapter is merged into whole ones"
    elif base.raw.get("auto_map"):
        reason = "the model needs code of its own"
    if reason:
        yield f"{base.settings.base}: the run can be exported with --format adapter alone: {reason}."


def note_sentence_transformers(base: Base) -> Iterator[str]:
    """What of a sentence-transformers model is taken over, and what isn't."""
    path = base.folder / "modules.json"
    if not path.is_file():
        return
    settings, taken = base.settings, "its Transformer's weights are taken over"
    told, other = [], []
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind, place = str(module.get("type", "")).rpartition(".")[2], base.folder / str(module.get("path", ""))
        if kind == "Pooling":
            told.append(f"its pooling ({_pooling(place)}; model.pooling is {settings.pooling})")
        elif kind not in ("Transformer", "Normalize"):
            other.append(f"its module {kind} ({place.name})")
    prompts = _json(base.folder / "config_sentence_transformers.json").get("prompts") or {}
    used = f"model.query_prompt is {settings.query_prompt!r}, model.passage_prompt {settings.passage_prompt!r}"
    told += [f"its prompts ({json.dumps(prompts, ensure_ascii=False)}; {used})"] if any(prompts.values()) else []
    length = _json(base.folder / "sentence_bert_config.json").get("max_seq_length")
    told += [f"its longest text ({length} tokens; here {max(base.limits.values())})"] if length else []
    not_taken = ", ".join([*told, *other])
    yield f"{settings.base} is a sentence-transformers model: {taken}; not taken over: {not_taken or 'nothing'}."


def _pooling(place: Path) -> str:
    """The poolings that a module's config.json switches on."""
    config = _json(place / "config.json")
    found = [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value is True
    ]
    return str(config.get("pooling_mode") or " + ".join(found) or "unknown")


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


NOTES: tuple[Callable[[Base], Iterator[str]], ...] = (
    note_absent_weights,
    note_text_model,
    note_experts,
    note_merged_export,
    note_sentence_transformers,
)
