"""Peak resident memory of one call, beyond what was there before it and what it returns.

Linux keeps the highest resident size of a process (VmHWM) and forgets it when 5 is written to
/proc/self/clear_refs. Blocks that the allocator kept from earlier would hide what a call needs, so they are
handed back first (malloc_trim).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def reset_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def end_above(limit: int, who: str) -> None:
    """End this process, with a message that begins with `who`, soon after it has taken more than `limit` bytes."""

    def watch() -> None:
        while status("VmHWM") <= limit:
            time.sleep(0.05)
        print(
            f"{who}: took {status('VmHWM') / 1e9:.2f} GB, the limit is {limit / 1e9:g} GB",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def settle() -> None:
    """Give everything that is free back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """(result, bytes): the highest resident size during one call, less what was resident before it."""
    settle()
    reset_peak()
    before = status("VmRSS")
    result = function()
    return result, max(0, status("VmHWM") - before)


def extra_memory(function: Callable[[], Any], *, count_kept: bool = True) -> tuple[Any, int]:
    """(result, bytes): what a call returns, and the bytes it needs beyond that and its inputs.

    Two calls, because the first one also does what happens only once, such as reading the program's pages. What it
    leaves behind (buffers kept for the next call) counts too, if this is the first call at all and `count_kept`.
    """
    settle()
    before = status("RssAnon")
    function()
    settle()
    kept = max(0, status("RssAnon") - before) if count_kept else 0
    result, peak = peak_of(function)
    return result, max(0, kept + peak - result_bytes(result))


def tensors(result: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dictionaries and `PPOStats`, in order."""
    from fastppo.ops import PPOStats  # here: a peer's process, whose memory is asked for, is not to load it

    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PPOStats):
        result = list(result)
    if isinstance(result, dict):
        result = list(result.values())
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def result_bytes(result: Any) -> int:
    """Bytes of all tensors in `result`; one that is there twice counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(result)}
    return sum(storages.values())
