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

__all__ = ["library", "register_autograd"]

_registrations = torch.library.Library("fastppo", "IMPL")


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Give ``torch.ops.fastppo.<name>`` a gradient, in every mode: eager, compiled, under functorch.

    ``torch.library.register_autograd`` with the same arguments does the same, but looks the schema up argument
    by argument at every call: 0.2 ms for the 18 of ``ppo_loss``, several times the op itself.
    """
    op = getattr(torch.ops.fastppo, name).default

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(call),
            "setup_context": staticmethod(save),
            "backward": staticmethod(backward),
        },
    )

    def with_gradient(*args: Any) -> Any:
        needed = torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in args
        )
        return function.apply(*args) if needed else call(*args)

    _registrations.impl(name, with_gradient, "Autograd")
