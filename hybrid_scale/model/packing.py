"""Texts end to end without padding: their layout, and an attention function that keeps them apart. Knows no pooling and no loss.

Importing this file registers the attention function as `hybrid_scale_packed` in transformers. No mask function goes with it:
transformers then builds no mask at all, where a registered one would first look for text borders in the position ids, which
waits for the GPU in every forward.

B texts, T tokens of all of them, H heads, D size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from hybrid_scale.errors import ModelError, describe

NAME = "hybrid_scale_packed"
WASTE = {"cpu": 0.0, "gpu": 0.25}
"""Largest padding of a group of texts over its real tokens, by device. CPU, measured forward and backward on 512 to 4,096 tokens:
groups of one length cost 0.95 to 1.24 times one call a text, padding up to .1 and copying 1.17 to 1.37 times. GPU, not measured:
there a call is thought to cost more than the padding."""
HARMLESS = ("position_ids", "position_embeddings", "cache_position", "use_cache", "return_dict")
"""What layers may hand to their attention function besides the arguments of `packed_attention`, without effect on it."""


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring texts that one attention call takes as [texts, width]; R real tokens."""

    texts: int
    width: int
    """Length of the longest."""
    tokens: int
    """R."""
    gather: torch.Tensor | None
    """int64 [texts * width]: which of the R tokens stands at each place; any one in padding. None where there is none."""
    scatter: torch.Tensor | None
    """int64 [R]: the place of each token."""
    real: torch.Tensor | None
    """bool [texts, 1, 1, width]: not padding."""


@dataclass(frozen=True, eq=False)
class Segments:
    """What the attention function needs to know of the texts; the same object for every layer of a forward."""

    groups: tuple[Group, ...]
    causal: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """Texts in the order of attention, longest first, and the way back. Tensors on the device of the tokens."""

    lengths: torch.Tensor
    """int64 [B]."""
    positions: torch.Tensor
    """int64 [1, T], from 0 in each text."""
    tokens: torch.Tensor | None
    """int64 [T]: number of each token in the order given. None: the texts came longest first."""
    texts: torch.Tensor | None
    """int64 [B]: where each text given now stands."""
    segments: Segments


def make_layout(lengths: torch.Tensor, causal: bool, device: torch.device) -> Layout:
    """Lengths int64 [B] >= 1, on the CPU. Waits for no GPU: all numbers travel in one copy."""
    given = lengths.numpy()
    order = np.argsort(-given, kind="stable")
    ordered = given[order]
    cuts = _cut(ordered.tolist(), WASTE["cpu" if device.type == "cpu" else "gpu"])
    arrays = [ordered, _positions(ordered)]
    arrays += _way_back(given, order) if np.any(order[:-1] > order[1:]) else [np.zeros(0, np.int64)] * 2
    for first, end in cuts:
        arrays += _places(ordered[first:end])
    sent, positions, tokens, texts, *places = _send(arrays, device)
    groups = [_group(ordered[first:end], *places[3 * number : 3 * number + 3]) for number, (first, end) in enumerate(cuts)]
    return Layout(
        lengths=sent,
        positions=positions.unsqueeze(0),
        tokens=tokens if len(tokens) else None,
        texts=texts if len(texts) else None,
        segments=Segments(tuple(groups), causal),
    )


