"""Loads the compiled library, which registers the ops under ``torch.ops.fastppo``, and gives them gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # before the library, which is linked against libtorch

try:
    from .. import _C as library  # noqa: N811
except ImportError as error:
    if "FASTPPO_CPU_CAPABILITY" in str(error):
        raise
    raise ImportError(
        "fastppo: the compiled library fastppo/_C is missing or does not load "
        f"({error}). Build it with `pip install --no-build-isolation -e .`; "
        "fastppo.reference works without it."
    ) from error

__all__ = ["call", "library", "register_autograd", "scaled"]

_registrations = torch.library.Library("fastppo", "IMPL")


_functions: dict[torch._ops.OpOverload, Any] = {}  # the autograd.Function of each op with a gradient


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    # As torch.library.custom_op asks: a loop in Python takes 2 µs for the 19 arguments of ppo_loss.
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _without_gradient(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)`` of an op with a gradient, past the Python in the dispatcher, which takes 6 µs."""
    if torch.compiler.is_compiling():
        return op(*args)
    return _functions[op].apply(*args) if _needs_gradient(args) else _without_gradient(op, args)


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give ``torch.ops.fastppo.<name>`` a gradient, eager and compiled.

    ``torch.library.register_autograd`` with the same arguments does the same, but looks the schema up argument
    by argument at every call: 0.2 ms for the 18 of ``ppo_loss``, several times the op itself.
    """
    op = getattr(torch.ops.fastppo, name).default

    def function(outputs_are_known: bool) -> Any:
        # The context is set up in forward: set up apart, autograd.Function binds a signature at every call, 50 µs.
        def forward(ctx: Any, *args: Any) -> Any:
            output = _without_gradient(op, args)
            ctx.outputs_are_known = outputs_are_known
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(name, (torch.autograd.Function,), members)

    # Who calls the op itself gets all that it returns, our wrappers' callers what the wrappers hand on.
    _functions[op], of_the_op = function(False), function(True)

    def with_gradient(*args: Any) -> Any:
        return of_the_op.apply(*args) if _needs_gradient(args) else _without_gradient(op, args)

    _registrations.impl(name, with_gradient, "Autograd")


def scaled(ctx: Any, saved: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``saved * factor`` in a backward, for a contiguous `saved` that the forward made and no wrapper hands on.

    Where the graph is not kept nobody asks for it again: it is multiplied in place, which leaves it as it is where the
    factor is 1, and given away. Else this is done to a copy, as it is for callers of the op itself and for tracers,
    whose tensors are of types of their own: to them all that the op returns is known.
    """
    given_away = (
        not ctx.outputs_are_known
        and type(saved) is torch.Tensor
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )
    out = saved if given_away else saved.clone()
    torch.ops.fastppo.scale_.default(out, factor)
    return out
