"""The floor of an iteration: the bare matrix products that it cannot do without, timed alone.

Counted are the products with the weights, on tokens without padding, what all prompts begin with once in each pass:
  rollout  prefill, then a step per token for the rows that have not ended
  score    a forward of policy, reference and reward model, and of a critic of its own; the LM head of policy and
           reference on the response tokens
  update   per epoch, forward and backward (two products for each of the forward) of policy and a critic of its own,
           and of the policy's LM head on the response tokens
Products of attention are left out (5 % of the trunk's at 280 tokens, for SmolLM2-135M), so the floor is low rather than
high. Where the scoring's forward of policy and critic is reused, the first epoch has none.

The products are timed in bfloat16 (float32 where the processor does not multiply it) at the model's own shapes, with as
many rows as one epoch has (at most 1024), through all layers one after the other, so that weights come from where they
come from in an iteration. A step of the rollout is timed for several numbers of rows, in bfloat16 on weights as oneDNN
lays them out, as in the rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROWS, MOST_HEAD_ROWS, ROUNDS = 1024, 512, 3


@dataclass(frozen=True)
class Products:
    """Seconds of bare products per token, and per step of the rollout by the number of rows."""

    trunk_forward: float
    trunk_backward: float
    head_forward: float
    head_backward: float
    steps: dict[int, float]
    dtype: str
    tflops: float  # of the trunk's forward


def floor(
    products: Products,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    shared: bool,
    epochs: int,
    reused: bool = False,
) -> dict[str, float]:
    """Least seconds of each room, and `total`, for responses of `lengths` tokens to `prompts`.

    `reused`: the first epoch goes backward through the scoring's forward.
    """
    import numpy as np

    p = products
    prefill = sum(map(len, prompts)) - (len(prompts) - 1) * common_start(prompts)
    responses = sum(lengths)
    tokens = prefill + responses
    steps = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    networks, forwards = 1 if shared else 2, epochs - reused
    rooms = {
        "rollout": prefill * p.trunk_forward
        + len(prompts) * p.head_forward
        + float(np.interp(steps, list(p.steps), list(p.steps.values())).sum()),
        "score": (networks + 2) * tokens * p.trunk_forward + 2 * responses * p.head_forward,
        "update": networks * tokens * (forwards * p.trunk_forward + epochs * p.trunk_backward)
        + responses * (forwards * p.head_forward + epochs * p.head_backward),
    }
    return {**rooms, "total": sum(rooms.values())}


def common_start(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with alike."""
    return next((i for i, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1), min(map(len, prompts)))  # noqa: B905


def measure(
    model: str, prompts: Sequence[list[int]], lengths: Sequence[Sequence[int]], device: str = "cpu"
) -> Products:
    """Time the products of the model in folder `model` for these prompts and responses of some iterations."""
    import torch
    from torch import nn

    from fastppo.config import multiplies_bfloat16
    from fastppo.prepack import prepacked

    dtype = torch.bfloat16 if multiplies_bfloat16(use_cpu=device == "cpu") else torch.float32
    responses = sum(map(sum, lengths)) // len(lengths)
    rows = min(MOST_ROWS, sum(map(len, prompts)) + responses)
    head_rows = min(MOST_HEAD_ROWS, responses)
    shapes, head_shape = weight_shapes(model)

    def bare(shape: tuple[int, int]) -> Any:
        layer: Any = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias=False, dtype=dtype, device=device)
        nn.init.normal_(layer.weight, std=0.02)  # a GPU multiplies constants faster
        return layer

    trunk: Any = nn.ModuleList(map(bare, shapes))
    head: Any = nn.ModuleList([bare(head_shape)])
    size = max(max(shape) for shape in [*shapes, head_shape])
    values = torch.randn(max(rows, head_rows) * size, dtype=dtype, device=device)

    def some(n: int, width: int) -> Any:
        return values[: n * width].view(n, width)

    def forward(layers: Any, n: int) -> None:
        for layer in layers:
            layer(some(n, layer.in_features))

    def backward(layers: Any, n: int) -> None:
        for layer in layers:
            gradient = some(n, layer.out_features)
            gradient @ layer.weight
            gradient.T @ some(n, layer.in_features)

    def step(n: int) -> None:
        forward(trunk, n)
        forward(head, n)

    slots, steps = len(prompts), {}
    with torch.no_grad():
        trunk_forward = fastest(lambda: forward(trunk, rows))
        trunk_backward = fastest(lambda: backward(trunk, rows))
        head_forward = fastest(lambda: forward(head, head_rows))
        head_backward = fastest(lambda: backward(head, head_rows))
    for n in sorted({1, max(1, slots // 4), max(1, slots // 2), slots}):
        with prepacked(trunk, n), prepacked(head, n), torch.no_grad():
            steps[n] = fastest(lambda n=n: step(n))  # type: ignore[misc]
    flops = 2 * rows * sum(a * b for a, b in shapes)
    return Products(
        trunk_forward / rows,
        trunk_backward / rows,
        head_forward / head_rows,
        head_backward / head_rows,
        steps,
        str(dtype).removeprefix("torch."),
        flops / trunk_forward / 1e12,
    )


def weight_shapes(model: str) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(out, in) of every linear layer of the trunk, in order, and of the LM head. No weight is read."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    trunk = [m for m in causal_lm.get_decoder().modules() if isinstance(m, nn.Linear)]
    head = causal_lm.get_output_embeddings()
    return [(m.out_features, m.in_features) for m in trunk], (head.out_features, head.in_features)


def fastest(function: Callable[[], None]) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    import torch

    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