def flash_arguments(layout: Layout) -> dict[str, Any]:
    """The same for transformers' `flash_attention_2`: borders int32 [B + 1], the longest text, causal or not."""
    borders = nn.functional.pad(layout.lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = layout.segments.groups[0].width
    given = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return given if layout.segments.causal else {**given, "is_causal": False}


def _cut(lengths: Sequence[int], waste: float) -> list[tuple[int, int]]:
    """Texts of falling length -> [first, end) of each group: as many texts as `waste` allows."""
    cuts, first, real = [], 0, 0
    for number, length in enumerate(lengths):
        if lengths[first] * (number - first + 1) > (1 + waste) * (real + length):
            cuts.append((first, number))
            first, real = number, 0
        real += length
    return [*cuts, (first, len(lengths))]


def _positions(lengths: np.ndarray) -> np.ndarray:
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _way_back(given: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
    """Token numbers in the new order, and the new place of each text."""
    starts = (np.cumsum(given) - given)[order]
    return [np.repeat(starts, given[order]) + _positions(given[order]), np.argsort(order)]


def _places(lengths: np.ndarray) -> list[np.ndarray]:
    """`gather`, `scatter` and `real` of a group, empty where all its texts are of one length."""
    if lengths[0] == lengths[-1]:
        return [np.zeros(0, np.int64)] * 3
    real = np.arange(lengths[0]) < lengths[:, None]
    scatter = np.flatnonzero(real)
    gather = np.zeros(real.size, np.int64)
    gather[scatter] = np.arange(len(scatter))
    return [gather, scatter, real.ravel().astype(np.int64)]


def _send(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    whole = torch.from_numpy(np.concatenate(arrays))
    if device.type != "cpu":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return list(whole.split([len(array) for array in arrays]))


def _group(lengths: np.ndarray, gather: torch.Tensor, scatter: torch.Tensor, real: torch.Tensor) -> Group:
    texts, width, tokens = len(lengths), int(lengths[0]), int(lengths.sum())
    if not len(gather):
        return Group(texts, width, tokens, None, None, None)
    return Group(texts, width, tokens, gather, scatter, real.bool().view(texts, 1, 1, width))


class _Spread(torch.autograd.Function):
    """Tokens [R, H, D] -> places [texts * width, H, D]. Padding repeats a token and gives no gradient.

    Both directions copy whole rows; the backward of torch's own indexing would add them up one by one.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        return tokens.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(torch.autograd.Function):
    """Places [texts * width, H, D] -> tokens [R, H, D]: the way back of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scatter)
        ctx.count = len(places)
        return places.index_select(0, scatter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradient.new_zeros((ctx.count, *gradient.shape[1:]))
        return whole.index_copy_(0, ctx.saved_tensors[0], gradient), None


@dataclass(frozen=True)
class _Rule:
    """How a layer attends."""

    causal: bool
    window: int | None
    """Keys further away than this - 1 are hidden."""
    softcap: float | None
    """s -> softcap * tanh(s / softcap) on the scores (Gemma 2)."""
    scaling: float | None
    dropout: float


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, fewer, T, D] -> ([1, T, H, D], None).

    Raises ModelError: the batch is padded, or the layer asks for something that this function doesn't do.
    """
    if segments is None or attention_mask is not None:
        fault = "texts must come end to end, with `lengths` and without a mask, through every layer"
        raise ModelError(describe("model.attention_implementation", "packed", fault, "Use sdpa for this model."))
    _refuse_unknown(others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rule = _Rule(
        causal=segments.causal and causal,
        window=sliding_window if segments.causal else None,  # bidirectional sees the whole text, as with a padded batch
        softcap=softcap,
        scaling=scaling,
        dropout=dropout,
    )
    sizes = [group.tokens for group in segments.groups]
    parts = [tensor.squeeze(0).transpose(0, 1).split(sizes) for tensor in (query, key, value)]
    attended = [_attend_group(group, rule, *mine) for group, *mine in zip(segments.groups, *parts, strict=True)]
    return torch.cat(attended).unsqueeze(0), None


def _refuse_unknown(others: dict[str, Any]) -> None:
    unknown = [name for name, given in others.items() if given is not None and given is not False and name not in HARMLESS]
    unknown = [name for name in unknown if not name.startswith("output_")]
    if unknown:
        rule = f"the model's attention layers use {', '.join(unknown)}, which it doesn't know"
        raise ModelError(describe("model.attention_implementation", "packed", rule, "Use eager or sdpa for this model."))


def _attend_group(group: Group, rule: _Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[R, H, D], [R, fewer, D] twice -> [R, H, D]."""
    tensors = [query, key, value]
    if group.gather is not None:
        tensors = [_Spread.apply(tensor, group.gather, group.scatter) for tensor in tensors]
    query, key, value = (tensor.view(group.texts, group.width, *tensor.shape[1:]).transpose(1, 2) for tensor in tensors)
    attended = (_attend if rule.softcap is None else _attend_softcapped)(group, rule, query, key, value)
    places = attended.transpose(1, 2).flatten(0, 1)
    return places if group.scatter is None else _Collect.apply(places, group.scatter)


def _attend(group: Group, rule: _Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's attention on [texts, H, width, D]. Padding on the right is behind every token: causal needs no mask for it."""
    mask = None if rule.causal and not _is_narrow(group, rule) else _visible(group, rule, query.device)
    shared = key.shape[1] < query.shape[1]
    if shared and mask is not None:  # torch's fused kernels take fewer keys than queries only without a mask
        key, value = (_repeat(tensor, query.shape[1]) for tensor in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=rule.causal and mask is None,
        scale=rule.scaling,
        enable_gqa=shared and mask is None,
    )


def _attend_softcapped(group: Group, rule: _Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same written out: torch's attention has no soft cap."""
    assert rule.softcap is not None
    key, value = (_repeat(tensor, query.shape[1]) for tensor in (key, value))
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scaling / rule.softcap)) * rule.softcap
    mask = _visible(group, rule, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, rule.dropout) @ value


def _is_narrow(group: Group, rule: _Rule) -> bool:
    """Whether the window hides anything in this group."""
    return rule.window is not None and group.width > rule.window


def _visible(group: Group, rule: _Rule, device: torch.device) -> torch.Tensor | None:
    """bool [texts or 1, 1, width or 1, width]: key may be seen by query; None: all may."""
    if not rule.causal and not _is_narrow(group, rule):
        return group.real
    places = torch.arange(group.width, device=device)
    behind = places[:, None] - places
    visible = behind >= 0 if rule.causal else torch.ones_like(behind, dtype=torch.bool)
    if rule.window is not None and _is_narrow(group, rule):
        visible = visible & (behind.abs() < rule.window)
    visible = visible[None, None]
    return visible if rule.causal or group.real is None else visible & group.real


def _repeat(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[texts, fewer, width, D] -> [texts, heads, width, D], each key for the neighbouring queries that share it."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


AttentionInterface.register(NAME, packed_attention)
