"""Packed sequences: nothing is padding, a common beginning is computed once, and every number is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_trainer import trainer
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from fastppo import attention, models, score
from fastppo.batch import MicroBatch, Rollout, micro_batches, text_batches
from fastppo.packing import groups_to_pack, pack

BEGINNING = list(range(20, 30))
# Three with a common beginning of ten tokens, two of which have two more in common; two alone; one twice.
SEQUENCES = [
    [*BEGINNING, 1, 2, 3],
    [7, 8, 9],
    [*BEGINNING, 1, 2, 5, 6],
    [*BEGINNING, 4],
    [7, 9],
    [7, 8, 9],
    [40, 41, 42, 43, 44, 45, 46, 47, 48],
    [40, 41, 42, 43, 44, 45, 46, 47, 48],
]


DEVICES = [
    ("cpu", torch.float32),
    *([("cuda", torch.bfloat16)] if torch.cuda.is_available() else []),  # FlashAttention has no float32
]


def test_by_hand() -> None:
    packing = pack([[5, 6], [*BEGINNING, 1], BEGINNING, [*BEGINNING, 2, 3]])
    # Sorted: [5, 6], the beginning, its continuation by 1, its continuation by 2, 3.
    assert packing.input_ids.tolist() == [[5, 6, *BEGINNING, 1, 2, 3]]
    assert packing.position_ids.tolist() == [[0, 1, *range(10), 10, 10, 11]]
    assert packing.cu_seqlens_q.tolist() == [0, 2, 12, 13, 15]
    assert packing.cu_seqlens_k.tolist() == [0, 2, 12, 23, 35]
    beginning = list(range(2, 12))
    assert packing.key_rows is not None
    assert packing.key_rows.tolist() == [0, 1, *beginning, *beginning, 12, *beginning, 13, 14]
    assert [p.tolist() for p in packing.places] == [[0, 1], [*beginning, 12], beginning, [*beginning, 13, 14]]
    assert (packing.longest_q, packing.longest_k) == (10, 12)


def test_every_token_stands_where_it_says() -> None:
    packing = pack(SEQUENCES)
    for sequence, places in zip(SEQUENCES, packing.places, strict=True):
        assert packing.input_ids[0, places].tolist() == sequence
        assert packing.position_ids[0, places].tolist() == list(range(len(sequence)))
    # 13 + 2 + 1 of the beginning's, 3 + 2 + 3 of what is too short to share, 9 once.
    assert packing.input_ids.shape == (1, (13 + 2 + 1) + (3 + 2 + 3) + 9)


def test_without_anything_in_common_keys_are_the_queries() -> None:
    packing = pack([[3, 4, 5], [1, 2]])
    assert packing.key_rows is None
    assert torch.equal(packing.cu_seqlens_q, packing.cu_seqlens_k)


@pytest.mark.parametrize("limit", [14, 16, 20, 33, 1000])
def test_groups_hold_what_the_limit_allows(limit: int) -> None:
    groups = groups_to_pack(SEQUENCES, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(SEQUENCES)))
    sizes = [pack([SEQUENCES[i] for i in group]).input_ids.numel() for group in groups]
    assert max(sizes) <= limit


def test_groups_are_few_and_equal() -> None:
    sequences = [[i] * 10 for i in range(16)]
    # Five of them fit, so four groups it takes; not 5, 5, 5 and 1.
    assert [len(group) for group in groups_to_pack(sequences, 59)] == [4, 4, 4, 4]
    assert groups_to_pack(sequences) == [list(range(16))]
    assert [len(group) for group in groups_to_pack(sequences, 3)] == [1] * 16  # one at least
    assert groups_to_pack([]) == []


def episodes(device: torch.device | str = "cpu") -> Rollout:
    """One response per sequence: what follows its first two tokens; not every token counts."""
    lengths = torch.tensor([len(s) - 1 for s in SEQUENCES])
    width = int(lengths.max())
    ids = torch.full((len(SEQUENCES), width), 99)
    for row, s in enumerate(SEQUENCES):
        ids[row, : len(s) - 1] = torch.tensor(s[1:])
    mask = torch.arange(width) < lengths[:, None]
    mask[2, 3] = mask[0, 0] = False
    zeros = torch.zeros(mask.shape)
    truncated = torch.zeros(len(SEQUENCES), dtype=torch.bool)
    tensors = (x.to(device) for x in (ids, mask, lengths, truncated, zeros, zeros, zeros))
    return Rollout([s[:1] for s in SEQUENCES], *tensors)


def spread(pieces: list[MicroBatch], results: list[torch.Tensor], size: int) -> torch.Tensor:
    whole = torch.full((size,), torch.nan)
    for piece, x in zip(pieces, results, strict=True):
        whole[piece.tokens.cpu()] = x.cpu()
    return whole


def token_logprobs(policy: Any, **cut: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs of all tokens and the gradients of a sum over them, each with a weight of its own."""
    device = next(policy.parameters()).device
    rollout = episodes(device)
    weights = torch.randn(rollout.response_ids.numel(), generator=torch.Generator().manual_seed(0))
    pieces = list(micro_batches(rollout, range(len(rollout)), pad_token_id=0, **cut))
    policy.zero_grad()
    found = []
    for piece in pieces:
        logprobs, entropy = models.token_logprobs(policy, piece, 0.7)
        ((logprobs + 0.3 * entropy) * weights.to(device)[piece.tokens]).sum().backward()
        found.append(logprobs.detach())
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return spread(pieces, found, rollout.response_ids.numel()), gradients


