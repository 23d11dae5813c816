"""Runs a function in several processes joined by a real process group, and gathers what each of them returns."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Children are forked from a server that has imported these once and has no threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "transformers", "tests.models"])


def run_ranks(work: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float = 240) -> list[Any]:
    """Call ``work(rank, world, *args)`` in ``world`` processes; returns their results, rank by rank.

    Nothing outlives ``timeout``: a process that hangs prints where it stands and is killed.
    """
    children = [
        _CONTEXT.Process(target=_child, args=(work, rank, world, str(folder), timeout, args), daemon=True)
        for rank in range(world)
    ]
    for child in children:
        child.start()
    end = time.monotonic() + timeout
    try:
        while any(c.is_alive() for c in children) and time.monotonic() < end and not any(c.exitcode for c in children):
            time.sleep(0.05)
        time.sleep(0.5 if any(c.exitcode for c in children) else 0)  # the other ranks tell their side
    finally:
        codes = [c.exitcode for c in children]
        for child in children:
            child.kill()
            child.join()
    errors = [p.read_text() for p in sorted(folder.glob("error*"))]
    if errors or any(codes):
        raise AssertionError(f"exit codes {codes} (None: killed after {timeout} s)\n" + "\n".join(errors))
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


def _child(work: Callable[..., Any], rank: int, world: int, folder: str, timeout: float, args: Any) -> None:
    faulthandler.dump_traceback_later(timeout - 2, exit=True)
    torch.set_num_threads(1)
    # Read by engines that look at the environment; processes meet in a file, so no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # fmt: skip
    patience = datetime.timedelta(seconds=timeout / 2)
    try:
        dist.init_process_group("gloo", f"file://{folder}/store", patience, rank=rank, world_size=world)
        torch.save(work(rank, world, *args), f"{folder}/result{rank}")
        dist.barrier()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)  # some engines leave threads that would wait for each other
