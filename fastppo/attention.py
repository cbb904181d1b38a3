"""Attention of our own inside a Hugging Face model: which models let us choose it, and the one over packed sequences.

`cache.py` has the other one, which decodes on a cache of slots.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import ops
from .packing import Packing, pack

# No mask is registered under this name: transformers then makes none, and the packing says what a token sees.
_PACKED = "fastppo_packed"
# What transformers hands to an attention and says nothing of which token sees which.
_KNOWN_ARGUMENTS = {
    *("scaling", "dropout", "sliding_window", "is_causal", "position_ids", "use_cache", "cache", "past_key_values"),
}  # fmt: skip


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """Within the block the models of this configuration use the attention registered under `name`."""
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def windows(config: Any) -> list[int | None]:
    """How many tokens a query of each layer sees, itself included; None: all."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def unknown_arguments(kwargs: dict[str, Any]) -> list[str]:
    """Arguments of an attention that ask for something that ours does not do."""
    return [
        name
        for name, x in kwargs.items()
        if x is not None and x is not False and name not in _KNOWN_ARGUMENTS
    ]


def what_config_rules_out(model: nn.Module, config: Any) -> str | None:
    """Why this model's attention cannot be ours, as far as its class and (text) configuration tell; None: they do not.

    Ours is causal, each layer over all tokens or a sliding window, with softmax weights from scaled scores.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return f"{name} is no transformers.PreTrainedModel"
    if not model._supports_attention_backend:
        return f"{name} does not let its attention be chosen (no support for transformers.AttentionInterface)"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return f"{name} has cross-attention"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores (attn_logit_softcapping)"
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} attends in both directions"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"{name} attends in chunks"
    for layer in DynamicCache(config=config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"{name} keeps more than keys and values of attention ({type(layer).__name__})"
    for module_name, module in model.named_modules():
        if getattr(module, "sinks", None) is not None:
            return f"{name} has attention sinks ({module_name}.sinks)"
    return None


# --- packed sequences ------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    packing: Packing
    windows: list[int | None]


_active: list[_Call] = []  # of the innermost `packed_attention`


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: query (1, heads, N, width) → (1, N, heads, width)."""
    packing, window_of = _active[-1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if packing.key_rows is not None:
        k, v = (x.index_select(0, packing.key_rows) for x in (k, v))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = window_of[module.layer_idx]  # type: ignore[index]
    # FlashAttention has no kernels for the CPU, and we have none for where it has.
    varlen = _on_cpu if q.device.type == "cpu" else _on_gpu
    return varlen(q, k.to(q.dtype), v.to(q.dtype), packing, scale, window)[None], None


AttentionInterface.register(_PACKED, _attention)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    return ops.varlen_attention(
        q, k, v, packing.cu_seqlens_q, packing.cu_seqlens_k, scale=scale, window=window
    )


@functools.cache
def _varlen_attn_takes(argument: str) -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return argument in inspect.signature(varlen_attn).parameters


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True}
    if not _varlen_attn_takes("enable_gqa"):  # before torch 2.12: a key head per query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = {}
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        packing.cu_seqlens_q.int(),
        packing.cu_seqlens_k.int(),
        packing.longest_q,
        packing.longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),  # causal: nothing to the right
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out


@contextmanager
def packed_attention(trunk: nn.Module, packing: Packing | None) -> Iterator[None]:
    """Within the block the trunk attends as `packing` says (None: as it always does).

    Forward passes run in it, and backward passes that compute activations again.
    """
    if packing is None:
        yield
        return
    config: Any = trunk.config
    _active.append(_Call(packing, windows(config)))
    try:
        with implementation(config, _PACKED):
            yield
    finally:
        _active.pop()


_reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_not_packed(trunk: nn.Module) -> str | None:
    """Why this trunk cannot run over packed sequences, or None where it can.

    What its configuration and signature do not rule out is tried once, on two short sequences, against the trunk's own
    attention; the answer is kept.
    """
    if trunk not in _reasons:
        _reasons[trunk] = (
            what_config_rules_out(trunk, trunk.config)
            or _what_its_device_rules_out(trunk)
            or _what_a_trial_shows(trunk)
        )
    return _reasons[trunk]


def _what_its_device_rules_out(trunk: nn.Module) -> str | None:
    parameter = next(trunk.parameters())
    if parameter.device.type == "cpu":
        return None
    if parameter.dtype is torch.float32:
        return "FlashAttention takes bfloat16 and float16, and the weights are float32"
    try:
        known = _varlen_attn_takes("window_size") and _varlen_attn_takes("scale")
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if not known:
        return f"torch {torch.__version__} has no varlen_attn with windows"
    return None


@torch.no_grad()
def _what_a_trial_shows(trunk: nn.Module) -> str | None:
    """Two sequences with a common beginning, against each on its own."""
    name, config = type(trunk).__name__, trunk.config
    device = next(trunk.parameters()).device
    size = int(config.vocab_size)  # type: ignore[arg-type, union-attr]
    # Tokens from all over the vocabulary: neighbours may be unused, with one and the same embedding.
    ids = [(17 + 7919 * i) % size for i in range(14)]
    sequences = [ids, [*ids[:10], *reversed(ids)][:13]]
    packing = pack(sequences).to(device)
    seen: list[str] = []
    layers: set[Any] = set()

    def watched(module: nn.Module, *tensors: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        window = _active[-1].windows[module.layer_idx]  # type: ignore[index]
        if kwargs.get("sliding_window") not in (None, window):
            seen.append(
                f"layer {module.layer_idx} asks for a window of {kwargs['sliding_window']}, not {window}"
            )
        seen.extend(f"its attention asks for {argument}" for argument in unknown_arguments(kwargs))
        layers.add(module.layer_idx)
        return _attention(module, *tensors, **kwargs)

    expected = [
        trunk(input_ids=torch.tensor([ids], device=device), use_cache=False).last_hidden_state[0].float()
        for ids in sequences
    ]
    AttentionInterface.register(f"{_PACKED}_trial", watched)
    with packed_attention(trunk, packing), implementation(config, f"{_PACKED}_trial"):
        try:
            states = trunk(
                input_ids=packing.input_ids, position_ids=packing.position_ids, use_cache=False
            ).last_hidden_state[0]
        except TypeError as error:  # no position_ids
            return f"{name}: {error}"
    if seen:
        return f"{name}: {seen[0]}"
    if len(layers) != len(windows(config)):
        return f"{name} sent {len(layers)} of {len(windows(config))} layers through its chosen attention"
    for places, own in zip(packing.places, expected, strict=True):
        change, norm = float((states[places].float() - own).norm()), float(own.norm())
        # A wrong attention is off by as much as states differ; bfloat16 by a hundredth of their norm.
        if not change <= 0.1 * norm:
            return f"{name}'s hidden states change by {change:.3g} of {norm:.3g} when packed"
    return None
