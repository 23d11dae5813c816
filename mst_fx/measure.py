"""Peak memory of a piece of work over its start, on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Start a process with these for its resident size to mean something: glibc keeps freed memory otherwise."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory from now on: for times after peaks, in a process started with ``MALLOC_ENV``.

    Giving it back costs every chunk of a loop, which takes it again at once, and plain steps hardly anything.
    The bounds are those that glibc's own, which move with what is freed, end at (32 MiB, twice that). The other
    way round can't be: what the heap has grown by serves later requests, whatever their size. Other C libraries
    have no such call and know no such variables.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def peak_over_start(run: Callable[[], Any], device: str) -> tuple[int, Any]:
    """Return the bytes ``run()`` needs at its peak beyond what was there before, and its result.

    On Linux the resident size of this process is read; elsewhere a CPU has no such reading and the growth of
    the process's highest resident size ever stands in, which is 0 if it has been higher before.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start, result
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
        start = _status("VmRSS")
        result = run()
        return _status("VmHWM") - start, result
    start = highest_memory(device)
    result = run()
    return highest_memory(device) - start, result


def highest_memory(device: str) -> int:
    """Return the most bytes this process has had: allocated by torch on a CUDA device, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def matmul_slowdown(dtype: torch.dtype) -> float:
    """Return how many times as long this CPU takes for a matmul in a dtype as for one in fp32, at least 1.

    Without instructions for bf16 torch multiplies it by a plain loop: some hundred times as long.
    """
    if dtype == torch.float32:
        return 1.0

    def seconds(tried: torch.dtype) -> float:
        a, b = (torch.ones(256, 256, dtype=tried) for _ in range(2))
        found = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            found.append(time.perf_counter() - start)
        return min(found)

    return max(1.0, seconds(dtype) / seconds(torch.float32))


def prepare_compiler(env: dict[str, str]) -> None:
    """Let torch build its precompiled C++ header, once per machine, in a process of its own.

    Torch keeps that header outside the cache folder: without this the first process measured would pay for it alone.
    """
    script = "import torch; torch.compile(lambda x: x.sin() + 1)(torch.ones(8))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, check=True, capture_output=True)
