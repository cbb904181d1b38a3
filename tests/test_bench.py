"""The benchmark measures what it says: variants agree, rounds take turns, memory is counted, tables are right."""

import ast
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastppo.ops
from bench import goals, machine, memory, overhead, peers, report, scaling, timing
from bench.__main__ import CONCEPTS
from bench.measure import prepare, with_backward
from bench.report import Row

ROOT = Path(__file__).parent.parent
TINY = {"n": 5, "b": 6, "v": 1024, "h": 8, "t": 64, "count": 64, "modes": ()}


def test_every_concept_has_a_benchmark():
    concepts = {path.stem for path in (ROOT / "fastppo" / "ops").glob("*.py")} - {"__init__", "_library"}
    assert set(CONCEPTS) == concepts
    for concept in concepts:
        assert benchmarks(concept), f"bench/{concept}.py has no bench_ function"


def benchmarks(concept):
    module = importlib.import_module(f"bench.{concept}")
    return [function for name, function in vars(module).items() if name.startswith("bench_")]


def tiny_cases():
    """Every benchmark with each of its settings, and sizes that take no time."""
    for concept in CONCEPTS:
        for function in benchmarks(concept):
            (mark,) = function.pytestmark
            names = mark.args[0].replace(" ", "").split(",")
            cases = {}
            for case in mark.args[1]:
                values = dict(zip(names, getattr(case, "values", case), strict=True))
                values |= {name: size for name, size in TINY.items() if name in values}
                cases[str(values)] = values
            for values in cases.values():
                label = "-".join(str(x) for name, x in values.items() if name not in TINY)
                yield pytest.param(function, values, id=f"{function.__name__}-{label}".rstrip("-"))


@pytest.mark.parametrize(("function", "values"), list(tiny_cases()))
def test_variants_of_a_case_agree(function, values):
    called = []

    def measure(*args, **kwargs):
        case = prepare(*args, **kwargs | {"modes": (), "compiled": None})
        called.append(case)
        assert case.variants[0].name == "fastppo"
        assert case.bytes_moved > 0
        assert {v.kind for v in case.variants} <= {"ours", "eager", "compile", "peer", "floor"}

    function(measure, **values)
    assert len(called) == 1


def test_a_wrong_variant_is_refused():
    with pytest.raises(AssertionError, match=r"double \[4\] torch.float32: eager wrong disagrees with ours"):
        prepare(
            "double",
            "[4]",
            torch.float32,
            inputs=lambda: (torch.ones(4),),
            ours=lambda x: 2 * x,
            eager={"wrong": lambda x: 2.01 * x},
        )


def test_one_wrong_gradient_among_large_ones_is_refused():
    def ours(x):
        return (x * torch.tensor([1000.0, 1.0, 1.0, 1.0])).sum()

    with pytest.raises(AssertionError, match="result 1 is off"):
        prepare(
            "scale",
            "[4]",
            torch.float32,
            inputs=lambda: (torch.zeros(4, requires_grad=True),),
            ours=with_backward(ours, 0),
            eager={"blind": with_backward(lambda x: (x[:1] * 1000.0).sum(), 0)},
        )


def test_compiled_variants_compile_what_is_inside_the_backward():
    case = prepare(
        "square",
        "[8]",
        torch.float32,
        inputs=lambda: (torch.randn(8, requires_grad=True),),
        ours=with_backward(torch.square, 0),
        compiled=with_backward(torch.square, 0),
        modes=("default",),
    )
    assert [v.kind for v in case.variants] == ["ours", "compile"]


# Overhead


def test_the_overhead_is_what_no_timed_work_took():
    now = 0.0

    def takes(seconds):
        nonlocal now
        now += seconds

    ledger = overhead.Ledger(clock=lambda: now)
    inner = ledger.timed("sample", takes)
    outer = ledger.timed("models", lambda: (takes(2), inner(3)))  # nested: the outermost is charged
    rollout = ledger.in_room("rollout", lambda: (outer(), inner(1), takes(4)))
    rollout()
    ledger.reset()  # a warm-up
    rollout(), takes(5)
    ledger.enter("log")
    assert dict(ledger.works["rollout"]) == {"models": 5, "sample": 1}
    assert (ledger.totals["rollout"], ledger.rest("rollout"), ledger.rest("log")) == (10, 4, 5)
    assert dict(ledger.calls) == {"models": 1, "sample": 1}


