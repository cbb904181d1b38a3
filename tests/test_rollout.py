"""Rollout: the policy's own distribution, explicit lengths, and no trace of how episodes were grouped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import backends
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor

from fastppo import cache, prepack
from fastppo import rollout as rollout_module
from fastppo.batch import micro_batches
from fastppo.models import token_logprobs
from fastppo.rollout import Sampling, rollout

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21], [22, 23, 24]]
GREEDY = Sampling(max_new_tokens=8, top_k=1)


def generate(policy: Any, sampling: Sampling, prompts: Any = PROMPTS, **settings: Any) -> Any:
    return rollout(policy, prompts, sampling, **{"pad_token_id": 0, "seed": 3, **settings})


def assert_same_responses(got: Any, expected: Any) -> None:
    assert got.completions() == expected.completions()
    assert torch.equal(got.truncated, expected.truncated)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.sampling_logprobs, expected.sampling_logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.entropy, expected.entropy, atol=2e-5, rtol=0)


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


# Beginnings shared by all and by some, a prompt that is the beginning of others, one token alone.
SHARED = [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]
WITH_A_PREFIX = [[*SHARED, *rest] for rest in ([5], [6, 7, 8, 9, 10, 11, 12], [5, 6], [13] * 9, [5])]


def in_padded_groups(monkeypatch: pytest.MonkeyPatch, policy: Any, *args: Any, **settings: Any) -> Any:
    """What a policy gives that cannot decode in slots."""
    with monkeypatch.context() as patch:
        patch.setitem(cache._reasons, policy, "a test asks for it")
        return generate(policy, *args, **settings)


@pytest.mark.parametrize("prompts", [PROMPTS, WITH_A_PREFIX, [[3]] * 4], ids=["mixed", "prefix", "alike"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_slots_and_padded_groups_give_the_same_responses(
    architecture: str, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(architecture)
    sampling = Sampling(
        max_new_tokens=20, temperature=1.3, top_p=0.9, min_new_tokens=2, stop_token_ids=tuple(range(40))
    )
    expected = in_padded_groups(monkeypatch, policy, sampling, prompts, num_generations=2)
    lengths = {len(c) for c in expected.completions()}
    assert len(lengths) > 2, "rows must leave at different times"
    for max_rows in (1, 2, 6, 64):
        got = generate(policy, sampling, prompts, num_generations=2, max_rows=max_rows)
        assert_same_responses(got, expected)


def test_slots_and_padded_groups_agree_under_every_control(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, tokenizer = tiny.policy(), tiny.tokenizer()

    class Odd(LogitsProcessor):
        """Forbids ids by what a row holds, padding included as generate pads."""

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return scores.scatter(1, input_ids[:, -1:], -torch.inf)  # type: ignore[return-value]

    sampling = Sampling(
        max_new_tokens=20,
        temperature=1.5,
        repetition_penalty=1.4,
        min_new_tokens=3,
        stop_token_ids=(1, 40, 41),
        stop_strings=("e", "th"),
    )
    settings: Any = {"logits_processor": [Odd()], "tokenizer": tokenizer, "pad_token_id": 7}
    expected = in_padded_groups(monkeypatch, policy, sampling, **settings)
    for max_rows in (1, 3, 64):
        got = generate(policy, sampling, max_rows=max_rows, **settings)
        assert got.completions() == expected.completions()
        assert torch.equal(got.truncated, expected.truncated)


def test_a_lora_policy_decodes_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = peft.get_peft_model(
        tiny.policy(), peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")
    )
    assert cache.why_no_slots(policy) is None
    sampling = Sampling(max_new_tokens=12)
    expected = in_padded_groups(monkeypatch, policy, sampling)
    assert generate(policy, sampling, max_rows=2).completions() == expected.completions()


def test_a_slot_grows_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy()
    sampling = Sampling(max_new_tokens=40)
    expected = in_padded_groups(monkeypatch, policy, sampling)
    monkeypatch.setattr("fastppo.rollout._FIRST_CAPACITY", 2)
    assert generate(policy, sampling, max_rows=2).completions() == expected.completions()


class Again:
    """Where there is no GPU, in place of a graph: the step is taken when it is replayed. As a graph, it is tried first
    and must leave no trace.
    """

    made: ClassVar[list[Again]] = []

    def __init__(self, step: Callable[[], None], state: Sequence[torch.Tensor]) -> None:
        before = [x.clone() for x in state]
        step()
        for x, was in zip(state, before, strict=True):
            x.copy_(was)
        self.step, self.places = step, [x.data_ptr() for x in state]
        self.state = state
        self.made.append(self)

    def replay(self) -> None:
        self.step()
        assert [x.data_ptr() for x in self.state] == self.places


def captured(monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> Any:
    """A rollout whose steps are as a graph takes them, and how many graphs it took; on a GPU a real one."""
    with monkeypatch.context() as patch:
        if next(args[0].parameters()).device.type != "cpu":
            return generate(*args, cuda_graphs=True, **settings), 0
        patch.setattr(rollout_module, "Graph", Again)
        patch.setattr(Again, "made", [])
        got = generate(*args, cuda_graphs=True, **settings)
        assert Again.made
        return got, len(Again.made)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("check_every", [1, 5])
@pytest.mark.parametrize("prompts", [PROMPTS, WITH_A_PREFIX, [[3]] * 4], ids=["mixed", "prefix", "alike"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_step_on_fixed_seats_is_the_same_step(
    architecture: str, prompts: Any, check_every: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny.policy(architecture).to(device)
    sampling = Sampling(
        max_new_tokens=20, temperature=1.3, top_p=0.9, min_new_tokens=2, stop_token_ids=tuple(range(40))
    )
    expected = generate(policy, sampling, prompts, num_generations=2)
    assert len({len(c) for c in expected.completions()}) > 2, "rows must leave at different times"
    # On a GPU the host looks for finished rows now and then.
    run = rollout_module._Slots.run
    monkeypatch.setattr(
        rollout_module._Slots, "run", lambda slots: (setattr(slots, "check_every", check_every), run(slots))
    )
    for max_rows in (2, 6, 64):
        got, _ = captured(monkeypatch, policy, sampling, prompts, num_generations=2, max_rows=max_rows)
        assert_same_responses(got, expected)


def test_a_graph_is_made_again_when_the_cache_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "_FIRST_CAPACITY", 4)
    policy, sampling = tiny.policy(), Sampling(max_new_tokens=40)
    got, graphs = captured(monkeypatch, policy, sampling)
    assert got.completions() == generate(policy, sampling).completions()
    assert 2 < graphs < 10


class Watch(TorchDispatchMode):
    """Fails where a step could not be captured: it waits for a value, or brings one from the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[-1].split(".")[0]
        assert name not in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "lift_fresh"), (
            name
        )
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert not any(x is not None and x.dtype is torch.bool for x in args[1]), (
                "a mask has to be counted"
            )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_step_neither_waits_for_the_device_nor_copies_from_the_host(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = rollout_module._Slots._advance, []

    def watched(slots: Any, rows: Any) -> None:
        steps.append(len(rows.slots))
        with Watch():
            plain(slots, rows)

    monkeypatch.setattr(rollout_module._Slots, "_advance", watched)
    # The library looks at arguments on the CPU that it takes as they are on CUDA: not the step's doing.
    sampling = Sampling(
        max_new_tokens=6, top_p=0.9, top_k=50, min_p=0.01, min_new_tokens=2, stop_token_ids=(1, 2)
    )
    captured(monkeypatch, tiny.policy(architecture), sampling)
    assert steps and set(steps) == {len(PROMPTS)}
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="lift_fresh"), Watch():
        torch.tensor(1.0)
    with pytest.raises(AssertionError, match="counted"), Watch():
        torch.ones(1)[torch.ones(1, dtype=torch.bool)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.2}, "cuda_graphs cannot hold a repetition_penalty, stop_strings or"),
        ({"stop_strings": (".",)}, "cuda_graphs cannot hold a repetition_penalty, stop_strings or"),
    ],
)
def test_what_cannot_be_captured_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(
            tiny.policy(),
            Sampling(max_new_tokens=4, **settings),
            tokenizer=tiny.tokenizer(),
            cuda_graphs=True,
        )


