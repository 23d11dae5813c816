"""Asks a question: plans its cells, runs each in a process of its own by turns, keeps the rows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mst_fx.bench.systems import SYSTEMS
from mst_fx.bench.works import SHAPES, check_sizes, flops_of, flops_of_own, sizes_of
from mst_fx.commands.models import DTYPES, UsageError, find_entry
from mst_fx.config import Config, did_you_mean
from mst_fx.measure import MALLOC_ENV, matmul_slowdown, prepare_compiler

Row = dict[str, Any]

WORK_OF = {"head": "head", "mlp": "mlp", "model": "llama", "length": "llama", "compile": "llama"}
"""Question -> work."""
CHECKPOINTED_MODELS = ("mst+checkpoint", "mst+checkpoint by 2")
SYSTEMS_OF = {
    "head": [s for s in SYSTEMS if s not in ("inductor+checkpoint", "chunk checkpoint", *CHECKPOINTED_MODELS)],
    "mlp": [s for s in SYSTEMS if s not in ("F.linear_cross_entropy", "cut-cross-entropy", *CHECKPOINTED_MODELS)],
    "model": ["eager", "inductor", "auto_chunker", "liger", "mst"],
    "length": ["inductor", "inductor+checkpoint", "mst", "mst+checkpoint"],
    "compile": ["inductor", "mst"],
}
SYSTEMS_OF_OWN = ["eager", "inductor", "auto_chunker", "mst"]
"""The same for ``model`` with a model of the user's: Liger patches classes it knows."""
LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (8192, 16384, 32768, 65536, 131072)}
GRACE_SECONDS = 60
"""With ``minutes``: how much longer the last cell may take."""
CPU_FLOPS = 2 * 10**13
"""More than this a step (minutes), counted in fp32, is not run on a CPU by mistake."""
SLOW = 10
"""So many times as long as fp32 is what a CPU without instructions for a dtype takes."""
SMALLER = ("seq_len", "tokens", "hidden", "intermediate", "vocab", "layers", "heads", "kv_heads")
"""Sizes that are named to one whose work is too large."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What the command line asks. None stands for "not given"."""

    name: str
    device: str
    dtype: str
    model: str | None = None
    systems: tuple[str, ...] = ()
    shapes: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    steps: int = 3
    rounds: int = 1
    minutes: float | None = None
    """Start no cell after this many minutes, stop the last one a minute later; such cells are rows that say so."""

    @property
    def work(self) -> str:
        """What every cell does: a model of the user's where ``shapes`` name one."""
        return "own" if {"hf", "entry"} & self.shapes.keys() else WORK_OF[self.name]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of one system."""

    system: str
    shapes: dict[str, Any]
    caches: str = "cold"
    """For ``compile``: "cold", or "warm" to run on the caches of the cell before."""


def plan(question: Question) -> list[Cell]:
    """List the cells in the order in which they run: systems by turns.

    Raises:
        UsageError: If a name or size can't be, or the work is too large for the device.
        OptionError: On a bad option of mst.
    """
    unknown = [s for s in question.systems if s not in SYSTEMS]
    if unknown:
        raise UsageError(
            f"unknown system {unknown[0]!r}.{did_you_mean(unknown[0], SYSTEMS)} Known: {', '.join(SYSTEMS)}"
        )
    usual = SYSTEMS_OF_OWN if (question.work, question.name) == ("own", "model") else SYSTEMS_OF[question.name]
    systems = question.systems or tuple(usual)
    shapes = dict(question.shapes)
    if question.model is not None:
        if question.model not in SHAPES:
            raise UsageError(f"unknown model {question.model!r}; known: {', '.join(SHAPES)}")
        shapes = {**SHAPES[question.model][WORK_OF[question.name]], **shapes}
    _check(question, shapes)
    if question.name == "model":
        shapes = {"adamw": True, **shapes}
        variants = [{}] if {"entry", "checkpointing"} & shapes.keys() else [{}, {"checkpointing": True}]
    elif question.name == "length":
        variants = [{"seq_len": n} for n in question.lengths or LENGTHS[question.device.split(":")[0]]]
    elif question.name == "compile":
        if question.work == "llama":
            shapes = {"layers": 8, "seq_len": 1024, **shapes}
        return [
            Cell(s, shapes, caches)
            for _ in range(question.rounds) for s in systems for caches in ("cold", "warm")
        ]  # fmt: skip
    else:
        variants = [{}]
    return [Cell(s, {**shapes, **v}) for _ in range(question.rounds) for v in variants for s in systems]


def _check(question: Question, shapes: dict[str, Any]) -> None:
    """Raise ``UsageError`` on what can't be run, before anything is."""
    if question.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; leave out --device, or run it on a machine that has one")
    for name, value in (
        ("steps", question.steps),
        ("rounds", question.rounds),
        *(("lengths", n) for n in question.lengths),
    ):
        if value < 1:
            raise UsageError(f"--{name} {value}: at least 1")
    if question.lengths and question.name != "length":
        token_size = "tokens" if "tokens" in sizes_of(question.work) else "seq_len"
        raise UsageError(f"--lengths goes with `length`; for {question.name}: --set {token_size}=N")
    Config.parse({f"mst.{k}": v for k, v in question.options.items()})
    if question.minutes is not None and question.minutes <= 0:
        raise UsageError(f"--minutes {question.minutes}: more than 0")
    if "entry" in shapes:
        find_entry(shapes["entry"])
        return
    for length in question.lengths or (None,):
        sizes = shapes if length is None else {**shapes, "seq_len": length}
        if question.work != "own":
            sizes = check_sizes(question.work, sizes)
        elif length != max(question.lengths, default=None):
            continue  # the longest says it for all
        why = too_much(question.work, sizes, question.dtype)
        if why is not None and question.device == "cpu":
            named = [k for k in sizes_of(question.work) if k in shapes and k in SMALLER]
            small = " ".join(f"--set {k}={sizes[k]}" for k in named)
            raise UsageError(
                f"{why}; run it on a machine with a CUDA device, or make it smaller{': ' if small else ''}{small}"
            )


