"""The rollout's key-value cache: one slot per row, written in place, and the attention that decodes on it.

A slot holds one sequence from its first place on, whatever its neighbours hold, so rows of different lengths stand in
one batch without padding, leave it and join it, and nothing cached ever moves. `DynamicCache` in its place
concatenates every layer's keys and values anew for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from . import ops
from .attention import implementation, unknown_arguments, what_config_rules_out, windows
from .models import accepts, text_config, unwrap_peft

# No mask is registered under this name: transformers then makes none, and lengths say what a row sees.
_IMPLEMENTATION = "fastppo_decode"
# Capacity grows by at least this share: copying then costs less than twice the final size, however long responses get.
_GROWTH = 1.5


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values: each (slots, key heads, capacity, width), made when the first ones come.

    Args:
        slots: how many sequences.
        capacity: tokens per sequence.
        window: how many tokens a query sees, itself included; None: all. Older ones stay where they are.
    """

    def __init__(self, slots: int, capacity: int, window: int | None) -> None:
        super().__init__()
        self.slots, self.capacity, self.window = slots, capacity, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for states of this shape and dtype."""
        _, heads, _, width = key_states.shape
        shape = (self.slots, heads, self.capacity, width)
        self.keys, self.values = (
            torch.empty(shape, dtype=value_states.dtype, device=value_states.device) for _ in range(2)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new token's states as they are: `ops.decode_attention` writes them while it reads the others."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def store(self, key_states: Tensor, value_states: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Copy states of (b, key heads, n, width), row `rows[i]` into slot `slots[i]`, from its first place on."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        for cache, states in ((self.keys, key_states), (self.values, value_states)):
            cache[:, :, : states.shape[2]].index_copy_(0, slots, states[rows].to(cache.dtype))

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per slot, keeping what there is."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = (
                torch.cat([x, x.new_empty((*x.shape[:2], capacity - self.capacity, x.shape[3]))], dim=2)
                for x in (self.keys, self.values)
            )
        self.capacity = capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that a mask would need: the whole slot."""
        return self.capacity, 0

    def get_seq_length(self) -> int:
        """The capacity: rows differ in length, see `SlotCache.lengths`."""
        return self.capacity

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity


class SlotCache(Cache):
    """A `transformers.Cache` for one token per row and step, to be used inside :func:`decoding` alone.

    Before each forward pass, `slots` (B,) int64 says where the batch's rows are, and `lengths` (B,) int64 how many
    tokens each has so far.

    Args:
        slots: how many sequences, at most.
        capacity: tokens per sequence; see `reserve`.
        windows: of each layer; None: full attention.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, capacity: int, windows: list[int | None]) -> None:
        super().__init__(layers=[SlotLayer(slots, capacity, window) for window in windows])
        self.capacity = capacity
        self.slots: Tensor | None = None
        self.lengths: Tensor | None = None

    def reserve(self, capacity: int, limit: int) -> bool:
        """Make room for `capacity` tokens per slot, in steps, never more than `limit`. Did it move for that?"""
        if capacity <= self.capacity:
            return False
        self.capacity = max(capacity, min(limit, int(_GROWTH * self.capacity)))
        for layer in self.layers:
            layer.reserve(self.capacity)
        return True

    def store(self, prefilled: Cache, slots: Tensor, rows: Tensor) -> None:
        """Copy a prefilled `DynamicCache` into slots: its row `rows[i]` becomes the start of slot `slots[i]`."""
        for layer, states in zip(self.layers, prefilled.layers, strict=True):
            layer.store(states.keys, states.values, slots, rows)  # type: ignore[arg-type, union-attr]


_active: list[SlotCache] = []  # the cache of the innermost `decoding`


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: query (B, heads, 1, width) → (B, 1, heads, width)."""
    cache = _active[-1]
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    dtype = layer.values.dtype  # type: ignore[union-attr]
    out = ops.decode_attention(
        query[:, :, 0].to(dtype),
        key[:, :, 0].to(dtype),
        value[:, :, 0].to(dtype),
        layer.keys,  # type: ignore[arg-type]
        layer.values,  # type: ignore[arg-type]
        cache.slots,  # type: ignore[arg-type]
        cache.lengths,  # type: ignore[arg-type]
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=layer.window,
    )
    return out[:, None].to(query.dtype), None


