"""On a machine with a GPU, `make gpu`: build, run the op tests on CUDA, look for faults, measure, write one table.

    python -m bench.gpu               all of it; writes docs/gpu-<device>.md
    python -m bench.gpu --only gae    some ops, no tests; prints the table and writes nothing
    python -m bench.gpu --skip compile    all but torch.compile, which takes most of the time
    python -m bench.gpu --check       says whether there is a GPU
    python -m bench.gpu --exercise    every op once on small tensors: what runs under compute-sanitizer

Times are of the device alone: medians over calls that start with an empty L2 cache, between events that are enqueued
behind the clearing of it, so the host is ahead and launches wait for nothing. The floor is what the op must read and
write over the bandwidth of a copy, measured in the same run. Each op is also captured into a CUDA graph, and what the
replay leaves must be the same bits as a call: a launcher that waited for the device, or allocated by what it found
there, could not be captured.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `make gpu` asks for --check before anything is installed
    from bench.cases import Case, Source

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "make gpu"
NO_GPU = "make gpu needs an NVIDIA GPU, and this machine has none ({why}). Nothing was built, run or written."
SANITIZERS = ("memcheck", "racecheck", "synccheck")
COLUMNS = ("graph", "eager", "compile", "TRL", "Liger")
Call = Callable[[], Any]


def no_gpu() -> str | None:
    """Why there is no GPU, as the driver says; None where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver: libcuda.so.1 is not found"
    if (status := driver.cuInit(0)) != 0:
        return f"cuInit returns {status}"
    count = ctypes.c_int(0)
    driver.cuDeviceGetCount(ctypes.byref(count))
    return None if count.value > 0 else "the driver counts 0 devices"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Times calls on a device. On the CPU, where the tests run it, by wall clock."""

    device: str
    seconds: float = 0.5  # for each variant of a case
    rounds: int = 5  # at least

    def __post_init__(self) -> None:
        import torch

        self.cuda = self.device.startswith("cuda")
        # More than any L2 cache, and as much work as keeps the device busy while the host enqueues a call.
        self.eraser = torch.empty(256 << 20, dtype=torch.int8, device=self.device) if self.cuda else None

    def once(self, call: Call) -> float:
        import torch

        if self.eraser is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.eraser.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, call: Call) -> float:
        """Seconds; the first calls, which compile and allocate, are not counted."""
        for _ in range(2):
            self.once(call)
        times: list[float] = []
        stop = time.perf_counter() + self.seconds
        while len(times) < self.rounds or (time.perf_counter() < stop and len(times) < 1000):
            times.append(self.once(call))
        return statistics.median(times)


def copy_bandwidth(clock: Clock, nbytes: int = 1 << 30) -> float:
    """Bytes read plus bytes written per second."""
    import torch

    source = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.median(lambda: target.copy_(source))


def flat(results: Any) -> list[Any]:
    """The tensors among nested results."""
    import torch

    if isinstance(results, torch.Tensor):
        return [results]
    return [x for one in results for x in flat(one)] if isinstance(results, (tuple, list)) else []


def bits(x: Any) -> Any:
    """A tensor's bytes: NaN equals itself there, and 0 is not -0."""
    import torch

    return x.detach().contiguous().view(-1).view(torch.uint8)


def capture(call: Call) -> tuple[Call, Any]:
    """A CUDA graph of a call: (replay, the results it writes to)."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def replayed(
    case: Case, source: Source, tiny: bool = False, capture: Callable[[Call], tuple[Call, Any]] = capture
) -> Call:
    """Capture a case, check that the replay gives the bits of a call, and return the replay."""
    import torch

    expected = [x.clone() for x in flat(case.ours(*case.arguments(source, tiny)))]
    arguments = case.arguments(source, tiny)
    replay, results = capture(lambda: case.ours(*arguments))
    with torch.no_grad():
        kept = {id(x) for x in arguments}
        for x in flat(results):
            if id(x) not in kept:
                x.zero_()  # what is there now is the capture's, or an earlier run's
        if case.in_place:  # else a second set of logits would be made for nothing
            fresh = case.arguments(source, tiny)
            for place in case.in_place:
                arguments[place].copy_(fresh[place])
    replay()
    for i, (x, y) in enumerate(zip(flat(results), expected, strict=True)):
        if not torch.equal(bits(x), bits(y)):
            raise AssertionError(
                f"{case.label}: result {i} of a CUDA graph replay differs from that of a call"
            )
    return replay


@dataclass
class Row:
    """Figures of a case: seconds by column, or why there are none."""

    label: str
    bytes_moved: int
    ours: float
    others: dict[str, float | str] = field(default_factory=dict)


def measure(
    case: Case,
    clock: Clock,
    tiny: bool = False,
    capture: Callable[[Call], tuple[Call, Any]] | None = capture,
    skip: Iterable[str] = (),
) -> Row:
    """Time all forms of a case. A peer that is missing, fails or runs out of memory becomes a word in the table."""
    import torch

    from bench.cases import Source

    source = Source(clock.device)
    arguments = case.arguments(source, tiny)
    row = Row(
        case.label, case.bytes_moved(case.tiny if tiny else None), clock.median(lambda: case.ours(*arguments))
    )
    if capture is not None:
        try:
            row.others["graph"] = clock.median(replayed(case, source, tiny, capture))
        except torch.OutOfMemoryError:  # it holds the arguments and results twice
            row.others["graph"] = "out of memory"
    forms: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: case.eager,
        "compile": lambda: torch.compile(case.eager, dynamic=False),
        **case.peers,
    }
    for name, form in forms.items():
        if name in skip:
            continue
        arguments = case.arguments(source, tiny)
        try:
            function = form()
            row.others[name] = clock.median(lambda f=function, a=arguments: f(*a))  # type: ignore[misc]
        except ImportError:
            row.others[name] = "not installed"
        except torch.OutOfMemoryError:
            row.others[name] = "out of memory"
        except Exception as error:
            row.others[name] = f"fails: {type(error).__name__}"
            print(f"{case.label}, {name}: {error}", file=sys.stderr)
        torch.compiler.reset()
    return row


# --- the table --------------------------------------------------------------------------------------------------------


def microseconds(value: float | str | None, floor: float) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{1e6 * value:.4g}" + (f" ({value / floor:.2f})" if floor else "")


def table(rows: Iterable[Row], bandwidth: float) -> str:
    """Microseconds, and in brackets how many times the floor."""
    head = ("op", "MB", "floor", "fastppo", *COLUMNS)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        floor = row.bytes_moved / bandwidth
        cells = [row.label]
        cells += [f"{row.bytes_moved / 1e6:.4g}", f"{1e6 * floor:.4g}"] if row.bytes_moved else ["–", "–"]
        cells.append(f"**{microseconds(row.ours, floor)}**")
        cells += [microseconds(row.others.get(column), floor) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(rows: Iterable[Row], bandwidth: float, facts: dict[str, str], outcomes: dict[str, str]) -> str:
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    ran = "\n".join(f"- {name}: {value}" for name, value in outcomes.items())
    return f"""# fastppo on {facts["device"]}