def too_much(work: str, sizes: Mapping[str, Any], dtype: str) -> str | None:
    """Return why a step of a work would take this CPU many minutes, None if it would not."""
    parameters, flops = flops_of_own(sizes, DTYPES[dtype]) if work == "own" else flops_of(work, sizes)
    slower = matmul_slowdown(DTYPES[dtype])
    if flops * slower <= CPU_FLOPS:
        return None
    size = f"{parameters / 1e9:.2g} billion parameters and {flops / 1e12:.3g} TFLOP a step"
    if slower < SLOW:
        return f"{size} are too much for a CPU"
    return f"{size} are too much for this CPU in {dtype}, which it multiplies {slower:.0f} times as slowly as float32"


def ask(
    question: Question,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Run every cell in a process of its own and return the rows.

    Args:
        question: What to run.
        progress: Called with what runs now, cells done, cells in all.
        keep: Called with the rows so far after every cell: an interrupted run keeps what it has.
    """
    cells, rows = plan(question), []
    prepare_compiler(dict(os.environ))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        folder = root
        for i, cell in enumerate(cells):
            label = ", ".join(
                [cell.system, *(f"{k} {v}" for k, v in cell.shapes.items() if k in ("seq_len", "checkpointing"))]
            )
            if progress is not None:
                progress(label, i, len(cells))
            left = None if question.minutes is None else 60 * question.minutes - (time.monotonic() - started)
            if left is not None and left < 0:
                rows.append({**_blank(question, cell), "reason": f"not started within {question.minutes:g} minutes"})
            else:
                if cell.caches == "cold":
                    folder = tempfile.mkdtemp(dir=root)
                rows.append(run_cell(question, cell, folder, seconds=None if left is None else left + GRACE_SECONDS))
            if keep is not None:
                keep(rows)
        if progress is not None:
            progress("done", len(cells), len(cells))
    return rows


def _blank(question: Question, cell: Cell) -> Row:
    return {
        "work": question.work, "system": cell.system, "shapes": cell.shapes, "options": question.options,
        "dtype": question.dtype, "caches": cell.caches,
    }  # fmt: skip


def run_cell(question: Question, cell: Cell, caches: str, *extra: str, seconds: float | None = None) -> Row:
    """Run one cell in a process of its own; one that dies, or takes longer than it may, is a row with the reason."""
    pairs = [("--set", cell.shapes), ("--option", question.options if cell.system.startswith(("mst", "chunk")) else {})]
    given = [a for flag, values in pairs for k, v in values.items() for a in (flag, f"{k}={json.dumps(v)}")]
    command = [sys.executable, "-W", "ignore", "-m", "mst_fx.bench.cell", question.work,
               "--system", cell.system, "--dtype", question.dtype, "--device", question.device,
               "--steps", str(question.steps), *given, *extra]  # fmt: skip
    if question.name == "compile":  # times alone: an allocator that tells the peak takes some from every chunk
        command, variables = [*command, "--no-peak"], dict(os.environ)
    else:
        variables = environment(question.device)
    variables["TORCHINDUCTOR_CACHE_DIR"] = caches
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {**_blank(question, cell), "reason": f"stopped after {seconds:.0f} s: out of time"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        killed = "killed by the system: out of memory" if done.returncode == -9 else last
        return {**_blank(question, cell), "reason": killed[:300]}
    return {**json.loads(done.stdout.splitlines()[-1]), "caches": cell.caches}


def environment(device: str) -> dict[str, str]:
    """Return the variables of a process whose memory is measured; an allocator that was set stays."""
    found = {**os.environ, **MALLOC_ENV}
    if device == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & found.keys():
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return found


def save_rows(path: Path, question: Question, rows: list[Row]) -> None:
    """Write rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"question": dataclasses.asdict(question), "rows": rows}, indent=1) + "\n")


def load_rows(path: Path) -> tuple[Question, list[Row]]:
    """Read what ``save_rows`` wrote.

    Raises:
        UsageError: If the file is not there or not such a file.
    """
    try:
        found = json.loads(path.read_text())
        question = {k: tuple(v) if isinstance(v, list) else v for k, v in found["question"].items()}
        return Question(**question), found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} holds no rows of `mst-fx bench`: {e}") from e