# Timing


def test_turns_interleave():
    order = list(timing.turns({"a": 50, "b": 50}))
    assert all(sorted(order[i : i + 2]) == ["a", "b"] for i in range(0, 100, 2))
    assert len({tuple(order[i : i + 2]) for i in range(0, 100, 2)}) == 2  # either may come first
    order = list(timing.turns({"fast": 9, "slow": 3}))
    assert [order[i : i + 4].count("slow") for i in (0, 4, 8)] == [1, 1, 1] and len(order) == 12


def test_interleave_times_every_function_in_turns():
    seen = []
    functions = {name: lambda x, name=name: seen.append((name, x)) for name in "ab"}
    timings = timing.interleave(
        functions, itertools.cycle([(0,), (1,)]), hot=False, seconds=1e-3, min_rounds=4
    )
    assert {name: len(one.seconds) >= 4 for name, one in timings.items()} == {"a": True, "b": True}
    assert all(one.median > 0 for one in timings.values())
    longest_run = max(len(list(run)) for _, run in itertools.groupby(name for name, _ in seen))
    assert longest_run < len(seen) / 4
    assert {x for _, x in seen} == {0, 1}


def test_slow_functions_get_few_rounds(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    timings = timing.interleave({"slow": lambda: None}, itertools.cycle([()]), hot=True)
    assert timings["slow"].loops == 1 and len(timings["slow"].seconds) == 3


def test_cold_inputs_exceed_the_cache_and_hot_ones_stay(monkeypatch):
    monkeypatch.setattr(timing, "last_level_bytes", lambda: 1 << 20)

    def bytes_in_turn(hot):
        sets = itertools.islice(timing.rotating(lambda: (torch.zeros(1 << 16),), hot), 100)
        return sum({x.data_ptr(): x.nbytes for (x,) in sets}.values())

    assert bytes_in_turn(hot=False) == 4 << 20
    assert bytes_in_turn(hot=True) == 1 << 18


# Memory


def test_extra_memory_sees_what_a_call_needs_beyond_its_result():
    def call():
        scratch = torch.ones(10_000_000)
        return scratch[:1_000_000] + 1

    assert memory.extra_memory(call)[1] == pytest.approx(40e6, rel=0.1)


def test_extra_memory_ignores_inputs_and_results():
    x = torch.ones(10_000_000)
    assert memory.extra_memory(lambda: x + 1)[1] < 3e6


def test_extra_memory_counts_what_the_first_call_keeps():
    for count_kept, expected in ((True, 40e6), (False, 0)):
        kept = []

        def call(kept=kept):
            if not kept:
                kept.append(torch.ones(10_000_000))

        _, extra = memory.extra_memory(call, count_kept=count_kept)
        assert extra == pytest.approx(expected, rel=0.1, abs=3e6)


def test_a_storage_that_is_returned_twice_counts_once():
    x = torch.zeros(100)
    assert memory.result_bytes({"a": x, "b": [x[:10], (x,)]}) == 400


# Peers


def test_statements_are_cut_out_by_the_names_they_assign():
    tree = ast.parse(
        "def train(self):\n"
        "    total = 1\n"
        "    for step in range(3):\n"
        "        double = 2 * x\n"
        "        log(double)\n"
        "        with context():\n"
        "            half = x / factor\n"
        "            log(half)\n"
        "        done = True\n"
    )
    names = {"factor": 4, "log": [].append, "context": torch.no_grad}
    everything = peers.cut(tree, names, "double", "half", ["x"], ["double", "half"])
    assert everything(8) == (16, 2.0)
    some = peers.cut(tree, {**names, "log": None}, "double", "half", ["x"], ["half"], only=["double", "half"])
    assert some(8) == (2.0,)


@pytest.mark.parametrize(("first", "outputs"), [("absent", ["half"]), ("double", ["absent"])])
def test_a_peer_that_changed_is_an_error(first, outputs):
    tree = ast.parse("def train():\n    double = 2\n    half = 1\n")
    with pytest.raises(RuntimeError, match="absent"):
        peers.cut(tree, {}, first, "half", [], outputs)


def test_a_peer_that_cannot_be_installed_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    failed = subprocess.CompletedProcess([], 1, "", "no such version")
    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"TRL 0\.0\.1, which pip could not install: no such version"):
        peers.fetch_trl("0.0.1")


