"""How an op is measured: `measure` times one form of a function and notes what it has to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """`measure(function, *tensors, size=..., reads=bytes)`: the median of repeated calls, after a warm one.

    `reads`: bytes the function must at least read and write, for the floor; 0 where arithmetic is the bound.
    """

    def run(function: Callable[..., Any], *args: Any, size: str, reads: int, **kwargs: Any) -> None:
        function(*args, **kwargs)  # compiles, fills caches
        benchmark.extra_info.update(
            op=request.node.originalname.removeprefix("bench_"),
            size=size,
            dtype=str(next(x.dtype for x in args if hasattr(x, "dtype"))).removeprefix("torch."),
            variant=request.node.callspec.params["function"].variant,
            reads=reads,
        )
        benchmark(function, *args, **kwargs)

    return run
