"""The `measure` fixture: checks a benchmark's variants, times them in turns, hands the numbers to pytest-benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from bench.machine import Others
from bench.measure import MODES, Case, prepare
from bench.report import progress
from bench.timing import Timing, interleave, rotating


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case per op, torch.compile in one mode")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        items[:] = [item for item in items if "[quick-" in item.name]


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """`measure(op, shape, dtype, ...)`: one row of the table. The arguments are those of `bench.measure.prepare`."""

    def run(*args: Any, **kwargs: Any) -> None:
        if request.config.getoption("--quick"):
            kwargs["modes"] = [mode for mode in kwargs.get("modes", MODES) if mode == MODES[0]]
        case = prepare(*args, **kwargs)
        if not benchmark.enabled:
            benchmark(lambda: None)
            return
        others = Others()
        timings = interleave(
            {f"{v.kind} {v.name}": v.function for v in case.variants},
            rotating(case.inputs, case.hot),
            hot=case.hot,
            seconds=case.seconds or float(request.config.getoption("benchmark_max_time")),
            min_rounds=case.min_rounds or int(request.config.getoption("benchmark_min_rounds")),
        )
        share = others.share()
        in_readme = request.node.name.split("[")[-1].startswith(("quick-", "readme-"))
        store(benchmark, case, timings, in_readme, share)
        print(progress(case, timings, share), file=sys.stderr, flush=True)

    return run


def store(benchmark: Any, case: Case, timings: dict[str, Timing], in_readme: bool, others: float) -> None:
    """One entry of pytest-benchmark per variant. Its own modes time one function per test and cannot take turns.

    This is the one place that uses more of pytest-benchmark than its fixture offers in public: `_make_stats` opens an
    entry under the fixture's present name, `_mode` says that the fixture was used.
    """
    test = benchmark.name
    benchmark._mode = "measure"
    for variant in case.variants:
        timing = timings[f"{variant.kind} {variant.name}"]
        benchmark.name = f"{test} {variant.kind} {variant.name}"
        benchmark.extra_info = {
            "op": case.op,
            "shape": case.shape,
            "dtype": case.dtype,
            "state": "hot" if case.hot else "cold",
            "kind": variant.kind,
            "variant": variant.name,
            "bytes": case.bytes_moved,
            "extra_memory": case.extra.get(variant.kind),
            "readme": in_readme,
            "others": others,
        }
        stats = benchmark._make_stats(timing.loops)
        for seconds in timing.seconds:
            stats.update(seconds * timing.loops)


def pytest_report_teststatus(report: Any, config: pytest.Config) -> tuple[str, str, str] | None:
    """Nothing for what passed: `measure` prints a line of its own."""
    return ("passed" if report.when == "call" else "", "", "") if report.passed else None
