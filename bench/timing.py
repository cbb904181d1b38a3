"""Timing several functions against each other, in turns.

Machines drift: clocks, neighbours, the temperature. Functions that are compared take turns, round by round, so a
slow minute slows all of them; the median of the rounds is what counts. Their order is drawn anew in each round,
because a call depends on the one before it: what that left in the cache, and above all which pages it gave back (the
first touch of a page from the system costs more than writing it).
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bench.machine import last_level_bytes
from bench.memory import result_bytes

ROUND_SECONDS = 100e-6  # calls much shorter than this are timed several at once
MAX_ROUNDS = 300
SLOW = 0.5  # seconds of a call from which three rounds have to do
DISTINCT = 8  # sets of cold inputs with values of their own


@dataclass
class Timing:
    """Seconds per call of each round; a round is `loops` calls."""

    loops: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def rotating(inputs: Callable[[], tuple[Any, ...]], hot: bool) -> Iterator[tuple[Any, ...]]:
    """Endless sets of arguments: always the same one (hot), or so many that each one is cold when it returns.

    Cold sets together exceed four times the last-level cache. A set that does so many times over evicts itself. Random
    numbers take time to make: a few sets have their own, the others are copies.
    """
    sets = [inputs()]
    size = max(1, result_bytes(sets[0]))
    count = 1 if hot or size > 16 * last_level_bytes() else max(2, math.ceil(4 * last_level_bytes() / size))
    sets += [inputs() for _ in range(min(count, DISTINCT) - 1)]
    sets += [tuple(map(copied, sets[i % DISTINCT])) for i in range(len(sets), count)]
    return itertools.cycle(sets)


def copied(x: Any) -> Any:
    """A leaf of its own with the values of `x`."""
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def interleave(
    functions: dict[str, Callable[..., Any]],
    arguments: Iterator[tuple[Any, ...]],
    *,
    hot: bool,
    seconds: float = 0.7,
    min_rounds: int = 5,
) -> dict[str, Timing]:
    """Time `functions` in turns, about `seconds` each; every call takes the next of `arguments`.

    At least `min_rounds` rounds, 3 for calls above half a second, whose first one also tells how long they take. Hot:
    an untimed call before each timed one brings its arguments (and nothing of the others') into the cache. All must
    have been called before, so that they are compiled.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        timings, rounds = {}, {}
        for name, function in functions.items():
            once = timed(function, arguments, 1)
            if once < ROUND_SECONDS:
                once = timed(function, arguments, 10) / 10
            loops = max(1, min(1000, round(ROUND_SECONDS / once)))
            wanted = math.ceil(seconds / (once * loops * (2 if hot else 1)))
            rounds[name] = min(MAX_ROUNDS, max(min_rounds if once < SLOW else min(3, min_rounds), wanted))
            timings[name] = Timing(loops)
            if once >= SLOW:
                timings[name].seconds.append(once)
                rounds[name] -= 1
        for name in turns(rounds):
            if hot:
                functions[name](*next(arguments))
            loops = timings[name].loops
            timings[name].seconds.append(timed(functions[name], arguments, loops) / loops)
    finally:
        if collecting:
            gc.enable()
    return timings


def timed(function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], loops: int) -> float:
    """Seconds for `loops` calls."""
    sets: Sequence[tuple[Any, ...]] = list(itertools.islice(arguments, loops))
    start = time.perf_counter()
    for one in sets:
        function(*one)
    return time.perf_counter() - start


def turns(rounds: dict[str, int]) -> Iterator[str]:
    """Each name as often as `rounds` says, spread evenly; in each round in another order."""
    order = random.Random(0)
    longest = max(rounds.values(), default=0)
    for i in range(longest):
        due = [name for name, count in rounds.items() if (i + 1) * count // longest > i * count // longest]
        yield from order.sample(due, len(due))
