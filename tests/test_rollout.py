"""Rollout: the policy's own distribution, explicit lengths, and no trace of how episodes were grouped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import backends
import pytest
import tiny
import torch
from transformers import LogitsProcessor

from fastppo.batch import micro_batches
from fastppo.models import token_logprobs
from fastppo.rollout import Sampling, rollout

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21], [22, 23, 24]]
GREEDY = Sampling(max_new_tokens=8, top_k=1)


def generate(policy: Any, sampling: Sampling, prompts: Any = PROMPTS, **settings: Any) -> Any:
    return rollout(policy, prompts, sampling, **{"pad_token_id": 0, "seed": 3, **settings})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_rollout_of_a_padded_batch_is_hugging_face_generate_row_by_row(architecture: str) -> None:
    policy = tiny.policy(architecture)
    got = generate(policy, GREEDY)
    for row, prompt in enumerate(PROMPTS):
        alone = policy.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
        assert got.completions()[row] == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logprobs_are_those_of_the_training_path(architecture: str) -> None:
    policy = tiny.policy(architecture)
    got = generate(policy, Sampling(max_new_tokens=8, temperature=1.7))
    for batch in micro_batches(got, range(len(got)), pad_token_id=0, max_rows=2):
        logprobs, entropy = token_logprobs(policy, batch, 1.7)
        torch.testing.assert_close(got.logprobs.flatten()[batch.tokens], logprobs, atol=2e-4, rtol=0)
        torch.testing.assert_close(got.entropy.flatten()[batch.tokens], entropy, atol=2e-4, rtol=0)


def test_draws_do_not_depend_on_grouping_order_or_neighbours() -> None:
    policy = tiny.policy()
    sampling = Sampling(max_new_tokens=8, temperature=1.3, top_p=0.9, stop_token_ids=tuple(range(60)))
    together = generate(policy, sampling)
    one_by_one = generate(policy, sampling, max_rows=1)
    assert together.completions() == one_by_one.completions()
    alone = generate(policy, sampling, PROMPTS[2:3], first_episode=2)
    assert together.completions()[2] == alone.completions()[0]
    assert generate(policy, sampling, seed=4).completions() != together.completions()


def test_rows_that_stop_leave_and_lengths_say_where() -> None:
    policy = tiny.policy()
    everything = generate(policy, replace(GREEDY, top_k=0, temperature=2.0))
    stop = {everything.completions()[0][2], everything.completions()[3][0]}
    got = generate(policy, replace(GREEDY, top_k=0, temperature=2.0, stop_token_ids=tuple(stop)))
    for row, full in enumerate(everything.completions()):
        cut = next((i + 1 for i, x in enumerate(full) if x in stop), len(full))
        assert got.completions()[row] == full[:cut]
        assert bool(got.truncated[row]) is (full[cut - 1] not in stop)
        assert got.response_mask[row].sum() == cut
    assert (got.response_ids[~got.response_mask] == 0).all()
    assert (got.logprobs[~got.response_mask] == 0).all()


def test_padding_with_the_stop_token_changes_nothing() -> None:
    policy = tiny.policy()
    sampling = Sampling(max_new_tokens=8, temperature=2.0, stop_token_ids=(40, 41, 42, 43, 44, 45))
    a, b = generate(policy, sampling, pad_token_id=0), generate(policy, sampling, pad_token_id=40)
    assert a.completions() == b.completions()
    assert torch.equal(a.response_mask, b.response_mask)


def test_several_generations_share_a_prompt_and_differ() -> None:
    policy = tiny.policy()
    sampling = Sampling(max_new_tokens=6, temperature=1.5)
    got = generate(policy, sampling, PROMPTS[:3], num_generations=3)
    repeated = generate(policy, sampling, [p for p in PROMPTS[:3] for _ in range(3)])
    assert got.completions() == repeated.completions()
    assert got.prompt_ids == [p for p in PROMPTS[:3] for _ in range(3)]
    assert len({tuple(c) for c in got.completions()[:3]}) == 3


def test_min_new_tokens() -> None:
    policy = tiny.policy()
    sampling = Sampling(max_new_tokens=8, temperature=2.0, stop_token_ids=tuple(range(100)), min_new_tokens=4)
    assert int(generate(policy, sampling).response_lengths.min()) >= 4


def test_repetition_penalty_is_hugging_faces_and_blind_to_padding() -> None:
    policy = tiny.policy()
    got = generate(policy, replace(GREEDY, repetition_penalty=1.5), pad_token_id=30)
    for row, prompt in enumerate(PROMPTS):
        alone = policy.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.5,
        )
        assert got.completions()[row] == alone[0, len(prompt) :].tolist()


def test_stop_strings_end_a_response() -> None:
    policy, tokenizer = tiny.policy(), tiny.tokenizer()
    readable = [i for i in range(300) if tokenizer.decode([i]).isalpha() and tokenizer.decode([i]).isascii()]

    class Readable(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return torch.full_like(scores, -torch.inf).index_copy_(
                1, torch.tensor(readable), scores[:, readable]
            )  # type: ignore[return-value]

    sampling = Sampling(max_new_tokens=8, temperature=2.0)
    whole = generate(policy, sampling, logits_processor=[Readable()])
    text = tokenizer.decode(whole.completions()[0])
    stop = text[2:4]
    got = generate(
        policy, replace(sampling, stop_strings=(stop,)), tokenizer=tokenizer, logits_processor=[Readable()]
    )
    first = tokenizer.decode(got.completions()[0])
    assert text.startswith(first) and stop in first and len(first) < len(text)
    assert stop not in tokenizer.decode(got.completions()[0][:-1])
    assert not bool(got.truncated[0])
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        generate(policy, replace(sampling, stop_strings=(stop,)))


def test_extra_logits_processor() -> None:
    class OnlyEven(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            scores[:, 1::2] = -torch.inf
            return scores

    got = generate(tiny.policy(), Sampling(max_new_tokens=8), logits_processor=[OnlyEven()])
    assert (got.response_ids % 2 == 0).all()


def test_truncated_sampling_keeps_both_logprobs() -> None:
    got = generate(tiny.policy(), Sampling(max_new_tokens=8, top_k=1))
    assert (got.sampling_logprobs == 0).all()
    assert (got.logprobs[got.response_mask] < 0).all()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "expected at least one prompt, got none"),
        ([[1], []], "prompt 1 must have at least one token"),
        ([[1] * 60], "prompt 0 has 60 tokens; with response_length 8 that exceeds the model's context of 64"),
        ([[1], [2, 307]], "prompt 1 has token id 307, outside the vocabulary of 307"),
        ([[-1]], "token id -1, outside"),
    ],
)
def test_bad_prompts_are_named(prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny.policy(), GREEDY, prompts)


def test_a_policy_that_gives_nan_is_an_error() -> None:
    policy = tiny.policy()
    with torch.no_grad():
        policy.lm_head.weight.fill_(torch.nan)
    with pytest.raises((RuntimeError, ValueError), match="sample"):
        generate(policy, GREEDY)


def test_a_policy_that_gives_nan_where_the_host_cannot_be_told_at_once() -> None:
    policy = tiny.policy()
    with torch.no_grad():
        policy.lm_head.weight.fill_(torch.nan)
    message = "sample: the logits of episode 7 at response position 0 hold NaN"
    with backends.emulated(), pytest.raises(ValueError, match=message):
        generate(policy, GREEDY, PROMPTS[:1], first_episode=7)