# Tables


def entry(op, kind, variant, median, **info):
    facts = {
        "shape": "[512, 49152]",
        "dtype": "float32",
        "state": "cold",
        "bytes": 1000,
        "readme": True,
        "others": 0.0,
    }
    facts |= {"extra_memory": None, "op": op, "kind": kind, "variant": variant, **info}
    return {"extra_info": facts, "stats": {"median": median}}


@pytest.fixture
def rows():
    return report.rows_of(
        [
            entry("logprobs forward", "ours", "fastppo", 4e-3, extra_memory=12),
            entry("logprobs forward", "eager", "log_softmax", 0.120, extra_memory=200_000_000),
            entry("logprobs forward", "eager", "logsumexp", 0.100),
            entry("logprobs forward", "floor", "amax", 4e-3),
            entry("logprobs forward", "floor", "sum", 2.5e-3),
            entry("logprobs call", "ours", "fastppo", 9e-6, shape="[1, 8]", state="hot"),
            entry("gae", "eager", "loop", 1.0),
        ]
    )


def test_rows_take_the_fastest_of_a_kind_and_survive_missing_ones(rows):
    assert [row.op for row in rows] == ["logprobs forward", "logprobs call"]
    row = rows[0]
    assert row.ratio("floor") == pytest.approx(1.6)
    assert row.ratio("eager") == pytest.approx(25)
    assert row.ratio("compile") is None and row.ratio("peer") is None


def test_table_aligns_and_shows_what_is_missing(rows):
    head, first, second = report.table(rows).splitlines()
    assert head.split()[:4] == ["op", "shape", "dtype", "cache"]
    assert "4 ms     1.60       25          –       –" in first
    assert first.endswith("1 kB  12 B (eager 200 MB)")
    assert "9 µs" in second


def test_markdown_has_only_rows_that_compare(rows):
    text = report.markdown(report.short(rows))
    assert text.splitlines()[0].startswith("| op | shape |")
    assert len(text.splitlines()) == 3 and "logprobs call" not in text


def test_the_short_table_holds_every_case_chosen_for_it():
    chosen = [
        case.id
        for concept in CONCEPTS
        for function in benchmarks(concept)
        if not function.__name__.endswith("_call")
        for case in function.pytestmark[0].args[1]
        if hasattr(case, "id")
    ]
    assert len(chosen) <= inspect.signature(report.short).parameters["limit"].default


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123, "12.3 ms"), (1e-3, "1 ms"), (9.15e-6, "9.15 µs")]
)
def test_times_read_well(seconds, text):
    assert report.time_text(seconds) == text


def test_rows_survive_json(rows):
    assert report.from_json(json.loads(json.dumps(report.as_json(rows)))) == rows


def test_rows_measured_beside_other_work_are_named(rows):
    assert report.disturbed(rows) == ""
    rows[1].others = 0.4
    assert "during 1 of 2 rows" in report.disturbed(rows) and "40 % during logprobs call" in report.disturbed(
        rows
    )


def test_work_of_other_processes_is_seen():
    own = machine.Others()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    quiet = own.share()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        others = machine.Others()
        time.sleep(1)
        loud = others.share()
        process.kill()
    assert loud > 0.5 / (os.cpu_count() or 1)
    assert 0 <= quiet <= 1


def test_goals_say_met_missed_or_not_measured(rows):
    scaling = {"curves": [{"op": "logprobs", "axis": "N", "slope": 1.01}], "threads": []}
    found = {(one.what, one.unit): one for one in goals.outcomes(rows, scaling)}
    what = "logprobs forward [512, 49152]"
    assert found[what, "× read floor"].met is False and found[what, "× read floor"].worst == "1.60"
    assert found[what, "× eager"].met is True
    assert found[what, "× torch.compile"].met is None
    assert found["call on tiny inputs", "µs"].worst == "9.00"
    assert found["log time against log N, N ≥ 256", "slope"].met is True
    text = goals.goals_table(list(found.values()))
    assert len(text.splitlines()) == 1 + len(goals.GOALS)


