"""Models: our way through trunk and LM head is the model's own, and the critic and reference are what they claim."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from fastppo import models
from fastppo.batch import MicroBatch, Rollout, groups_by_length, micro_batches

LENGTHS = [(3, 4), (1, 6), (5, 1), (2, 2)]  # prompt, response


def episodes(seed: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    width = max(t for _, t in LENGTHS)
    lengths = torch.tensor([t for _, t in LENGTHS])
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.randint(2, tiny.VOCABULARY, (len(LENGTHS), width), generator=generator).masked_fill(~mask, 0)
    zeros = torch.zeros(ids.shape)
    prompts = [torch.randint(2, tiny.VOCABULARY, (p,), generator=generator).tolist() for p, _ in LENGTHS]
    return Rollout(
        prompts, ids, mask, lengths, torch.zeros(len(LENGTHS), dtype=torch.bool), zeros, zeros, zeros
    )


def expected_logprobs(policy: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """One row at a time through the model's own logits."""
    out = torch.zeros(rollout.response_ids.shape)
    for i, (prompt, response) in enumerate(zip(rollout.prompt_ids, rollout.completions(), strict=True)):
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].double() / temperature
        logprobs = logits.log_softmax(-1)
        for t, token in enumerate(response):
            out[i, t] = logprobs[len(prompt) - 1 + t, token]
    return out


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logprobs_equal_the_models_own(architecture: str) -> None:
    policy, rollout = tiny.policy(architecture), episodes()
    got = torch.zeros(rollout.response_ids.numel())
    for batch in micro_batches(rollout, range(len(rollout)), pad_token_id=0, max_tokens=14):
        got[batch.tokens] = models.token_logprobs(policy, batch, 0.7)[0].detach()
    torch.testing.assert_close(
        got.view_as(rollout.response_ids),
        expected_logprobs(policy, rollout, 0.7).detach(),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_gradients_equal_those_through_full_logits(architecture: str) -> None:
    policy, rollout = tiny.policy(architecture), episodes()
    weights = torch.randn(rollout.response_ids.shape, generator=torch.Generator().manual_seed(5))
    (expected_logprobs(policy, rollout, 0.7) * weights).sum().backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    for batch in micro_batches(rollout, range(len(rollout)), pad_token_id=0, max_rows=3):
        logprobs, _ = models.token_logprobs(policy, batch, 0.7)
        (logprobs * weights.flatten()[batch.tokens]).sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=2e-3, msg=name)


def test_only_counted_tokens_reach_the_heads() -> None:
    rollout = episodes()
    rollout.response_mask[1, 2:4] = False  # an environment's observation inside a response
    (batch,) = micro_batches(rollout, [1], pad_token_id=0)
    assert batch.input_ids.tolist() == [rollout.prompt_ids[1] + rollout.completions()[1]]
    assert batch.target_ids.tolist() == rollout.response_ids[1, [0, 1, 4, 5]].tolist()
    assert batch.tokens.tolist() == [6, 7, 10, 11]
    assert batch.predictors.tolist() == [0, 1, 4, 5]


def test_groups_by_length() -> None:
    assert groups_by_length([3, 9, 4, 9], max_tokens=18) == [[1, 3], [2, 0]]
    assert groups_by_length([3, 9, 4, 9], max_rows=3) == [[1, 3, 2], [0]]
    assert groups_by_length([30], max_tokens=4) == [[0]]
    assert groups_by_length([]) == []


def test_check_head_catches_an_architecture_it_does_not_know() -> None:
    policy = tiny.policy()
    models.check_head(policy)
    plain = policy.lm_head.forward
    policy.lm_head.forward = lambda x: plain(x) * 3  # a scale that no configuration names
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM: log-probs through its trunk"):
        models.check_head(policy)


