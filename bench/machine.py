"""What the figures were measured on."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any


def cache_bytes(level: int) -> int:
    """Size of one cache of `level` as the kernel reports it; a common one (1 MB, 32 MB) where it does not."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if int((folder / "level").read_text()) == level and "Instr" not in (folder / "type").read_text():
                size = (folder / "size").read_text().strip()
                return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]]
        except (OSError, KeyError, ValueError):
            continue
    return {1: 32 << 10, 2: 1 << 20}.get(level, 32 << 20)


def last_level_bytes() -> int:
    """What inputs have to exceed, several times over, to be cold."""
    return max(cache_bytes(level) for level in (1, 2, 3))


class Others:
    """Share of the processors that other processes used since this was made.

    With every core wanted twice, a call on all threads waits for whole time slices of the scheduler (8 ms here): such
    figures say nothing, and the tables name them.
    """

    def __init__(self) -> None:
        self.start = self.seconds()

    @staticmethod
    def seconds() -> tuple[float, float, float]:
        """Wall time, processor time of all processes and of this one."""
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(ticks) - ticks[3] - ticks[4]  # idle, and waiting for a disk
        times = os.times()
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), times.user + times.system

    def share(self) -> float:
        wall, busy, own = (now - then for now, then in zip(self.seconds(), self.start, strict=True))
        return max(0.0, min(1.0, (busy - own) / (wall * (os.cpu_count() or 1)))) if wall > 0.05 else 0.0


def processor() -> str:
    """Its name and how many cores it has."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions and date, as they go into every JSON."""
    import torch

    from fastppo.ops._library import library

    return {
        "processor": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "instruction_set": library.cpu_capability(),
        "threads": torch.get_num_threads(),
        "l2_bytes": cache_bytes(2),
        "last_level_bytes": last_level_bytes(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
