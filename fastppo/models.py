"""Policy, critic and reference, from any `AutoModelForCausalLM`.

A forward pass runs the trunk over whole sequences and the LM head on response tokens alone, through
`ops.linear_logprobs`, so that no `[B, T, V]` or `[N, V]` tensor exists.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .attention import packed_attention, why_not_packed
from .batch import MicroBatch
from .packing import Packing


class Evaluation(NamedTuple):
    """What policy and critic say of the N counted tokens of a micro-batch; each (N,) float32, or None if not asked.

    `logprobs` and `entropy` are in nats, `values` in units of reward.
    """

    logprobs: Tensor | None
    entropy: Tensor | None
    values: Tensor | None


class Scored(NamedTuple):
    """A micro-batch, and what each network says of it, with the graph that its backward needs."""

    batch: MicroBatch
    by_network: dict[str, Evaluation]


@dataclass(frozen=True)
class LMHead:
    """The last layer of a language model: logits = softcap * tanh(logit_scale * (h Wᵀ + b) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 logits of a few (n, H) hidden states, before any temperature."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def unwrap_peft(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper, adapters included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_peft(model: nn.Module | None) -> bool:
    """Is this a PEFT wrapper?"""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model (of a multi-modal model: of its text part)."""
    config = unwrap_peft(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def lm_head(model: nn.Module) -> LMHead:
    """The LM head of a causal language model.

    Raises:
        TypeError: the output layer is not one matrix (a LoRA adapter on `lm_head`, say).
    """
    causal_lm = unwrap_peft(model)
    layer = causal_lm.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{type(causal_lm).__name__}: the output embedding must be a torch.nn.Linear, got {type(layer).__name__}; "
            "leave lm_head out of an adapter's target_modules"
        )
    config = text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies the logits
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides them
    return LMHead(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None), scale)


def causal_trunk(model: nn.Module) -> nn.Module:
    """The trunk of a causal language model: everything below its LM head."""
    return unwrap_peft(model).get_decoder()


def hidden_states(trunk: nn.Module, input_ids: Tensor, packing: Packing | None = None) -> Tensor:
    """Last hidden states, after the final norm: (b, L, H). Sequences are right-padded, so causal attention needs
    neither a mask nor shifted positions; or they are packed, and the packing says both.
    """
    with packed_attention(trunk, packing):
        positions = {} if packing is None else {"position_ids": packing.position_ids}
        return trunk(input_ids=input_ids, use_cache=False, **positions).last_hidden_state


def states_at_predictors(trunk: nn.Module, batch: MicroBatch) -> Tensor:
    """Last hidden states of the places that predict the counted tokens: (N, H)."""
    return (
        hidden_states(trunk, batch.input_ids, batch.packing).flatten(0, 1).index_select(0, batch.predictors)
    )


def predicting_states(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Those of a causal language model's trunk."""
    return states_at_predictors(causal_trunk(model), batch)


def token_logprobs(model: nn.Module, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the counted tokens: two (N,) float32 tensors, in nats."""
    return head_logprobs(model, predicting_states(model, batch), batch.target_ids, temperature)


def head_logprobs(model: nn.Module, hidden: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of `ids` from the hidden states that predict them, by the model's own head."""
    head = lm_head(model)
    return ops.linear_logprobs(
        hidden,
        head.weight,
        ids,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


# Rows of logits that `full_kl` holds of each model at a time: 78 MB in float32 at a vocabulary of 151936.
_KL_ROWS = 128


@torch.no_grad()
def full_kl(
    policy: LMHead, hidden: Tensor, reference: LMHead, ref_hidden: Tensor, temperature: float
) -> Tensor:
    """KL(policy ‖ reference) over the whole vocabulary at each of N places, from both models' hidden states.

    The logits exist for a few rows at a time; [N, V] never does.

    Args:
        policy: its head.
        hidden: (N, H), its hidden states.
        reference: its head.
        ref_hidden: (N, H'), its hidden states at the same places.
        temperature: divides both logits.

    Returns:
        (N,) float32, in nats, never below 0.
    """
    kl = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for begin in range(0, len(hidden), _KL_ROWS):
        rows = slice(begin, begin + _KL_ROWS)
        kl[rows] = ops.distribution_kl(
            policy.logits(hidden[rows]), reference.logits(ref_hidden[rows]), temperature=temperature
        )
    return kl


# The critic's adapter on the policy's base weights. PEFT saves it in a folder of its name, `checkpoint.CRITIC`.
CRITIC_ADAPTER = "critic"


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one wrapper (DDP, FSDP) and one optimizer serve both.

    Args:
        policy: causal language model, or a PEFT model around one.
        value_model: a sequence classifier with a one-number `score` layer (its trunk may differ from the policy's but
            must share the tokenizer). None puts a value head, a zero-initialised float32 linear layer, on the
            policy's own trunk: half the memory and nearly half the time. Where the policy has an adapter "critic",
            that head is on the base weights with this adapter: one base, two networks that share no trainable weight.

    Raises:
        TypeError, ValueError: the models cannot be used so; the message says why.
    """

    value_head: nn.Linear | None

    def __init__(self, policy: nn.Module, value_model: nn.Module | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.has_critic_adapter = value_model is None and CRITIC_ADAPTER in getattr(policy, "peft_config", {})
        self.config = unwrap_peft(policy).config
        if value_model is None:
            size = getattr(text_config(policy), "hidden_size", None)
            if not isinstance(size, int):
                raise ValueError(
                    f"{type(unwrap_peft(policy)).__name__} has no room for a value head: its config must have an "
                    f"integer hidden_size, got {size!r}; pass a value_model"
                )
            head = nn.Linear(size, 1, device=lm_head(policy).weight.device, dtype=torch.float32)
            # A critic that starts at 0 makes the first advantages the returns themselves: no noise of its own.
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.value_head = head
        else:
            self.value_head = None
            score_layer(value_model)

    @property
    def networks(self) -> tuple[str, ...]:
        """What can be run and trained on its own: ("actor", "critic"), or ("both",) on a shared trunk."""
        return ("both",) if self.value_head_reads_policy else ("actor", "critic")

    def by_network(self, evaluation: Evaluation) -> dict[str, Evaluation]:
        """An evaluation by all networks as `forward` gives it for each of `networks`."""
        if self.value_head_reads_policy:
            return {"both": evaluation}
        return {
            "actor": evaluation._replace(values=None),
            "critic": Evaluation(None, None, evaluation.values),
        }

    @property
    def value_head_reads_policy(self) -> bool:
        """Are the values read off the policy's own hidden states?"""
        return self.value_model is None and not self.has_critic_adapter

    @property
    def trunks(self) -> list[nn.Module]:
        """Of the policy, and of a critic that has one of its own."""
        own = [] if self.value_model is None else [classifier_trunk(self.value_model)]
        return [causal_trunk(self.policy), *own]

    @contextmanager
    def running(self, network: str, packing: Packing | None = None) -> Iterator[None]:
        """Within the block `network` ("actor", "critic", "both") is run forward and backward.

        In the backward too, where activations may be computed again, a critic that is an adapter must be the active
        one, and the attention that of the packing.
        """
        trunk = self.trunks[-1] if network == "critic" else self.trunks[0]
        adapter = (
            adapter_in_use(self.policy, CRITIC_ADAPTER)
            if network == "critic" and self.has_critic_adapter
            else nullcontext()
        )
        with adapter, packed_attention(trunk, packing):
            yield

    def forward(self, batch: MicroBatch, temperature: float, network: str = "both") -> Evaluation:
        """Evaluate a micro-batch with "both" networks, the "actor", or the "critic" alone.

        The critic alone has no gradient in a trunk that it shares with the policy: only the value head learns.
        """
        logprobs = entropy = values = hidden = None
        if network != "critic":
            hidden = predicting_states(self.policy, batch)
            logprobs, entropy = head_logprobs(self.policy, hidden, batch.target_ids, temperature)
        if network != "actor":
            values = self.values(batch, hidden)
        return Evaluation(logprobs, entropy, values)

    def values(self, batch: MicroBatch, hidden: Tensor | None = None) -> Tensor:
        """(N,) float32 values; `hidden` are the policy's predicting states, where they are at hand."""
        if self.value_model is not None:
            head = score_layer(self.value_model)
            hidden = states_at_predictors(classifier_trunk(self.value_model), batch)
        else:
            assert self.value_head is not None
            head = self.value_head
            if self.has_critic_adapter:
                with self.running("critic"):
                    hidden = predicting_states(self.policy, batch)
            elif hidden is None:
                with torch.no_grad():
                    hidden = predicting_states(self.policy, batch)
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def classifier_trunk(model: nn.Module) -> nn.Module:
    """The trunk of a Hugging Face sequence classifier."""
    classifier = unwrap_peft(model)
    return getattr(classifier, classifier.base_model_prefix)


def score_layer(model: nn.Module) -> nn.Linear:
    """The layer of a decoder-type sequence classifier that turns a hidden state into one number.

    Raises:
        TypeError: the model has no such layer.
        ValueError: the layer gives several numbers.
    """
    classifier = unwrap_peft(model)
    layer: Any = getattr(classifier, "score", None)
    if hasattr(layer, "modules_to_save"):  # PEFT trains a copy of the layer
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if layer is None or not hasattr(layer, "weight"):
        raise TypeError(
            f"value_model: expected a model with a `score` layer (AutoModelForSequenceClassification with "
            f"num_labels=1 on a decoder), got {type(classifier).__name__}; or pass value_model=None for a value head "
            f"on the policy's trunk"
        )
    if layer.weight.shape[0] != 1:
        raise ValueError(
            f"value_model: `score` must give 1 number per token (num_labels=1), got {layer.weight.shape[0]}"
        )
    return layer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: PPO's ratio must be 1 before the first step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def check_can_be_saved(model: nn.Module) -> None:
    """Raise a ValueError, before hours of training, for a model that transformers will refuse to save."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not is_peft(model) and not quantizer.is_serializable():
        raise ValueError(
            f"model: {type(model).__name__} was loaded in a quantised format that cannot be saved again "
            f"({quantizer.quantization_config.quant_method}); copy its weights into "
            "AutoModelForCausalLM.from_config(config) without config.quantization_config, or train an adapter"
        )


def recompute_activations(model: Any, options: Any = None) -> None:
    """Turn on gradient checkpointing, under the name that this version of transformers has for it."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)(options or {"use_reentrant": False})


def to_bfloat16(model: nn.Module) -> dict[Tensor, Tensor]:
    """Cast a model's parameters to bfloat16, in place.

    Buffers keep their dtype (rotary frequencies lose too much in bfloat16), and so do PEFT's trainable adapters and
    heads of one output (`score`), which are small and sensitive.

    Returns:
        What the cast took off each weight, int16 (`ops.split_master`), for the optimizer that keeps their float32
        master: `AdamW.keep_residuals`.
    """
    adapted = is_peft(model)
    residuals: dict[Tensor, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32 or (adapted and parameter.requires_grad):
            continue
        if not name.endswith(("score.weight", "score.bias")):
            parameter.data, residuals[parameter] = ops.split_master(parameter.data)
    return residuals


@contextmanager
def visiting(model: nn.Module, device: torch.device | str) -> Iterator[nn.Module]:
    """Within the block a frozen model that lies in host memory runs on `device`.

    Its weights and buffers are copied there and the copies dropped at the end. Nothing is copied back: what the block
    writes to them is lost. Where the model lies on `device` already, nothing happens.
    """
    at_home: list[tuple[dict[str, Any], str, Tensor]] = []
    visitors: dict[Tensor, Tensor] = {}  # a tied weight travels once
    for module in model.modules():
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for tensors in tables:
            at_home += [(tensors, name, x) for name, x in tensors.items() if x is not None]
    try:
        for tensors, name, x in at_home:
            if x not in visitors:
                with torch.no_grad():
                    moved = x.to(device)
                plain = moved is not x and type(x) is nn.Parameter
                visitors[x] = nn.Parameter(moved, x.requires_grad) if plain else moved
            tensors[name] = visitors[x]
        yield model
    finally:
        for tensors, name, x in at_home:
            tensors[name] = x


def frozen_copy(policy: nn.Module) -> nn.Module:
    """A reference: the policy as it is now, without gradients."""
    reference = copy.deepcopy(policy)
    return reference.requires_grad_(False).eval()


@contextmanager
def adapters_off(policy: nn.Module, ref_adapter_name: str | None) -> Iterator[nn.Module]:
    """The PEFT policy as its own reference: adapters disabled, or the adapter `ref_adapter_name` in their place."""
    if ref_adapter_name is None:
        trained = [(p, p.requires_grad) for p in policy.parameters()]
        try:
            with policy.disable_adapter():  # type: ignore[operator]
                yield policy
        finally:
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
        return
    with adapter_in_use(policy, ref_adapter_name):
        yield policy


@contextmanager
def adapter_in_use(policy: Any, name: str) -> Iterator[None]:
    """Within the block the PEFT policy runs with the adapter `name`. What is trained stays so: PEFT would freeze every
    adapter but the active one, and the optimizer has several.
    """
    before = policy.active_adapter
    _switch_adapter(policy, name)
    try:
        yield
    finally:
        _switch_adapter(policy, before)


def _switch_adapter(policy: Any, name: str) -> None:
    if policy.active_adapter == name:
        return
    trained = [(p, p.requires_grad) for p in policy.parameters()]
    policy.set_adapter(name)
    for p, requires_grad in trained:
        p.requires_grad_(requires_grad)


def add_critic_adapter(policy: Any, peft_config: Any) -> None:
    """Put an adapter for the critic on the base weights of a PEFT policy, whose own stays active. Both are trained."""
    before = policy.active_adapter
    trained = [p for p in policy.parameters() if p.requires_grad]
    policy.add_adapter(CRITIC_ADAPTER, peft_config)
    policy.set_adapter(CRITIC_ADAPTER)
    trained += [p for p in policy.parameters() if p.requires_grad]
    policy.set_adapter(before)
    for p in trained:
        p.requires_grad_(True)


@torch.no_grad()
def check_head(policy: nn.Module) -> None:
    """Compare our way through trunk and head with the model's own logits on three tokens.

    Some architecture may do something to its logits that `lm_head` does not know of; better an error now than a
    policy trained on the wrong log-probs.

    Raises:
        NotImplementedError: the two disagree.
    """
    ids = torch.tensor([[1, 2, 3]], device=lm_head(policy).weight.device)
    batch = MicroBatch(
        input_ids=ids,
        predictors=torch.tensor([0, 1], device=ids.device),
        target_ids=ids[0, 1:],
        tokens=torch.arange(2, device=ids.device),
        counts=(2,),
    )
    expected = policy(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, [0, 1], ids[0, 1:]]
    got, _ = token_logprobs(policy, batch, 1.0)
    if not torch.allclose(got, expected, atol=0.05, rtol=0.05):
        raise NotImplementedError(
            f"{type(unwrap_peft(policy)).__name__}: log-probs through its trunk and LM head are {got.tolist()}, its "
            f"own logits give {expected.tolist()}; this architecture (or PEFT's prompt learning) is not supported"
        )


def why_not_padding_free(models: Iterable[nn.Module]) -> str | None:
    """Why one of these trunks cannot run over packed sequences, or None where all can."""
    return next((reason for reason in map(why_not_packed, models) if reason is not None), None)


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model can attend to, where its configuration says."""
    return getattr(text_config(model), "max_position_embeddings", None)


def accepts(model: nn.Module, argument: str) -> bool:
    """Does the model's forward take this argument?"""
    return argument in inspect.signature(unwrap_peft(model).forward).parameters