@pytest.mark.parametrize("max_tokens", [None, 20])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_is_padded_forward_and_backward(architecture: str, max_tokens: int | None) -> None:
    policy = tiny.policy(architecture)
    assert attention.why_not_packed(models.causal_trunk(policy)) is None
    expected, expected_gradients = token_logprobs(policy)
    got, gradients = token_logprobs(policy, max_tokens=max_tokens, padding_free=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert gradients.keys() == expected_gradients.keys()
    for name, x in expected_gradients.items():
        torch.testing.assert_close(gradients[name], x, atol=2e-5 * float(x.abs().max()), rtol=1e-4, msg=name)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_packed_is_padded_on_every_device(architecture: str, device: str, dtype: torch.dtype) -> None:
    policy = tiny.policy(architecture).to(device, dtype)
    assert attention.why_not_packed(models.causal_trunk(policy)) is None
    expected, expected_gradients = token_logprobs(policy)
    got, gradients = token_logprobs(policy, padding_free=True)
    tolerance = 2e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    for name, x in expected_gradients.items():
        assert (gradients[name] - x).norm() <= tolerance * x.norm() + 1e-7, name


def test_a_critic_and_a_reward_of_their_own_are_packed_too() -> None:
    model = models.ActorCritic(tiny.policy(), tiny.classifier())
    values = []
    for padding_free in (False, True):
        pieces = list(micro_batches(episodes(), range(8), pad_token_id=0, padding_free=padding_free))
        with torch.no_grad():
            values.append(spread(pieces, [model.values(piece) for piece in pieces], 8 * 13))
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-5, equal_nan=True)
    classifier = tiny.classifier()
    seen = score.Episodes(["x"] * 8, ["y"] * 8, [s[1:] for s in SEQUENCES], [s[:1] for s in SEQUENCES])
    padded, packed = (
        score.ClassifierReward(classifier, None, max_rows=3, padding_free=packed)(seen)
        for packed in (False, True)
    )
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(padded), atol=1e-5, rtol=1e-5)


def test_rows_become_tokens() -> None:
    # Two episodes of at most 14 tokens are 28 tokens: more than two packed ones go into them.
    pieces = list(micro_batches(episodes(), range(8), pad_token_id=0, max_rows=2, padding_free=True))
    assert max(piece.input_ids.numel() for piece in pieces) <= 28
    assert len(pieces) == 2 and sum(len(piece.counts) for piece in pieces) == 8
    pieces = list(micro_batches(episodes(), range(8), pad_token_id=0, max_tokens=14, padding_free=True))
    assert max(piece.input_ids.numel() for piece in pieces) <= 14


