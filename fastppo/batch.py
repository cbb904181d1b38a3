"""What one rollout hands to the next rooms, and how it is cut into micro-batches.

Sizes: B episodes, T response tokens (longest), N counted tokens of a micro-batch, L sequence length.
Lengths are explicit: nothing is ever inferred from padding ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .packing import Packing, groups_to_pack, pack


@dataclass
class Rollout:
    """B responses to B prompts, as the policy sampled them.

    Attributes:
        prompt_ids: B lists of token ids, each at least one long, without padding.
        response_ids: (B, T) int64, right-padded.
        response_mask: (B, T) bool, True = sampled by the policy and counts (the EOS counts).
        response_lengths: (B,) int64, tokens in each response, observation tokens of an environment included.
        truncated: (B,) bool, True = ended by the length limit, not by a stop token or string.
        logprobs: (B, T) float32, of the sampled tokens under the temperature-scaled policy, in nats.
        sampling_logprobs: (B, T) float32, under the truncated distribution they were drawn from.
        entropy: (B, T) float32, of the temperature-scaled policy, in nats.
    """

    prompt_ids: list[list[int]]
    response_ids: Tensor
    response_mask: Tensor
    response_lengths: Tensor
    truncated: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def completions(self) -> list[list[int]]:
        """B lists of response ids without padding."""
        lengths = self.response_lengths.tolist()
        return [row[:length] for row, length in zip(self.response_ids.tolist(), lengths, strict=True)]

    def without_truncated(self) -> Rollout:
        """The same episodes; no token counts of those that the length limit cut."""
        return replace(self, response_mask=self.response_mask & ~self.truncated[:, None])


@dataclass
class MicroBatch:
    """Some episodes for one forward pass; only their N counted tokens reach the heads.

    Attributes:
        input_ids: (b, L) int64, prompt then response then padding. Padding comes last, so that causal attention
            needs no mask and positions need no shift. Packed: (1, L), see `Packing`.
        predictors: (N,) int64 into `input_ids`, flattened: the place whose hidden state predicts each counted token.
        target_ids: (N,) int64, the counted tokens.
        tokens: (N,) int64 into B*T: where the counted tokens stand in the rollout, one episode after the other.
        counts: how many of the N belong to each of the b episodes.
        packing: how the episodes lie in `input_ids`, without padding; None: padded.
    """

    input_ids: Tensor
    predictors: Tensor
    target_ids: Tensor
    tokens: Tensor
    counts: tuple[int, ...]
    packing: Packing | None = None


def groups_by_length(
    lengths: Sequence[int], *, max_rows: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Row numbers in groups of similar length, longest first, so that little of a group is padding.

    A group has at most `max_rows` rows and at most `max_tokens` tokens with padding (but at least one row).
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups:
            rows, longest = len(groups[-1]) + 1, lengths[groups[-1][0]]
            if (max_rows is None or rows <= max_rows) and (
                max_tokens is None or rows * longest <= max_tokens
            ):
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def micro_batches(
    rollout: Rollout,
    rows: Sequence[int],
    *,
    pad_token_id: int,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    padding_free: bool = False,
) -> Iterator[MicroBatch]:
    """The episodes `rows` of a rollout, cut into micro-batches of at most `max_rows` episodes and `max_tokens` tokens.

    With padding, those of similar length come together. Without (`padding_free`), those with a common beginning do, and
    `max_rows` is read as the tokens of that many episodes as long as the rollout's longest: as much work and memory as
    it allows with padding, and more episodes.

    Episodes without a token that counts are left out, but one where there is no other: every rank of a run must have
    something to run backward through.
    """
    width = rollout.response_ids.shape[1]
    completions = rollout.completions()
    masks = rollout.response_mask.cpu()
    rows = [row for row in rows if masks[row].any()] or list(rows[:1])
    if padding_free:
        longest = max(len(p) + len(c) for p, c in zip(rollout.prompt_ids, completions, strict=True))
        max_tokens = _token_budget(max_rows, max_tokens, longest)
    sequences = [rollout.prompt_ids[row] + completions[row] for row in rows]
    counted = [masks[row].nonzero().squeeze(1) for row in rows]
    for group in _groups(sequences, max_rows, max_tokens, padding_free):
        yield _micro_batch(
            [sequences[i] for i in group],
            # The hidden state before a token predicts it.
            [len(rollout.prompt_ids[rows[i]]) - 1 + counted[i] for i in group],
            torch.cat([rows[i] * width + counted[i] for i in group]),
            pad_token_id,
            rollout.response_ids.device,
            padding_free,
        )


def text_batches(
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    padding_free: bool = False,
) -> Iterator[MicroBatch]:
    """Micro-batches of plain texts, in which every token but the first counts; `tokens` numbers them."""
    first = 0
    if padding_free:
        max_tokens = _token_budget(max_rows, max_tokens, max(len(s) for s in sequences))
    for group in _groups(sequences, max_rows, max_tokens, padding_free):
        members = [list(sequences[i]) for i in group]
        count = sum(len(s) - 1 for s in members)
        yield _micro_batch(
            members,
            [torch.arange(len(s) - 1) for s in members],
            torch.arange(first, first + count),
            pad_token_id,
            device,
            padding_free,
        )
        first += count


def _token_budget(max_rows: int | None, max_tokens: int | None, longest: int) -> int | None:
    limits = [x for x in (max_tokens, None if max_rows is None else max_rows * longest) if x is not None]
    return min(limits, default=None)


def _groups(
    sequences: Sequence[Sequence[int]], max_rows: int | None, max_tokens: int | None, padding_free: bool
) -> list[list[int]]:
    if padding_free:
        return groups_to_pack(sequences, max_tokens)
    return groups_by_length([len(s) for s in sequences], max_rows=max_rows, max_tokens=max_tokens)


def _micro_batch(
    sequences: Sequence[list[int]],
    predictors: Sequence[Tensor],
    tokens: Tensor,
    pad_token_id: int,
    device: torch.device,
    padding_free: bool,
) -> MicroBatch:
    """Sequences, longest first where they are padded; `predictors` are places within each."""
    packing = pack(sequences) if padding_free else None
    targets = [torch.tensor(s)[place + 1] for s, place in zip(sequences, predictors, strict=True)]
    if packing is not None:
        input_ids, all_places = packing.input_ids, packing.places
    else:
        longest = len(sequences[0])
        input_ids = torch.tensor(
            [s + [pad_token_id] * (longest - len(s)) for s in sequences], dtype=torch.int64
        )
        all_places = tuple(i * longest + torch.arange(longest) for i in range(len(sequences)))
    places = [of_sequence[place] for of_sequence, place in zip(all_places, predictors, strict=True)]
    return MicroBatch(
        input_ids=input_ids.to(device),
        predictors=torch.cat(places).to(device),
        target_ids=torch.cat(targets).to(device),
        tokens=tokens.to(device),
        counts=tuple(len(place) for place in predictors),
        packing=None if packing is None else packing.to(device),
    )