def test_goals_compare_rows_of_two_ops():
    rows = report.rows_of(
        [
            entry("sample (temperature)", "ours", "fastppo", 1e-3),
            entry("sample (top-k, top-p, min-p)", "ours", "fastppo", 2.5e-3),
        ]
    )
    found = {one.unit: one for one in goals.outcomes(rows, {})}
    assert found["× temperature only"].worst == "2.50" and found["× temperature only"].met


def test_every_goal_names_rows_that_exist():
    """The op of each goal is the op of some benchmark, by the source of the benchmark files."""
    source = "".join(inspect.getsource(importlib.import_module(f"bench.{concept}")) for concept in CONCEPTS)
    for op in (goals.FORWARD, goals.BOTH, goals.LINEAR, "distribution_kl forward", "ppo_loss with gradients"):
        assert f'"{op}"' in source
    from bench.sample import NAMES

    assert {f"sample ({name or 'temperature'})" for name in NAMES} >= {goals.PLAIN, goals.TRUNCATED}


def test_picture_is_drawn_with_missing_variants(rows, tmp_path):
    report.draw(rows, tmp_path / "ops.png", "a machine")
    assert (tmp_path / "ops.png").stat().st_size > 10_000


def test_labels_of_close_points_go_above_and_below():
    assert [above for _, _, above in report.places({"ours": 1.0, "compile": 1.1, "eager": 30.0})] == [
        True,
        False,
        True,
    ]


# Scaling


def test_slope_is_that_of_the_large_sizes():
    x = [1, 256, 512, 1024]
    assert scaling.slope(x, [99.0, 2.0, 4.0, 8.0], least=256) == pytest.approx(1)
    assert scaling.slope(x, [99.0, 1.0, 4.0, 16.0], least=256) == pytest.approx(2)


@pytest.mark.parametrize("op", scaling.OPS, ids=lambda op: op.name.split()[0])
def test_ops_of_the_curves_run(op):
    assert scaling.time_of(op, 2, 64, 1e-3, hot=True) > 0
    assert op.shape(2, 64) in ("[2, 64]", "[2, 512]")


def test_scaling_tables_and_picture(tmp_path):
    names = [op.name for op in scaling.OPS]
    result = {
        "machine": {"processor": "some", "instruction_set": "avx2", "torch": "2"},
        "curves": [
            {"op": name, "axis": axis, "x": [1, 256, 4096], "seconds": [1e-5, 1e-3, 1e-2], "slope": 1.0}
            for name in names
            for axis in "NV"
        ],
        "threads": [
            {
                "op": name,
                "shape": "[8, 49152]",
                "state": state,
                "row_op": True,
                "seconds": {"1": 2e-3, "2": 1e-3},
                "speedup": {"1": 1.0, "2": 2.0},
            }
            for name in names
            for state in ("hot", "cold")
        ],
    }
    text = scaling.tables(result)
    assert "slope" in text and "1 ms (2.00)" in text
    scaling.draw(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    found = {one.what: one for one in goals.outcomes([], result)}
    assert found["row ops, 1 to 2 threads, in the cache"].met is True
    assert found["log time against log N, N ≥ 256"].met is True


def test_pytest_benchmark_stores_one_entry_per_variant(tmp_path):
    """The fixture within pytest, on the smallest benchmark there is."""
    stored = tmp_path / "benchmark.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "python_functions=bench_*",
        "-p",
        "no:cacheprovider",
    ]
    command += [
        "bench/gae.py",
        "-k",
        "bench_gae and 16-53",
        "--benchmark-max-time=0.01",
        f"--benchmark-json={stored}",
    ]
    # Within a worker of pytest-xdist the plugin would measure nothing.
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = report.rows_of(json.loads(stored.read_text())["benchmarks"])
    assert isinstance(row, Row) and row.op == "gae" and row.state == "hot"
    assert set(row.seconds) == {"ours", "eager", "peer", "floor"} and len(row.seconds["eager"]) == 3


def test_ops_without_a_benchmark_are_none():
    """Every public op is called by some benchmark file."""
    source = "".join(inspect.getsource(importlib.import_module(f"bench.{concept}")) for concept in CONCEPTS)
    helpers = {"join_master", "split_master", "scale_to_unit_std"}
    public = {name for name in fastppo.ops.__all__ if inspect.isfunction(getattr(fastppo.ops, name))}
    assert {name for name in public - helpers if f"ops.{name}" not in source} == set()
