"""One command for each question a GPU is needed for: checks, measures, prints one table, in under ten minutes.

    python -m benchmarks.gpu head | mlp | model | longest        # Llama-3-8B's shapes, bf16, random weights
    python -m benchmarks.gpu longest --tiny --device cpu         # the same path on small shapes, to try it

``head``, ``mlp`` and ``model`` first compare the gradients of a smaller work with fp64, then ask ``mst-fx bench``.
``longest`` looks for the longest sequence that trains in 80 GB (or ``--gigabytes``; 0 for the whole card) with
checkpointing and AdamW stepped inside the backward, compiled by layer: S doubles until memory runs out, then the gap
is halved twice. ``--lengths 8192,65536`` measures these instead, system by system.
Rows are saved as ``benchmarks/results/gpu-QUESTION.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mst_fx
from mst_fx.bench.cell import OUT_OF_MEMORY, describe, device_name, timed_step, versions
from mst_fx.bench.questions import (
    GRACE_SECONDS,
    WORK_OF,
    Cell,
    Question,
    ask,
    environment,
    plan,
    run_cell,
    save_rows,
)
from mst_fx.bench.tables import summary, table
from mst_fx.bench.turns import by_turns
from mst_fx.bench.works import LLAMA3_8B, WORKS
from mst_fx.commands.models import DTYPES, UsageError

RESULTS = Path(__file__).parent / "results"
MINUTES = 8.0
STEPS = 3
MORE_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "head": ({}, {"chunk_tokens": 1024}, {"chunk_tokens": 2048}),
    "mlp": ({}, {"chunk_tokens": 4096}),
}
"""What ours is measured with by ``--together``."""
TINY: dict[str, dict[str, Any]] = {
    "head": {"tokens": 512, "hidden": 64, "vocab": 2000},
    "mlp": {"tokens": 512, "hidden": 64, "intermediate": 224},
    "model": {"seq_len": 256, "layers": 2, "hidden": 64, "intermediate": 224, "vocab": 1000, "heads": 4, "kv_heads": 2},
}
CHECKED: dict[str, dict[str, Any]] = {
    "head": {"tokens": 3001, "hidden": 1024, "vocab": 16000},
    "mlp": {"tokens": 6001, "hidden": 1024, "intermediate": 3584},
    "model": {"seq_len": 1501, "layers": 2, "hidden": 512, "intermediate": 1792, "vocab": 8000},
}


def parser() -> argparse.ArgumentParser:
    """Return the arguments."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("question", choices=["head", "mlp", "model", "longest"])
    found.add_argument("--device", default="cuda")
    found.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    found.add_argument("--gigabytes", type=float, default=80.0)
    found.add_argument("--minutes", type=float, default=MINUTES)
    found.add_argument("--steps", type=int, default=STEPS, help="timed steps of every system, the first not counted")
    found.add_argument("--no-check", action="store_true", help="do not compare gradients with fp64 first")
    found.add_argument("--together", action="store_true", help="all systems by turns in one process")
    found.add_argument("--start", type=int, help="longest: the first length tried")
    found.add_argument("--lengths", help="longest: comma-separated, instead of the search")
    found.add_argument(
        "--checkpoint-layers", type=int, default=1, help="longest: layers recomputed together, mst.checkpoint_layers"
    )
    found.add_argument("--systems", help="comma-separated; longest: mst,inductor, the first gets most of the time")
    found.add_argument("--trial", help=argparse.SUPPRESS)
    return found


def main() -> int:
    """Run what was asked for; 1 if a check fails."""
    args = parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here; --tiny --device cpu tries the script\n")
        return 2
    if args.trial:
        system, length = args.trial.split(":")
        sys.stdout.write(json.dumps(trial(args, system, int(length))) + "\n")
        return 0
    try:
        return longest(args) if args.question == "longest" else measure(args)
    except UsageError as e:
        sys.stderr.write(f"{e}\n")
        return 2


def measure(args: argparse.Namespace) -> int:
    """Check the gradients on a smaller work, then measure every system."""
    name, started = args.question, time.monotonic()
    given = args.systems or ("inductor,mst" if name == "model" else "")
    question = Question(
        name, args.device, "bfloat16", None if args.tiny else "llama3-8b", tuple(given.split(",")) if given else (),
        TINY[name] if args.tiny else {}, {"chunk_tokens": 128} if args.tiny else {}, steps=args.steps,
    )  # fmt: skip
    cells = plan(question)  # mistakes are told before anything runs
    if args.together and name == "model":
        raise UsageError("--together goes with head and mlp: an optimizer's steps would change the next system's work")
    good, told = (True, "gradients not checked") if args.no_check else _check(args)
    question = dataclasses.replace(question, minutes=args.minutes - (time.monotonic() - started) / 60)
    if args.together:
        rows = together(question, cells)
    else:
        rows = ask(question, lambda label, i, n: sys.stderr.write(f"{i} of {n}: {label}\n"))
    save_rows(RESULTS / f"gpu-{name}{'-tiny' if args.tiny else ''}.json", question, rows)
    _show(question, rows)
    sys.stdout.write(told + "\n")
    return 0 if good else 1


