"""Sequences laid one after the other in one row: nothing is padding, and a common beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Fewer tokens than this are cheaper to compute again than to look up.
_LEAST_SHARED = 8


@dataclass(frozen=True)
class Packing:
    """b sequences as one row of N tokens.

    In the order of their ids a sequence begins as the one before it does for as long as it can with any. What it shares
    with that one stands there alone; its own tokens, the rest, attend to both. So causal attention is that of b pieces,
    of which each has its own queries and all keys of its sequence.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64, of each token in its sequence.
        cu_seqlens_q: (b + 1,) int64, where the pieces begin among the N.
        cu_seqlens_k: (b + 1,) int64, where their keys begin among the K.
        key_rows: (K,) int64 into N, the tokens whose keys a piece attends to; None where nothing is shared and K = N.
        places: of each sequence, as given, (length,) int64 into N on the CPU: where its tokens stand.
        longest_q: most queries of a piece.
        longest_k: most keys of a piece.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_rows: Tensor | None
    places: tuple[Tensor, ...]
    longest_q: int
    longest_k: int

    def to(self, device: torch.device | str) -> Packing:
        """The same, with all tensors but `places` on the device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens_q=self.cu_seqlens_q.to(device),
            cu_seqlens_k=self.cu_seqlens_k.to(device),
            key_rows=None if self.key_rows is None else self.key_rows.to(device),
        )


def pack(sequences: Sequence[Sequence[int]]) -> Packing:
    """Pack sequences of token ids, in any order."""
    order, shared = _in_order(sequences)
    places: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(sequences)
    ids: list[int] = []
    positions: list[Tensor] = []
    before = torch.empty(0, dtype=torch.int64)
    for i, common in zip(order, shared, strict=True):
        own = sequences[i][common:]
        before = torch.cat([before[:common], torch.arange(len(ids), len(ids) + len(own))])
        places[i] = before
        ids += own
        positions.append(torch.arange(common, common + len(own)))
    queries = [len(sequences[i]) - common for i, common in zip(order, shared, strict=True)]
    keys = [len(sequences[i]) for i in order]
    return Packing(
        input_ids=torch.tensor(ids, dtype=torch.int64)[None],
        position_ids=torch.cat(positions)[None] if positions else torch.empty(1, 0, dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0),
        cu_seqlens_k=torch.tensor([0, *keys]).cumsum(0),
        key_rows=torch.cat([places[i] for i in order]) if any(shared) else None,
        places=tuple(places),
        longest_q=max(queries, default=0),
        longest_k=max(keys, default=0),
    )


def groups_to_pack(sequences: Sequence[Sequence[int]], max_tokens: int | None = None) -> list[list[int]]:
    """Sequence numbers in groups of at most `max_tokens` tokens each when packed (but at least one sequence).

    Groups are as few as can be, and then as equal as can be: a small last one would not fill the processor.
    """
    order, shared = _in_order(sequences)
    lengths = [len(sequences[i]) for i in order]

    def cut(limit: int) -> list[list[int]]:
        groups: list[list[int]] = []
        size = 0
        for i, length, common in zip(order, lengths, shared, strict=True):
            if groups and size + length - common <= limit:
                groups[-1].append(i)
                size += length - common
            else:
                groups.append([i])
                size = length
        return groups

    most = sum(lengths) if max_tokens is None else max_tokens
    fewest = len(cut(most))
    least = 0
    while least < most:
        middle = (least + most) // 2
        if len(cut(middle)) > fewest:
            least = middle + 1
        else:
            most = middle
    return cut(most)


def _in_order(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Sequence numbers in the order of their ids, and how many tokens each shares with the one before it; 0 where that
    is not worth it.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    shared = [0] * len(order)
    for k in range(1, len(order)):
        a, b = sequences[order[k - 1]], sequences[order[k]]
        common = 0
        while common < min(len(a), len(b)) and a[common] == b[common]:
            common += 1
        shared[k] = common if common >= _LEAST_SHARED else 0
    return order, shared