def test_a_policy_without_slots_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy()
    monkeypatch.setitem(cache._reasons, policy, "a test asks for it")
    with pytest.raises(ValueError, match="decodes on a cache of slots: a test asks for it"):
        generate(policy, GREEDY, cuda_graphs=True)


def test_the_policy_has_its_own_attention_back_after_an_error() -> None:
    policy = tiny.policy()
    own = policy.config._attn_implementation

    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            assert policy.config._attn_implementation != own
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        generate(policy, GREEDY, logits_processor=[Broken()])
    assert policy.config._attn_implementation == own
    assert not cache._active


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_of_the_tests_decodes_in_slots(architecture: str) -> None:
    assert cache.why_no_slots(tiny.policy(architecture)) is None


def other_models() -> dict[str, Any]:
    """Models that keep something a slot does not hold, and the reason each is given."""
    sizes = {**tiny._SIZES, "vocab_size": 50}
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

    return {
        "Gemma2ForCausalLM caps its attention scores": lambda: Gemma2ForCausalLM(
            Gemma2Config(**sizes, head_dim=8)
        ),
        "GptOssForCausalLM has attention sinks": lambda: GptOssForCausalLM(
            GptOssConfig(**sizes, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        ),
        "BloomForCausalLM does not let its attention be chosen": lambda: BloomForCausalLM(
            BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
        ),
        "MambaForCausalLM does not let its attention be chosen": lambda: MambaForCausalLM(
            MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
    }


@pytest.mark.parametrize("reason", other_models())
def test_models_that_cannot_decode_in_slots_are_named(reason: str) -> None:
    assert (cache.why_no_slots(other_models()[reason]().eval()) or "").startswith(reason)


def test_what_only_a_trial_shows() -> None:
    policy = tiny.policy()
    policy.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert cache.why_no_slots(policy) == "LlamaForCausalLM caches 1 layers, its configuration says 2"
    policy = tiny.policy("gpt2")
    policy.transformer.h[1].attn.scaling *= 40
    assert cache.why_no_slots(policy) is None  # asked for through the interface, so heeded


def test_prepacked_layers_compute_the_same_and_are_themselves_again() -> None:
    policy = tiny.policy().bfloat16()
    x = torch.randn(3, 1, 32).bfloat16()
    layer = policy.model.layers[0].mlp.up_proj
    expected = layer(x)
    with pytest.raises(KeyError), torch.no_grad(), prepack.prepacked(policy, 3):
        assert "forward" in vars(layer) or not prepack._AVAILABLE
        torch.testing.assert_close(layer(x), expected, atol=0, rtol=2e-2)
        raise KeyError
    assert not any("forward" in vars(module) for module in policy.modules())
    policy.requires_grad_(False)
    with prepack.prepacked(policy, 3):
        assert not any("forward" in vars(module) for module in policy.modules())
    with prepack.prepacked(policy, 3, frozen=True):
        assert ("forward" in vars(layer)) is prepack._AVAILABLE


def test_a_bfloat16_rollout_on_prepacked_weights_is_that_of_the_plain_ones() -> None:
    policy = tiny.policy().bfloat16()
    sampling = Sampling(max_new_tokens=20, temperature=1.2)
    plain, packed = (generate(policy, sampling, prepack=p) for p in (False, True))
    # A product in another order may round another way, and a draw at a border go the other way: few do.
    same = [a == b for a, b in zip(plain.completions(), packed.completions(), strict=True)]
    assert sum(same) >= 3


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