def _show(question: Question, rows: list[dict[str, Any]]) -> None:
    header, lines = table(question, rows)
    shown = Table(*header, title=summary(question, rows))
    for line in lines:
        shown.add_row(*line)
    Console(width=130).print(shown)


def together(question: Question, cells: list[Cell]) -> list[dict[str, Any]]:
    """Run systems by turns in this process: seconds instead of minutes for the starts, and all see one clock.

    Ours is measured with other chunk sizes too, so that peers meet it at their own peak.
    """
    work = WORKS[WORK_OF[question.name]](**cells[0].shapes, dtype=DTYPES[question.dtype], device=question.device)
    variants: dict[str, tuple[str, dict[str, Any]]] = {}
    for cell in cells:
        ours = cell.system.startswith("mst")
        for more in MORE_OPTIONS[question.name] if ours else ({},):
            options = {**question.options, **more} if ours else {}
            variants[", ".join([cell.system, *(f"{k} {v}" for k, v in options.items())])] = (cell.system, options)

    def show(label: str, row: dict[str, Any]) -> None:
        found = row.get("reason") or f"first step {row['first_s']:.1f} s, peak {row['peak_bytes'] / 2**30:.2f} GiB"
        sys.stderr.write(f"{label}: {found}\n")

    measured = by_turns(work, variants, question.steps, question.device, peaks=True, progress=show)
    rows = []
    for label, row in measured.items():
        if "reason" not in row:
            step = statistics.median(row["steps_s"])
            row |= {"step_s": step, "tokens_per_s": work.tokens / step}
        about = describe(work.name, cells[0].shapes, variants[label][1], question.dtype, question.device)
        rows.append({"system": label, **about, "caches": "cold", **row})
    return rows


def _check(args: argparse.Namespace) -> tuple[bool, str]:
    """Compare the gradients' errors against fp64: ours at most 1.02 of plain Inductor's, or 1.12 on a CPU."""
    name = args.question
    shapes = TINY[name] if args.tiny else CHECKED[name]
    question = Question(name, args.device, "bfloat16", options={"chunk_tokens": 128 if args.tiny else 512}, steps=1)
    errors = {}
    for system in ("inductor", "mst"):
        with tempfile.TemporaryDirectory() as folder:
            row = run_cell(question, Cell(system, shapes), folder, "--error")
        if "reason" in row:
            return False, f"check: {system} failed: {row['reason']}"
        errors[system] = row["gradient_error"]
    ratio = errors["mst"] / errors["inductor"]
    good = ratio <= (1.12 if args.device == "cpu" else 1.02)
    return good, f"check: error against fp64 {errors['mst']:.2e}, Inductor {errors['inductor']:.2e}: {ratio:.3f}" + (
        "" if good else " FAILED"
    )


# -- the longest sequence ----------------------------------------------------------------------------


def longest(args: argparse.Namespace) -> int:
    """Find the longest sequence of each system, or measure the lengths asked for."""
    rows: list[dict[str, Any]] = []
    systems = (args.systems or "mst,inductor").split(",")
    if not {"mst", "inductor"}.issuperset(systems):
        raise UsageError(f"--systems {args.systems}: mst, inductor or both for longest")
    if not all(n.isdecimal() and int(n) for n in (args.lengths or "1").split(",")):
        raise UsageError(f"--lengths {args.lengths}: numbers of at least 1, with commas between")
    path = RESULTS / f"gpu-{'lengths' if args.lengths else 'longest'}{'-tiny' if args.tiny else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tried(system: str, length: int, until: float) -> dict[str, Any]:
        row = _trial_apart(args, system, length, until - time.monotonic() + GRACE_SECONDS)
        told = row.get("reason") or f"{row['step_s']:.1f} s, {row['peak_gb']:.1f} GB"
        sys.stderr.write(f"{system} at S {length}: {told}\n")
        rows.append(row)
        path.write_text(json.dumps({"gigabytes": args.gigabytes, "rows": rows}, indent=1) + "\n")
        return row

    if args.lengths:
        for length in map(int, args.lengths.split(",")):
            for system in systems:
                tried(system, length, started + 60 * args.minutes)
        return _show_lengths(rows)
    for i, system in enumerate(systems):
        until = started + 60 * args.minutes * (0.7 if i == 0 and len(systems) > 1 else 1)
        _search(args, system, until, tried)
    shown = Table("system", "longest S that trained", "shortest that did not", "s a step there", "peak GB")
    for system in systems:
        shown.add_row(system, *_longest_of([r for r in rows if r["system"] == system]))
    Console(width=130).print(shown)
    return 0 if any("reason" not in r for r in rows) else 1