Measured by `{COMMAND}`; `bench/gpu.py` says how. Microseconds of the device, and in brackets how many times the floor:
the bytes that must be read and written over the bandwidth of a copy, {bandwidth / 1e9:.0f} GB/s here.

{about}

{table(rows, bandwidth)}

{ran}
"""


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")


def facts_of() -> dict[str, str]:
    import torch

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    def answer(*command: str) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = answer("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if answer("git", "status", "--porcelain", "--untracked-files=no"):
        commit += ", with changes"
    smi = shutil.which("nvidia-smi")
    driver = answer(smi, "--query-gpu=driver_version", "--format=csv,noheader") if smi else ""
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "CUDA": str(torch.version.cuda),
        "torch": torch.__version__,
        "TRL": version("trl"),
        "Liger": version("liger-kernel"),
        "host": f"{platform.machine()}, Python {platform.python_version()}",
    }


# --- tests and sanitizers ---------------------------------------------------------------------------------------------


def run_tests() -> str:
    """The op tests on real CUDA; a failure ends the run."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", "-k", "cuda and not emulated"]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"the op tests fail on this GPU: {' '.join(command[1:])}")
    return "pass"


def sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or in the toolkit, whose folder need not be on it."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit / "bin")


def run_sanitizer(tool: str, program: str | None) -> str:
    """Every op once under compute-sanitizer, with each tensor its own allocation, so that one byte too far shows."""
    if program is None:
        return "compute-sanitizer is not installed"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "bench.gpu",
        "--exercise",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if done.returncode:
        raise SystemExit(f"compute-sanitizer finds a fault: {' '.join(command)}")
    return "no fault"


def exercise(listed: Iterable[Case], device: str) -> int:
    """Run every op once on small tensors; return how many."""
    from bench.cases import Source

    count = 0
    for case in listed:
        case.ours(*case.arguments(Source(device), tiny=True))
        count += 1
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say whether there is a GPU")
    parser.add_argument("--exercise", action="store_true", help="every op once, small")
    parser.add_argument(
        "--only", nargs="+", metavar="OP", help="ops whose name begins so; prints, writes nothing"
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=("tests", "sanitizer", "compile"), help="what not to run"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each variant of each case")
    options = parser.parse_args(arguments)
    if (why := no_gpu()) is not None:
        raise SystemExit(NO_GPU.format(why=why))
    if options.check:
        return

    import torch

    from bench.cases import cases
    from fastppo import _C

    if not torch.cuda.is_available():
        raise SystemExit(
            f"there is a GPU, but torch {torch.__version__} cannot use it: install a CUDA build of torch"
        )
    if not _C.build_facts()["cuda"].startswith("on: "):
        raise SystemExit(
            f"the library was built without CUDA ({_C.build_facts()['cuda']}): {COMMAND} builds it"
        )
    wanted = tuple(options.only or [""])
    listed = [case for case in cases() if case.has_kernels() and case.op.startswith(wanted)]
    if not listed:
        raise SystemExit(
            f"no op begins with {' or '.join(wanted)}: {', '.join(sorted({c.op for c in cases()}))}"
        )
    if options.exercise:
        print(f"{exercise(listed, 'cuda')} cases")
        return

    outcomes = {}
    if not options.only:
        outcomes["op tests"] = "not run" if "tests" in options.skip else run_tests()
        program = sanitizer()
        for tool in SANITIZERS:
            result = "not run" if "sanitizer" in options.skip else run_sanitizer(tool, program)
            outcomes[f"compute-sanitizer {tool}"] = result
    clock = Clock("cuda", options.seconds)
    bandwidth = copy_bandwidth(clock)
    rows = []
    for case in listed:
        print(f"measuring {case.label} …", flush=True)
        rows.append(measure(case, clock, skip=options.skip))
        torch.cuda.empty_cache()
    captured = sum(isinstance(row.others.get("graph"), float) for row in rows)
    outcomes["CUDA graphs"] = f"{captured} of {len(rows)} captured, every replay the same bits as a call"
    text = page(rows, bandwidth, facts_of(), outcomes)
    print(text)
    if not options.only:
        output = ROOT / "docs" / f"gpu-{slug(torch.cuda.get_device_name())}.md"
        output.parent.mkdir(exist_ok=True)
        output.write_text(text)
        print(f"wrote {output.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
