"""What is measured for the README's figures: works, systems and shapes, and how each is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst_fx.bench.questions import CHECKPOINTED_MODELS, Cell, Question, run_cell, too_much
from mst_fx.bench.works import check_sizes

RESULTS = Path(__file__).parent / "results"
Rows = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One work that several systems do."""

    work: str
    dtype: str
    systems: tuple[str, ...]
    shapes: dict[str, Any]


@dataclass(frozen=True)
class Turns(Compared):
    """Step times of several systems by turns."""

    def run(self, steps: int, clock: str) -> Rows:
        """Measure in one process; the row says which clock the ratios are to be read by."""
        given = [a for k, v in self.shapes.items() for a in ("--set", f"{k}={json.dumps(v)}")]
        command = [sys.executable, "-W", "ignore", "-m", "mst_fx.bench.turns", self.work, "--systems",
                   ",".join(self.systems), "--dtype", self.dtype, "--steps", str(steps), *given]  # fmt: skip
        env = {**os.environ, **({"OMP_NUM_THREADS": "1"} if clock == "cpu" else {})}
        return {"clock": clock, **json.loads(_output(command, env))}


@dataclass(frozen=True)
class Cells(Compared):
    """Peak, first step and, where asked for, the gradients' error: a process and a cold cache for each system."""

    error: bool = False
    rounds: int = 1
    steps: int = 1
    warm: int = 0
    """First steps alone: how often every system is run on the caches that its last run left, and measure no peak."""

    def run(self, steps: int, clock: str) -> Rows:
        """Run the cells, systems by turns."""
        name = "compile" if self.warm else {"llama": "model"}.get(self.work, self.work)
        question = Question(name, "cpu", self.dtype, steps=self.steps)
        extra = ["--error"] if self.error else []
        rows: Rows = {}
        folders: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as root:
            for caches in ["cold"] * self.rounds + ["warm"] * self.warm:
                for system in self.systems:
                    if caches == "cold":
                        folders[system] = tempfile.mkdtemp(dir=root)
                    row = run_cell(question, Cell(system, self.shapes, caches), folders[system], *extra)
                    rows.setdefault(f"{system}, warm" if caches == "warm" else system, []).append(row)
        return rows


@dataclass(frozen=True)
class Script:
    """A script that prints one JSON value, run ``times`` times on one cache folder that begins empty."""

    text: str
    times: int = 1

    def run(self, steps: int, clock: str) -> Rows:
        """Run it and keep every value."""
        command = [sys.executable, "-W", "ignore", "-c", self.text]
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            return {"values": [json.loads(_output(command, env)) for _ in range(self.times)]}


SMALL_LLAMA = """
import json, torch
from mst_fx.bench.works import llama
from torch._dynamo.utils import counters
torch.manual_seed(0)
work = llama(layers=1, hidden=64, intermediate=224, vocab=1000, seq_len=512, dtype=torch.float32, device="cpu")
fn = torch.compile(work.module, backend="mst", options={"mst.chunk_tokens": 128})
"""
LENGTHS = """
counts = []
for i in range(22):
    ids = torch.randint(0, 1000, (1, 400 + 37 * i))
    fn(input_ids=ids, labels=ids).loss.backward()
    counts.append(counters["stats"]["unique_graphs"])
print(json.dumps(counts[-1] - counts[1]))
"""
MISSES = """
work.step(fn)
found = {**counters["aot_autograd"], **counters["inductor"]}
print(json.dumps(sum(v for k, v in found.items() if k.endswith(("_miss", "_bypass")))))
"""

OVERHEAD = """
import json, statistics, time, torch
from torch import nn
from mst_fx import ops
torch.manual_seed(0)
torch.set_num_threads(1)
ROWS, CHUNKS, H, I = 16, 500, 32, 96
model = nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H))
fn = torch.compile(model, backend="mst", options={"mst.chunk_tokens": ROWS})
x = torch.randn(ROWS * CHUNKS, H, requires_grad=True)
fn(x).sum().backward()
((name, body),) = ops.BODIES.items()
parameters = [p.detach() for p in model.parameters()]
weights = [next(p for p in parameters if tuple(p.shape) == tuple(s.shape)) for s in body.shared]
x = x.detach()
dy = torch.ones_like(x)
rows, tangents = x.split(ROWS), dy.split(ROWS)
def forward(): torch.ops.mst_fx.map([x], weights, None, name, ROWS)
def backward(): torch.ops.mst_fx.map_backward([dy], [x], weights, None, name, ROWS)
def bare_forward(): [body.forward(r, *weights) for r in rows]
def bare_backward(): [body.backward(r, *weights, d) for r, d in zip(rows, tangents)]
def taken(fn):
    start = time.process_time()
    fn()
    return (time.process_time() - start) / CHUNKS * 1e6
with torch.no_grad():
    pairs = [(forward, bare_forward), (backward, bare_backward)]
    [(taken(a), taken(b)) for a, b in pairs]
    print(json.dumps([statistics.median(taken(a) - taken(b) for _ in range(11)) for a, b in pairs]))
"""