def test_packed_micro_batches_name_the_same_tokens() -> None:
    found = []
    for padding_free in (False, True):
        tokens, targets = [], []
        for piece in micro_batches(
            episodes(), range(8), pad_token_id=0, max_rows=3, padding_free=padding_free
        ):
            assert sum(piece.counts) == len(piece.tokens)
            tokens.append(piece.tokens)
            targets.append(piece.target_ids)
        order = torch.cat(tokens).argsort()
        found.append((torch.cat(tokens)[order].tolist(), torch.cat(targets)[order].tolist()))
    assert found[0] == found[1]
    assert found[0][1] == episodes().response_ids.flatten()[found[0][0]].tolist()


def test_texts_are_packed() -> None:
    policy = tiny.policy()
    sums = []
    for padding_free in (False, True):
        pieces = list(text_batches(SEQUENCES, pad_token_id=0, device=torch.device("cpu"), max_rows=4,
                                   padding_free=padding_free))  # fmt: skip
        assert (pieces[0].packing is not None) == padding_free
        with torch.no_grad():
            sums.append(sum(float(models.token_logprobs(policy, piece, 1.0)[0].sum()) for piece in pieces))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_checkpointing": True}])
def test_a_run_is_the_same_without_padding(tmp_path: Path, separate: bool, settings: dict[str, Any]) -> None:
    reports = []
    for padding_free in (False, None):
        run = trainer(
            tmp_path,
            padding_free=padding_free,
            value_model=tiny.classifier() if separate else None,
            learning_rate=1e-4,
            num_generations=2,
            **settings,
        )
        flash_attention_lacks_it = torch.cuda.is_available() and not settings  # float32 on CUDA
        assert run.padding_free == (padding_free is None and not flash_attention_lacks_it)
        run.train()
        reports.append([x for x in run.state.log_history if "loss/policy_avg" in x])
    # bfloat16 rounds a product differently in another shape, and draws part once a probability did.
    tolerance = 0.2 if settings else 1e-3
    for padded, packed in zip(*reports, strict=True):
        assert packed["loss/value_avg"] == pytest.approx(padded["loss/value_avg"], rel=tolerance, abs=1e-3)
        if not settings:
            assert packed["objective/scores"] == pytest.approx(padded["objective/scores"])
    assert reports[1][0]["val/ratio"] == pytest.approx(1.0, abs=0.05)


def gemma2() -> Any:
    sizes = {"vocab_size": 307, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, max_position_embeddings=64)).eval()


def test_a_model_that_cannot_is_padded_with_a_word_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "Gemma2Model caps its attention scores"
    assert reason in (attention.why_not_packed(models.causal_trunk(gemma2())) or "")
    assert not trainer(tmp_path, model=gemma2()).padding_free
    assert f"micro-batches are padded: {reason}" in caplog.text
    with pytest.raises(ValueError, match=f"padding_free=True does not go with these models: {reason}"):
        trainer(tmp_path, model=gemma2(), padding_free=True)


class Positionless(nn.Module):
    """A rotary embedding that counts places in the row and does not listen to positions."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.own(x, torch.arange(position_ids.shape[1])[None])


def test_a_trunk_that_does_not_listen_is_found_out() -> None:
    policy = tiny.policy()
    policy.model.rotary_emb = Positionless(policy.model.rotary_emb)
    assert "hidden states change by" in (attention.why_not_packed(policy.model) or "")
    policy = tiny.policy()
    policy.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert "sent 1 of 2 layers" in (attention.why_not_packed(policy.model) or "")


def test_outside_the_block_a_model_is_what_it_was() -> None:
    policy = tiny.policy()
    trunk = models.causal_trunk(policy)
    own = trunk.config._attn_implementation
    with pytest.raises(RuntimeError), attention.packed_attention(trunk, pack(SEQUENCES)):
        assert trunk.config._attn_implementation != own
        raise RuntimeError
    assert trunk.config._attn_implementation == own