AttentionInterface.register(_IMPLEMENTATION, _attention)


@contextmanager
def decoding(policy: nn.Module, cache: SlotCache) -> Iterator[None]:
    """Inside, the policy's attention is `ops.decode_attention` on `cache`; then its own again, after an error too."""
    _active.append(cache)
    try:
        with implementation(text_config(policy), _IMPLEMENTATION):
            yield
    finally:
        _active.pop()


def cache_argument(policy: nn.Module) -> str:
    """What this version of transformers calls the cache in a model's forward."""
    return "cache" if accepts(policy, "cache") else "past_key_values"


_reasons: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_no_slots(policy: nn.Module) -> str | None:
    """Why this policy cannot decode on a `SlotCache`, or None where it can.

    What its configuration and signature do not rule out is tried once, on four tokens, against the model's own
    attention; the answer is kept.
    """
    if policy not in _reasons:
        _reasons[policy] = _what_its_config_rules_out(policy) or _what_a_trial_shows(policy)
    return _reasons[policy]


def _what_its_config_rules_out(policy: nn.Module) -> str | None:
    model = unwrap_peft(policy)
    name = type(model).__name__
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(policy, "peft_config", {}).values()):
        return f"PEFT puts virtual tokens before the prompt of {name}"
    reason = what_config_rules_out(model, text_config(policy))
    if reason is None and not accepts(policy, "position_ids"):
        return f"{name}.forward takes no position_ids, so rows of different lengths need padding"
    return reason


@torch.no_grad()
def _what_a_trial_shows(policy: nn.Module) -> str | None:
    """Decode the fourth of four tokens both ways."""
    name, device = type(unwrap_peft(policy)).__name__, next(policy.parameters()).device
    ids = torch.arange(1, 5, device=device)[None] % text_config(policy).vocab_size
    seen: list[str] = []

    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        window = trial.layers[module.layer_idx].window  # type: ignore[index]
        if kwargs.get("sliding_window") not in (None, window):
            seen.append(
                f"layer {module.layer_idx} asks for a window of {kwargs['sliding_window']}, not {window}"
            )
        if key.shape != value.shape:
            seen.append(f"keys of shape {tuple(key.shape[1:])} and values of {tuple(value.shape[1:])} differ")
            return query.new_zeros(*query.shape[:1], 1, query.shape[1], value.shape[3]), None
        seen.extend(f"its attention asks for {argument}" for argument in unknown_arguments(kwargs))
        layers.add(module.layer_idx)
        return _attention(module, query, key, value, mask, **kwargs)

    argument = cache_argument(policy)
    prefilled = DynamicCache()
    policy(input_ids=ids[:, :3], use_cache=True, logits_to_keep=1, **{argument: prefilled})
    expected = policy(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()
    trial = SlotCache(1, 4, windows(text_config(policy)))
    if len(prefilled.layers) != len(trial.layers):
        return f"{name} caches {len(prefilled.layers)} layers, its configuration says {len(trial.layers)}"
    if any(layer.keys.shape != layer.values.shape for layer in prefilled.layers):  # type: ignore[union-attr]
        return f"{name}'s keys and values differ in shape"
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    trial.store(prefilled, slot, slot)
    trial.slots, trial.lengths = slot, slot + 3
    layers: set[Any] = set()
    AttentionInterface.register(f"{_IMPLEMENTATION}_trial", watched)
    _active.append(trial)
    try:
        with implementation(text_config(policy), f"{_IMPLEMENTATION}_trial"):
            got = policy(
                input_ids=ids[:, 3:],
                position_ids=slot[None] + 3,
                use_cache=True,
                logits_to_keep=1,
                **{argument: trial},
            ).logits.float()
    finally:
        _active.pop()
    if seen:
        return f"{name}: {seen[0]}"
    if len(layers) != len(trial.layers):
        return f"{name} sent {len(layers)} of {len(trial.layers)} layers through its chosen attention"
    # A wrong attention is off by as much as logits differ among themselves; bfloat16 by a hundredth of that.
    error, spread = float((got - expected).abs().max()), float(expected.max() - expected.min())
    if not error <= 0.1 * spread and expected.isfinite().all():
        return f"{name}'s logits change by {error:.3g} of {spread:.3g} on a cache of slots"
    return None