CHECKPOINTING = {"checkpointing": True}
HALF = {"hidden": 256, "intermediate": 896, "vocab": 16000, "heads": 4}
"""The reference llama at half the width, for the picture: the same shares at a quarter of the work."""
DEEP = {"layers": 32, "hidden": 128, "intermediate": 448, "vocab": 4000}
"""As many layers as a Llama-3-8B, so that their inputs are most of what checkpointing keeps."""
LENGTHS_SHOWN = (1024, 2048, 4096, 8192, 16384)
SERIES = {
    "inductor": ("plain", "tab:blue", "-"),
    "inductor+checkpoint": ("checkpointing", "tab:blue", "--"),
    "mst": ("mst", "tab:orange", "-"),
    "mst+checkpoint": ("mst + checkpointing", "tab:orange", "--"),
}
"""System -> what the picture calls it, colour, line."""
LENGTH_SYSTEMS = tuple(SERIES)
MEASUREMENTS: dict[str, Turns | Cells | Script] = {
    "head-fp32": Turns("head", "float32", ("inductor", "mst"), {}),
    "head-fp32-batch2": Turns("head", "float32", ("inductor", "mst"), {"batch": 2}),
    "head-bf16": Turns("head", "bfloat16", ("inductor", "auto_chunker", "mst", "mst parameter"), {}),
    "head-bf16-batch2": Turns("head", "bfloat16", ("inductor", "mst parameter"), {"batch": 2}),
    "head-peak": Cells("head", "bfloat16", ("inductor", "auto_chunker", "mst", "mst parameter"), {}, error=True),
    "mlp-bf16": Turns("mlp", "bfloat16", ("inductor", "mst", "mst parameter", "chunk checkpoint"), {}),
    "mlp-fp32": Turns("mlp", "float32", ("inductor+checkpoint", "mst"), {}),
    "mlp-peak": Cells("mlp", "bfloat16", ("inductor", "mst", "mst parameter", "chunk checkpoint"), {}, error=True),
    "llama": Turns("llama", "float32", ("inductor", "mst"), {}),
    "llama-checkpointing": Turns("llama", "float32", ("inductor", "mst"), CHECKPOINTING),
    "llama-peak": Cells("llama", "float32", ("inductor", "mst"), {}),
    "llama-checkpointing-peak": Cells("llama", "float32", ("inductor", "mst"), CHECKPOINTING),
    "llama-2k": Cells("llama", "float32", ("inductor",), {"seq_len": 2048}, steps=0),
    "llama-16k": Cells("llama", "float32", ("inductor",), {"seq_len": 16384}, steps=0),
    "llama-2k-checkpointing": Cells(
        "llama", "float32", ("inductor", "mst"), {"seq_len": 2048, **CHECKPOINTING}, steps=0
    ),
    "llama-16k-checkpointing": Cells(
        "llama", "float32", ("inductor", "mst"), {"seq_len": 16384, **CHECKPOINTING}, steps=0
    ),
    "llama-deep": Turns("llama", "float32", CHECKPOINTED_MODELS, {"seq_len": 2048, **DEEP}),
    "llama-deep-peak": Cells("llama", "float32", CHECKPOINTED_MODELS, {"seq_len": 8192, **DEEP}, steps=0),
    "llama-256": Turns("llama", "float32", ("inductor", "mst"), {"seq_len": 256}),
    "llama-512": Turns("llama", "float32", ("inductor", "mst"), {"seq_len": 512}),
    "llama-compile": Cells("llama", "float32", ("inductor", "mst"), {"layers": 8}, rounds=3, steps=0, warm=7),
    **{
        f"length-{n}": Cells("llama", "float32", LENGTH_SYSTEMS, {"seq_len": n, **HALF}, steps=0) for n in LENGTHS_SHOWN
    },
    **{
        f"length-{n}-time": Turns("llama", "float32", LENGTH_SYSTEMS, {"seq_len": n, **HALF}) for n in LENGTHS_SHOWN[:4]
    },
    "lengths": Script(SMALL_LLAMA + LENGTHS),
    "caches": Script(SMALL_LLAMA + MISSES, times=2),
    "overhead": Script(OVERHEAD),
}


def too_slow_here(name: str) -> str | None:
    """Return why this machine can't run a measurement in reasonable time, None where it can."""
    measured = MEASUREMENTS[name]
    if isinstance(measured, Script):
        return None
    return too_much(measured.work, check_sizes(measured.work, measured.shapes), measured.dtype)


def _output(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def save(name: str, rows: Rows) -> None:
    """Write a measurement's rows as JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


def load(name: str) -> Rows | None:
    """Return a measurement's saved rows, None where it was not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