def test_prompt_learning_is_refused_and_lora_on_the_head_too() -> None:
    import peft

    prompt_tuned = peft.get_peft_model(
        tiny.policy(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(NotImplementedError, match="prompt learning"):
        models.check_head(prompt_tuned)
    adapted = peft.get_peft_model(
        tiny.policy(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    )
    with pytest.raises(TypeError, match="leave lm_head out"):
        models.check_head(adapted)


def test_value_head_reads_the_state_that_predicts_each_token() -> None:
    policy, rollout = tiny.policy(), episodes()
    model = models.ActorCritic(policy)
    assert model.value_head is not None
    torch.nn.init.normal_(model.value_head.weight)
    (batch,) = micro_batches(rollout, [0], pad_token_id=0)
    states = policy.model(input_ids=batch.input_ids).last_hidden_state[0]
    start = len(rollout.prompt_ids[0])
    expected = model.value_head(states[start - 1 : start + 3]).squeeze(-1)
    torch.testing.assert_close(model(batch, 1.0).values, expected)


def test_separate_critic_and_its_networks() -> None:
    model = models.ActorCritic(tiny.policy(), tiny.classifier())
    (batch,) = micro_batches(episodes(), [0], pad_token_id=0)
    assert model.networks == ("actor", "critic")
    actor, critic = model(batch, 1.0, "actor"), model(batch, 1.0, "critic")
    assert actor.values is None and critic.logprobs is None
    both = model(batch, 1.0)
    torch.testing.assert_close(both.values, critic.values)
    torch.testing.assert_close(both.logprobs, actor.logprobs)
    assert models.ActorCritic(tiny.policy()).networks == ("both",)


def test_bad_critics_are_named() -> None:
    with pytest.raises(ValueError, match=r"`score` must give 1 number per token \(num_labels=1\), got 3"):
        models.ActorCritic(tiny.policy(), tiny.classifier(num_labels=3))
    with pytest.raises(TypeError, match="expected a model with a `score` layer"):
        models.ActorCritic(tiny.policy(), tiny.policy())
    policy = tiny.policy()
    object.__setattr__(policy.config, "hidden_size", None)
    with pytest.raises(ValueError, match="has no room for a value head"):
        models.ActorCritic(policy)


def test_dropout_is_off_everywhere() -> None:
    policy = tiny.policy("gpt2").train()
    (batch,) = micro_batches(episodes(), [0], pad_token_id=0)
    models.disable_dropout(policy)
    first, second = (models.token_logprobs(policy, batch, 1.0)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_to_bfloat16_keeps_rotary_frequencies_and_value_heads() -> None:
    critic = tiny.classifier()
    residuals = models.to_bfloat16(critic)
    assert critic.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16
    assert critic.score.weight.dtype is torch.float32 and critic.score.weight not in residuals
    assert critic.model.rotary_emb.inv_freq.dtype is torch.float32


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])  # gpt2's weights are tied as well
def test_a_visiting_model_comes_back_untouched(architecture: str) -> None:
    # The device is "meta", the only other one that every machine has: it shows what lies where, but computes nothing.
    model = models.frozen_copy(tiny.policy(architecture))

    def tensors() -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]

    before, count = tensors(), len(tensors())
    with models.visiting(model, "meta") as visitor:
        assert visitor is model and {x.device.type for x in tensors()} == {"meta"}
        assert len(tensors()) == count  # what was tied is tied there: one copy
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert not any(p.requires_grad for p in model.parameters())
        assert model(input_ids=torch.tensor([[1, 2]], device="meta")).logits.device.type == "meta"
    assert all(x is y for x, y in zip(tensors(), before, strict=True))
    with pytest.raises(RuntimeError, match="out of memory"), models.visiting(model, "meta"):
        raise RuntimeError("out of memory")
    assert all(x is y for x, y in zip(tensors(), before, strict=True))
    with models.visiting(model, "cpu"):  # at home already: nothing is copied
        assert [x.data_ptr() for x in tensors()] == [x.data_ptr() for x in before]


def test_lora_reference_is_the_policy_without_its_adapter() -> None:
    import peft

    base, rollout = tiny.policy(), episodes()
    (batch,) = micro_batches(rollout, [0], pad_token_id=0)
    expected = models.token_logprobs(base, batch, 1.0)[0].detach()
    policy = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert not torch.allclose(models.token_logprobs(policy, batch, 1.0)[0], expected, atol=1e-3)
    with models.adapters_off(policy, None) as reference:
        torch.testing.assert_close(models.token_logprobs(reference, batch, 1.0)[0], expected)
    policy.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True))
    with models.adapters_off(policy, "second") as reference:
        torch.testing.assert_close(models.token_logprobs(reference, batch, 1.0)[0], expected)
    assert policy.active_adapter == "default"


def actor_critic(kind: str) -> models.ActorCritic:
    import peft

    config = {"r": 4, "init_lora_weights": False}
    policy, value_model = tiny.policy(), None
    if kind in ("shared trunk, LoRA", "critic's adapter"):
        policy = peft.get_peft_model(policy, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    if kind == "critic's adapter":
        models.add_critic_adapter(policy, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    if kind in ("separate critic", "separate critic, LoRA"):
        value_model = tiny.classifier()
    if kind == "separate critic, LoRA":
        value_model = peft.get_peft_model(value_model, peft.LoraConfig(task_type="SEQ_CLS", **config))
    model = models.ActorCritic(policy, value_model)
    if model.value_head is not None:  # at 0 it would hide a gradient
        torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["shared trunk", "shared trunk, LoRA", "critic's adapter", "separate critic", "separate critic, LoRA"],
)
def test_recomputed_activations_give_the_same_gradients(kind: str, padding_free: bool) -> None:
    gradients, saved = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = actor_critic(kind).train()
        if recompute:
            for module in (model.policy, model.value_model):
                if module is not None:
                    models.recompute_activations(module)
        elements = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal elements
            elements += x.numel() if x.grad_fn is not None else 0
            return x

        for network in model.networks:
            for batch in micro_batches(
                episodes(), range(len(LENGTHS)), pad_token_id=0, max_rows=2, padding_free=padding_free
            ):
                with model.running(network, batch.packing):
                    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                        out = model(batch, 0.7, network)
                    sum(x.square().sum() for x in out if x is not None).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        saved.append(elements)
    assert saved[1] < saved[0] / 3  # it does recompute
    for name, expected in gradients[0].items():
        assert expected is not None and expected.any(), name
        assert torch.equal(gradients[1][name], expected), name


def test_micro_batch_is_right_padded() -> None:
    batch = next(iter(micro_batches(episodes(), [0, 2], pad_token_id=99)))
    assert isinstance(batch, MicroBatch)
    assert batch.input_ids.shape == (2, 7)
    assert batch.input_ids[1, 6] == 99
