"""How an op is measured: what a benchmark file says about it, and the checks before it is timed.

A benchmark is a pytest function that calls `measure` once::

    @sizes("n, v, dtype", quick(512, 49152, torch.float32), (512, 49152, torch.bfloat16))
    def bench_logprobs(measure, n, v, dtype):
        measure(
            "logprobs forward", f"[{n}, {v}]", dtype,
            inputs=lambda: (torch.randn(n, v).to(dtype), torch.randint(v, (n,))),
            ours=ops.logprobs,
            eager={"log_softmax": eager},
            compiled=eager,
            floors=READ,
        )

Every variant gets the same inputs; its result must agree with ours before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import extra_memory, result_bytes, tensors

Function = Callable[..., Any]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
MODES = ("default", "max-autotune")


def sizes(names: str, *cases: Any) -> pytest.MarkDecorator:
    """Arguments of a benchmark, one case per run; `quick` and `readme` choose some."""
    return pytest.mark.parametrize(names, cases)


def quick(*values: Any) -> Any:
    """A case of `make bench ARGS=--quick` and of the short table. The choice is in the id, so `-k quick` works."""
    return pytest.param(*values, id="-".join(["quick", *map(word, values)]))


def readme(*values: Any) -> Any:
    """A case of the short table."""
    return pytest.param(*values, id="-".join(["readme", *map(word, values)]))


def word(value: Any) -> str:
    """A value as part of an id."""
    return "+".join(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@dataclass
class Variant:
    """One form of the op: `kind` is its column, `name` says which one of that kind."""

    kind: str  # "ours", "eager", "compile", "peer" or "floor"
    name: str
    function: Function


@dataclass
class Case:
    """What one call of `measure` was given, with variants as a list."""

    op: str
    shape: str
    dtype: str
    hot: bool
    inputs: Callable[[], tuple[Any, ...]]
    variants: list[Variant]
    bytes_moved: int
    extra: dict[str, int]  # bytes beyond inputs and results, of the kinds it was measured for
    seconds: float | None
    min_rounds: int | None


def prepare(
    op: str,
    shape: str,
    dtype: torch.dtype,
    *,
    inputs: Callable[[], tuple[Any, ...]],
    ours: Function,
    eager: dict[str, Function] | None = None,
    compiled: Function | None = None,
    modes: Sequence[str] = MODES,
    peers: dict[str, Function] | None = None,
    floors: dict[str, Function] | None = None,
    hot: bool = False,
    bytes_moved: int = 0,
    memory: bool = False,
    agree: Callable[[str, Any, Any, tuple[Any, ...]], None] | None = None,
    tolerance: dict[str, float] | None = None,
    peers_agree_on: Callable[[], tuple[Any, ...]] | None = None,
    check: dict[str, Callable[[], Any]] | None = None,
    seconds: float | None = None,
    min_rounds: int | None = None,
) -> Case:
    """Check that all variants agree, measure memory, and return what is to be timed.

    Args:
        op: row of the table.
        shape: sizes of the inputs, as the table shows them.
        dtype: of the inputs.
        inputs: makes a new set of arguments; called often enough that cold ones are cold.
        ours: what is measured.
        eager: the same in plain torch, in every form that a good author might choose; the fastest counts.
        compiled: what goes through `torch.compile`, once per mode; its backward is compiled with it.
        modes: those modes.
        peers: other people's functions for the job; the fastest counts.
        floors: what cannot be avoided; the fastest counts.
        hot: keep one set of inputs in the cache, instead of rotating over sets that exceed it.
        bytes_moved: what the op has to read and write.
        memory: measure extra memory of ours, the first eager form and the first peer.
        agree: ``agree(name, result, ours, arguments)`` raises when a variant is wrong. Default: all tensors equal
            ours up to `tolerance`.
        tolerance: by name of the variant, where it computes with less precision than the dtype suggests; relative.
        peers_agree_on: makes arguments on which a peer does what we do, where it differs on others.
        check: by name of the variant, what to compare instead of its result, for variants that work in place.
        seconds: time to spend on each variant.
        min_rounds: rounds of each variant at least.
    """
    torch.compiler.reset()  # a function has room for 8 compilations
    torch.manual_seed(0)
    listed = [Variant("ours", "fastppo", ours)]
    listed += [Variant("eager", name, function) for name, function in (eager or {}).items()]
    if compiled is not None:
        listed += [Variant("compile", mode, with_compiled(compiled, mode)) for mode in modes]
    listed += [Variant("peer", name, function) for name, function in (peers or {}).items()]
    label = f"{op} {shape} {dtype}"
    compare = agree or Close(dtype, tolerance or {})
    arguments = inputs()
    extra: dict[str, int] = {}
    results: dict[str, Any] = {}
    for variant in listed if memory else []:
        if variant.kind in ("ours", "eager", "peer") and variant.kind not in extra:
            call = partial(variant.function, *arguments)
            # Of others, not what their first call leaves behind: it may have imported them.
            results[variant.name], extra[variant.kind] = extra_memory(call, count_kept=variant.kind == "ours")
    peer_arguments = peers_agree_on() if peers and peers_agree_on is not None else None
    expected = result_of(listed[0], arguments, results, check)
    expected_by_peers = expected if peer_arguments is None else ours(*peer_arguments)
    for variant in listed:
        if variant.kind == "peer" and peer_arguments is not None:
            result, wanted, given = variant.function(*peer_arguments), expected_by_peers, peer_arguments
        else:
            result, wanted, given = result_of(variant, arguments, results, check), expected, arguments
        try:
            compare(variant.name, result, wanted, given)
        except AssertionError as error:
            raise AssertionError(
                f"{label}: {variant.kind} {variant.name} disagrees with ours: {error}"
            ) from None
    listed += [Variant("floor", name, function) for name, function in (floors or {}).items()]
    for variant in listed:
        if variant.kind == "floor":
            variant.function(*arguments)
    name = str(dtype).removeprefix("torch.")
    bytes_moved = bytes_moved or result_bytes(arguments)
    return Case(op, shape, name, hot, inputs, listed, bytes_moved, extra, seconds, min_rounds)


def result_of(
    variant: Variant,
    arguments: tuple[Any, ...],
    results: dict[str, Any],
    check: dict[str, Callable[[], Any]] | None,
) -> Any:
    """What is compared: of a variant that works in place its check, else its result, which may be there already."""
    if check is not None:
        return check[variant.name]()
    return results.pop(variant.name) if variant.name in results else variant.function(*arguments)


class Close:
    """All tensors agree, by largest and by mean error relative to the largest and mean magnitude of ours.

    The mean is for gradients of logits, where one large number per row would hide all others.
    """

    def __init__(self, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
        self.default, self.tolerance = TOLERANCE[dtype], tolerance

    def __call__(self, name: str, result: Any, ours: Any, arguments: tuple[Any, ...]) -> None:
        tolerance = self.tolerance.get(name, self.default)
        got, want = tensors(result), tensors(ours)
        assert len(got) == len(want), f"{len(got)} tensors, not {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert a.shape == b.shape, f"result {i} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
            if a.numel() == 0:
                continue
            a, b = a.detach(), b.detach()
            error, magnitude = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            worst, largest = 0.0, 0.0
            for x, y in zip(a.reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True):
                difference = (x.float() - y.float()).abs()
                error += difference.sum(dtype=torch.float64)
                magnitude += y.float().abs().sum(dtype=torch.float64)
                worst = max(worst, float(difference.max()))
                largest = max(largest, float(y.float().abs().max()))
            share = float(error / magnitude.clamp(min=1e-12))
            assert share <= tolerance and worst <= tolerance * largest + 1e-12, (
                f"result {i} is off by {share:.1e} in the mean and {worst / max(largest, 1e-12):.1e} at most, "
                f"tolerance {tolerance:.0e}"
            )


class with_backward:  # noqa: N801  reads like the function that it makes
    """`function` and its gradients for the arguments at `places`, from fixed gradients of all it returns.

    A call returns (outputs, gradients); the gradients are new tensors every time.
    """

    def __init__(self, function: Function, *places: int) -> None:
        self.function, self.places = function, places

    def __call__(self, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
        outputs = tensors(self.function(*args))
        incoming = [torch.full_like(x, 1 / (1 + i)) for i, x in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, [args[place] for place in self.places], incoming)
        return [x.detach() for x in outputs], list(gradients)

    def compiled(self, mode: str) -> with_backward:
        return with_backward(with_compiled(self.function, mode), *self.places)


def with_compiled(function: Function, mode: str) -> Function:
    """`function` under `torch.compile` for fixed shapes. One that computes gradients itself says what to compile."""
    if hasattr(function, "compiled"):
        compiled: Function = function.compiled(mode)
        return compiled
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


# Floors


def words(x: Tensor) -> Tensor:
    """The memory of `x` as float32, whatever it holds."""
    return x.detach().view(torch.float32)


READ: dict[str, Function] = {  # the fastest way in which torch reads the first argument
    "read (amax)": lambda x, *_: words(x).amax(-1),
    "read (sum)": lambda x, *_: words(x).sum(-1),
}
READ_BOTH: dict[str, Function] = {
    "read both (amax)": lambda x, y, *_: (words(x).amax(-1), words(y).amax(-1)),
    "read both (sum)": lambda x, y, *_: (words(x).sum(-1), words(y).sum(-1)),
}
READ_AND_COPY: dict[str, Function] = {
    "read + copy (amax)": lambda x, *_: (words(x).amax(-1), x.detach().clone()),
    "read + copy (sum)": lambda x, *_: (words(x).sum(-1), x.detach().clone()),
}
READ_BOTH_AND_COPY: dict[str, Function] = {
    "read both + read + copy": lambda x, y, *_: (
        *(words(x).amax(-1), words(y).amax(-1)),
        *(words(y).amax(-1), x.detach().clone()),
    )
}


def reading(count: int) -> dict[str, Function]:
    """A plain reduction over `count` bytes that are in the cache, for ops on many small tensors."""
    buffer = torch.zeros(max(1, count // 4))
    return {"read": lambda *_: buffer.amax()}