def _search(
    args: argparse.Namespace, system: str, until: float, tried: Callable[[str, int, float], dict[str, Any]]
) -> None:
    good, bad, halvings = 0, 0, 0
    length = args.start or (256 if args.tiny else 16384)
    while time.monotonic() < until and halvings < 3:
        reason = tried(system, length, until).get("reason")
        if reason not in (None, OUT_OF_MEMORY):
            return
        good, bad = (good, length) if reason else (length, bad)
        halvings += bool(bad)
        length = 2 * length if not bad else (good + bad) // 2 // 256 * 256
        if length in (good, 0) or (args.tiny and length > 1024):
            return


def _show_lengths(rows: list[dict[str, Any]]) -> int:
    shown = Table("system", "S", "s a step", "tokens/s", "peak GB", "first step s")
    for row in rows:
        told = [row["reason"]] if "reason" in row else [
            f"{row['step_s']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['peak_gb']:.1f}", f"{row['first_s']:.0f}"
        ]  # fmt: skip
        shown.add_row(row["system"], str(row["seq_len"]), *told)
    Console(width=130).print(shown)
    return 1 if any("reason" in r for r in rows) else 0


def _longest_of(rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    fits = max((r for r in rows if "reason" not in r), key=lambda r: r["seq_len"], default=None)
    full = min((r["seq_len"] for r in rows if r.get("reason") == OUT_OF_MEMORY), default=None)
    other = next((r["reason"] for r in rows if r.get("reason", OUT_OF_MEMORY) != OUT_OF_MEMORY), "not reached")
    most = other if full is None else str(full)
    if fits is None:
        return "none", most, "", ""
    return str(fits["seq_len"]), most, f"{fits['step_s']:.1f}", f"{fits['peak_gb']:.1f}"


def _trial_apart(args: argparse.Namespace, system: str, length: int, seconds: float) -> dict[str, Any]:
    tiny = ["--tiny"] if args.tiny else []
    command = [
        sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "longest", "--device", args.device, *tiny,
        "--gigabytes", str(args.gigabytes), "--steps", str(args.steps), "--trial", f"{system}:{length}",
        "--checkpoint-layers", str(args.checkpoint_layers),
    ]  # fmt: skip
    named = {"system": system, "seq_len": length}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(args.device), check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {**named, "reason": f"out of time at S {length}"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {**named, "reason": OUT_OF_MEMORY if OUT_OF_MEMORY in done.stderr.lower() else last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


class Layers(torch.nn.Module):
    """Decoder layers with their checkpointing inside, so that all of it is in one graph."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        return hidden


def by_layer(model: Any, system: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Compile every layer (or as many as are recomputed together), and head with loss, apart.

    One graph for all would hand over all weight gradients at its end, and an optimizer inside the backward would
    free none of them before.
    """
    backend = {"backend": "mst", "options": {f"mst.{k}": v for k, v in options.items()}} if system == "mst" else {}
    layers, size = list(model.model.layers), options.get("checkpoint_layers", 1)
    model.model.layers = torch.nn.ModuleList(Layers(layers[i : i + size]) for i in range(0, len(layers), size))
    for layer in model.model.layers:
        layer.compile(**backend)

    def loss(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model.loss_function(logits=model.lm_head(hidden), labels=labels, vocab_size=model.config.vocab_size)

    head = torch.compile(loss, **backend)

    def run(input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=head(model.model(input_ids=input_ids).last_hidden_state, labels))

    return run


def trial(args: argparse.Namespace, system: str, length: int) -> dict[str, Any]:
    """Run training steps at one length; AdamW steps each weight as soon as its gradient is there."""
    cuda = args.device == "cuda"
    if cuda and args.gigabytes:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, args.gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)
        )
    torch.manual_seed(0)
    shapes = {**TINY["model"]} if args.tiny else {**LLAMA3_8B}
    shapes |= {"seq_len": length, "checkpointing": True}
    work = WORKS["llama"](**shapes, dtype=torch.bfloat16, device=args.device)
    optimizers = {p: torch.optim.AdamW([p], lr=1e-5, foreach=False, fused=cuda) for p in work.module.parameters()}

    for parameter, optimizer in optimizers.items():  # its state is there from the first step on, so that one tells
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None

    def step_now(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step_now)
    torch._dynamo.config.recompile_limit = 64
    options = {"checkpoint_layers": args.checkpoint_layers, **({"chunk_tokens": 128} if args.tiny else {})}
    fn = by_layer(work.module, system, options)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = timed_step(work, fn, args.device)
    times = [timed_step(work, fn, args.device) for _ in range(args.steps)]
    step = statistics.median(times or [first])
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    kinds = sorted(
        region.kind for report in mst_fx.reports() for region in report.regions if region.status == "chunked"
    )
    return {
        "system": system, "seq_len": length, "first_s": first, "step_s": step, "steps_s": times,
        "tokens_per_s": length / step, "peak_gb": peak / 1e9,
        "reserved_gb": (torch.cuda.max_memory_reserved() if cuda else 0) / 1e9, "chunked": kinds,
        "checkpoint_layers": args.checkpoint_layers,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"], "shapes": shapes,
        "device": device_name(args.device), "versions": versions(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
