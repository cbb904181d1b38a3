"""Every op that has CUDA kernels, at sizes of language-model training: what `bench.predict` and `bench.gpu` go through.

A case makes its arguments on any device and in any shape, so the same function runs at full size on a GPU, at a tiny
one in the tests, and as a plan of launches on the emulator. `tests/cuda` demands a case for every op with kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastppo import ops, reference

F32, BF16 = torch.float32, torch.bfloat16
Function = Callable[..., Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where arguments come from: a device, at random; or memory as it is, for a plan that nobody computes."""

    device: str = "cpu"
    untouched: bool = False

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x if self.untouched else x.normal_(std=scale)

    def logprobs(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        x = self.normal(*shape, dtype=dtype)
        return x if self.untouched else x.abs_().neg_()

    def ids(self, n: int, v: int) -> Tensor:
        return torch.randint(v, (n,), device=self.device)

    def mask(self, b: int, t: int) -> Tensor:
        """Responses of 1 to T tokens."""
        return torch.arange(t, device=self.device) < torch.randint(1, t + 1, (b, 1), device=self.device)


Inputs = Callable[[Source, Shape, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """An op in one shape.

    Attributes:
        op: row of the table.
        kernels: the ops of the dispatcher that it calls.
        shape: the one that is measured; (rows, vocabulary), (responses, tokens), ...
        tiny: one for tests, which takes the same launches and every kind of row.
        dtype: of logits, or of what stands for them.
        inputs: (source, shape, dtype) -> arguments.
        ours: the op.
        eager: the same in plain torch, also what goes through torch.compile.
        moved: (shape, bytes of the dtype) -> bytes that must be read and written; 0 where arithmetic is the bound.
        peers: by name, a function that imports a peer's form; ImportError where it is not installed.
        in_place: arguments that the op writes, by position: a repeat needs fresh ones.
    """

    op: str
    kernels: tuple[str, ...]
    shape: Shape
    tiny: Shape
    dtype: torch.dtype
    inputs: Inputs
    ours: Function
    eager: Function
    moved: Callable[[Shape, int], int]
    peers: dict[str, Callable[[], Function]] = field(default_factory=dict)
    in_place: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} [{', '.join(map(str, self.shape))}] {dtype}"

    def bytes_moved(self, shape: Shape | None = None) -> int:
        return self.moved(shape or self.shape, self.dtype.itemsize)

    def arguments(self, source: Source, tiny: bool = False) -> tuple[Any, ...]:
        torch.manual_seed(0)
        return self.inputs(source, self.tiny if tiny else self.shape, self.dtype)

    def has_kernels(self, key: str = "CUDA") -> bool:
        """Whether the library has CUDA kernels for it: they come concept by concept."""
        return all(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"fastppo::{op}", key) for op in self.kernels
        )


def with_gradients(function: Function, *places: int) -> Function:
    """`function` and the gradients, of the sum of what it returns, for the arguments at those places."""

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        outputs = function(*args, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        used = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        return torch.autograd.grad(used, [args[i] for i in places], [torch.ones_like(x) for x in used])

    return run


# --- logits -----------------------------------------------------------------------------------------------------------


def logits_and_ids(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, v = shape
    return source.normal(n, v, dtype=dtype), source.ids(n, v)


def differentiable(inputs: Inputs, *places: int) -> Inputs:
    def run(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
        arguments = inputs(source, shape, dtype)
        for i in places:
            arguments[i].requires_grad_()
        return arguments

    return run


def eager_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a trainer writes in plain torch."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(-1, ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def trl_logprobs() -> Function:
    """TRL's Triton kernel for log-prob and entropy (trl 1.16)."""
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def liger_logprobs() -> Function:
    """Liger's cross-entropy, which is minus the log-prob; no entropy."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, ids: -liger_cross_entropy(logits, ids, reduction="none")


def sample_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    b, v = shape
    return source.normal(b, v, dtype=dtype, scale=3), torch.arange(b, device=source.device)


def sample(top_p: float) -> Function:
    return lambda logits, counters: ops.sample(
        logits, temperature=0.7, top_p=top_p, seed=1, counters=counters
    )


def eager_sample(top_p: float) -> Function:
    def run(logits: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
        """Temperature, nucleus, multinomial, both log-probs, entropy: a sampling loop in plain torch."""
        logits = logits.float() / 0.7
        logprobs = logits.log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        if top_p < 1:
            ascending, order = logits.sort(-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
        probabilities = logits.softmax(-1)
        # An exponential race, not torch.multinomial: the same draw, and it neither waits for the host nor asks for
        # fewer than 2^24 categories.
        ids = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        drawn_from = logits.log_softmax(-1)
        return ids[:, 0], logprobs.gather(-1, ids)[:, 0], drawn_from.gather(-1, ids)[:, 0], entropy

    return run


def two_logits(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return source.normal(*shape, dtype=dtype), source.normal(*shape, dtype=dtype)


def eager_distribution_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logprobs, ref_logprobs = (x.float().log_softmax(-1) for x in (logits, ref_logits))
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


def head_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    n, h, v = shape
    return source.normal(n, h, dtype=dtype), source.normal(v, h, dtype=dtype, scale=h**-0.5), source.ids(n, v)


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return eager_logprobs(hidden @ weight.T, ids)


def liger_linear_logprobs() -> Function:
    """Liger's fused linear cross-entropy: minus the log-prob; no entropy. It makes its gradients on the way."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, ids: (
        -liger_fused_linear_cross_entropy(hidden, weight, ids, reduction="none")
    )


def trl_linear_logprobs() -> Function:
    """TRL's chunked log-probs with a Triton kernel (trl 1.16), with the chunk that its trainers use."""
    from trl.kernels import ChunkedLogProbFunction

    return lambda hidden, weight, ids: ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",)
    )[:2]


# --- tokens -----------------------------------------------------------------------------------------------------------


def gae_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return source.normal(*shape, dtype=dtype), source.normal(*shape, dtype=dtype), source.mask(*shape)


def whiten_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return source.normal(*shape, dtype=dtype), source.mask(*shape)


def rewards_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logprobs, ref_logprobs = source.logprobs(*shape, dtype=dtype), source.logprobs(*shape, dtype=dtype)
    return (
        source.normal(shape[0]),
        logprobs,
        ref_logprobs,
        source.normal(*shape, dtype=dtype),
        source.mask(*shape),
    )


def kl_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return source.logprobs(*shape, dtype=dtype), source.logprobs(*shape, dtype=dtype)


def k3(function: Function) -> Function:
    return lambda logprobs, ref_logprobs: function(logprobs, ref_logprobs, estimator="k3")


def loss_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logprobs, values = source.logprobs(*shape, dtype=dtype), source.normal(*shape, dtype=dtype)
    new_logprobs = logprobs + source.normal(*shape, dtype=dtype, scale=0.1)
    new_values = values + source.normal(*shape, dtype=dtype, scale=0.1)
    advantages, returns = source.normal(*shape, dtype=dtype), source.normal(*shape, dtype=dtype)
    return new_logprobs, new_values, logprobs, advantages, values, returns, source.mask(*shape)


def ppo_loss(function: Function) -> Function:
    return lambda new_logprobs, new_values, logprobs, advantages, values, returns, mask: function(
        new_logprobs, logprobs, advantages, mask, new_values=new_values, values=values, returns=returns
    )[0]


def from_logits_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One packed batch, in which all tokens count; the row of one that does not is only written."""
    n, v = shape
    logits, ids = logits_and_ids(source, shape, dtype)
    logprobs = source.normal(n) - math.log(v)  # of what the logits above are likely to give
    return logits, ids, logprobs, source.normal(n), torch.ones(n, dtype=torch.bool, device=source.device)


def loss_from_logits(function: Function) -> Function:
    return lambda *tensors: function(*tensors, normalizer=float(tensors[1].numel()))[0]


def adamw_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    param, grad, exp_avg, exp_avg_sq = (source.normal(*shape, dtype=dtype, scale=0.1) for _ in range(4))
    residual = torch.empty(shape, dtype=torch.int16, device=source.device)
    return param, residual if source.untouched else residual.zero_(), grad, exp_avg, exp_avg_sq.square_()


def adamw(function: Function) -> Function:
    settings = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "step": 7}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        function(*tensors, **settings)
        return tensors[:2] + tensors[3:]

    return run


# Of a model with grouped queries: 32 query heads on 8 key heads of 128.
HEADS, KEY_HEADS, WIDTH = 32, 8, 128


def decode_inputs(source: Source, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, tokens = shape
    query = source.normal(rows, HEADS, WIDTH, dtype=dtype)
    key, value = (source.normal(rows, KEY_HEADS, WIDTH, dtype=dtype) for _ in range(2))
    caches = (source.normal(rows, KEY_HEADS, tokens, WIDTH, dtype=dtype) for _ in range(2))
    slots = torch.arange(rows, device=source.device)
    return query, key, value, *caches, slots, torch.full_like(slots, tokens - 1)


def decode_attention(function: Function) -> Function:
    return lambda *tensors: function(*tensors, scale=WIDTH**-0.5)


def eager_decode_attention(*tensors: Tensor) -> Tensor:
    """Rows of one length, as `scaled_dot_product_attention` takes them."""
    query, key, value, key_cache, value_cache, slots, lengths = tensors
    key_cache[slots, :, lengths] = key
    value_cache[slots, :, lengths] = value
    out = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], key_cache, value_cache, enable_gqa=True
    )
    return out[:, :, 0]


# --- the list ---------------------------------------------------------------------------------------------------------

V = 151936  # Qwen
ROWS, RESPONSES = (8192, V), (512, 4096)


def read(shape: Shape, size: int) -> int:
    return shape[0] * shape[1] * size


def times(bytes_per_token: int) -> Callable[[Shape, int], int]:
    return lambda shape, size: shape[0] * shape[1] * bytes_per_token


def cases() -> list[Case]:
    """Return all cases; of ops without kernels, too (`Case.has_kernels`)."""
    found = []
    for shape, top_p in [((8, V), 1.0), ((256, V), 1.0), ((256, V), 0.9)]:
        found.append(
            Case(
                "sample" if top_p == 1 else f"sample top_p={top_p}",
                ("sample",),
                shape,
                (3, 1003),
                BF16,
                sample_inputs,
                sample(top_p),
                eager_sample(top_p),
                read,
            )
        )
    for shape, dtype in [(ROWS, BF16), (ROWS, F32), ((8, V), BF16)]:
        found.append(
            Case(
                "logprobs",
                ("logprobs",),
                shape,
                (5, 1003),
                dtype,
                logits_and_ids,
                ops.logprobs,
                eager_logprobs,
                read,
                {"TRL": trl_logprobs, "Liger": liger_logprobs},
            )
        )
    found += [
        Case(
            "logprobs forward + backward",
            ("logprobs", "logprobs_backward"),
            ROWS,
            (5, 1003),
            BF16,
            differentiable(logits_and_ids, 0),
            with_gradients(ops.logprobs, 0),
            with_gradients(eager_logprobs, 0),
            lambda shape, size: 3 * read(shape, size),
            {"TRL": lambda: with_gradients(trl_logprobs(), 0)},
        ),
        Case(
            "distribution_kl",
            ("distribution_kl",),
            ROWS,
            (5, 1003),
            BF16,
            two_logits,
            ops.distribution_kl,
            eager_distribution_kl,
            lambda shape, size: 2 * read(shape, size),
        ),
        Case(
            "distribution_kl forward + backward",
            ("distribution_kl", "distribution_kl_backward"),
            ROWS,
            (5, 1003),
            BF16,
            differentiable(two_logits, 0),
            with_gradients(ops.distribution_kl, 0),
            with_gradients(eager_distribution_kl, 0),
            lambda shape, size: 5 * read(shape, size),
        ),
        Case(
            "linear_logprobs",
            ("linear_logprobs",),
            (4096, 2048, V),
            (5, 16, 1003),
            BF16,
            head_inputs,
            ops.linear_logprobs,
            eager_linear_logprobs,
            lambda shape, size: 0,
            {"TRL": trl_linear_logprobs, "Liger": liger_linear_logprobs},
        ),
        Case(
            "linear_logprobs forward + backward",
            ("linear_logprobs", "linear_logprobs_backward"),
            (4096, 2048, V),
            (5, 16, 1003),
            BF16,
            differentiable(head_inputs, 0, 1),
            with_gradients(ops.linear_logprobs, 0, 1),
            with_gradients(eager_linear_logprobs, 0, 1),
            lambda shape, size: 0,
            {
                "TRL": lambda: with_gradients(trl_linear_logprobs(), 0, 1),
                "Liger": lambda: with_gradients(liger_linear_logprobs(), 0, 1),
            },
        ),
        Case(
            "ppo_loss_from_logits with gradients",
            ("ppo_loss_from_logits", "scale_"),
            ROWS,
            (5, 1003),
            BF16,
            differentiable(from_logits_inputs, 0),
            with_gradients(loss_from_logits(ops.ppo_loss_from_logits), 0),
            with_gradients(loss_from_logits(reference.ppo_loss_from_logits), 0),
            lambda shape, size: 2 * read(shape, size),
        ),
        Case(
            "kl_penalty",
            ("kl_penalty",),
            RESPONSES,
            (5, 300),
            F32,
            kl_inputs,
            k3(ops.kl_penalty),
            k3(reference.kl_penalty),
            times(12),
        ),
        Case(
            "kl_penalty forward + backward",
            ("kl_penalty", "kl_penalty_backward"),
            RESPONSES,
            (5, 300),
            F32,
            differentiable(kl_inputs, 0),
            with_gradients(k3(ops.kl_penalty), 0),
            with_gradients(k3(reference.kl_penalty), 0),
            times(12 + 16),
        ),
        Case(
            "whiten",
            ("whiten", "scale_to_unit_std"),
            RESPONSES,
            (64, 300),
            F32,
            whiten_inputs,
            ops.whiten,
            reference.whiten,
            times(5 + 9),
        ),
    ]
    for shape in [(64, 256), RESPONSES]:
        found += [
            Case("gae", ("gae",), shape, (5, 300), F32, gae_inputs, ops.gae, reference.gae, times(17)),
            Case(
                "rewards_and_advantages",
                ("rewards_and_advantages",),
                shape,
                (64, 300),
                F32,
                rewards_inputs,
                ops.rewards_and_advantages,
                reference.rewards_and_advantages,
                times(13 + 16 + 9),  # whitening reads and writes the advantages once more
            ),
            Case(
                "ppo_loss with gradients",
                ("ppo_loss",),
                shape,
                (5, 300),
                F32,
                differentiable(loss_inputs, 0, 1),
                with_gradients(ppo_loss(ops.ppo_loss), 0, 1),
                with_gradients(ppo_loss(reference.ppo_loss), 0, 1),
                times(33),
            ),
        ]
    found.append(
        Case(
            "decode_attention",
            ("decode_attention",),
            (64, 4096),
            (3, 40),
            BF16,
            decode_inputs,
            decode_attention(ops.decode_attention),
            eager_decode_attention,
            lambda shape, size: shape[0] * shape[1] * 2 * KEY_HEADS * WIDTH * size,
        )
    )
    found.append(
        Case(
            "adamw_step_",
            ("adamw_step_",),
            (4096, 16384),
            (5, 1003),
            BF16,
            adamw_inputs,
            adamw(ops.adamw_step_),
            adamw(reference.adamw_step_),
            times(10 + 8),
            in_place=(0, 1, 3, 4),
        )
    )
    return found
