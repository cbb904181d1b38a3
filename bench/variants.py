"""One function in the forms that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


class Variant:
    """A function with the name of its column."""

    def __init__(self, variant: str, function: Callable[..., Any]) -> None:
        self.variant, self.function = variant, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def variants(
    ours: Callable[..., Any], eager: Callable[..., Any], floor: Callable[..., Any] | None = None
) -> pytest.MarkDecorator:
    """Run the benchmark with `ours`, plain torch, the same compiled, and (if any) the floor."""
    forms = {"fastppo": ours, "eager": eager, "compile": compiled(eager)}
    if floor is not None:
        forms["floor"] = floor
    return pytest.mark.parametrize("function", [pytest.param(Variant(k, f), id=k) for k, f in forms.items()])


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled at its first call for the shapes of that call."""
    return torch.compile(function, dynamic=False)


def with_backward(function: Callable[..., Any]) -> Callable[..., None]:
    """`function` and its backward from the sum of what it returns; every call gets fresh gradients."""

    def run(*args: Any, **kwargs: Any) -> None:
        for leaf in args:
            leaf.grad = None
        outputs = function(*args, **kwargs)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    return run


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
