"""``mst-fx demo``: a small Llama on real text at a long sequence, with plain Inductor and with mst.

The text is what every machine has: the sources of the Python standard library, byte by byte. Each backend
trains in a process of its own from the same seed; the processes report steps as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from mst_fx.measure import MALLOC_ENV, keep_freed_memory, peak_over_start, prepare_compiler
from mst_fx.plan import format_bytes

SIZES = {
    "cpu": {"hidden": 128, "intermediate": 512, "layers": 2, "heads": 4, "seq_len": 8192, "steps": 6},
    "cuda": {"hidden": 1024, "intermediate": 4096, "layers": 16, "heads": 16, "seq_len": 65536, "steps": 30},
}
SYSTEMS = ("inductor", "mst")


def standard_library_text(limit: int = 4_000_000) -> bytes:
    """Return the sources of the Python standard library, files in order of name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return bytes(text)


def train(system: str, device: str, steps: int, seq_len: int) -> None:
    """Train with one backend and print a JSON line per step, then one with the memory and the report."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = SIZES[device]
    config = LlamaConfig(
        hidden_size=size["hidden"], intermediate_size=size["intermediate"], num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"], vocab_size=256, max_position_embeddings=seq_len, use_cache=False,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    compiled = torch.compile(model, backend=system)
    text = torch.frombuffer(bytearray(standard_library_text()), dtype=torch.uint8)

    def step() -> float:
        start = int(torch.randint(0, len(text) - seq_len, ()))
        ids = text[start : start + seq_len].long()[None].to(device)
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for i in range(steps):
        began = time.perf_counter()
        # An early step measures memory: optimizer states exist by then, and nothing compiles.
        peak, loss = peak_over_start(step, device) if i == min(2, steps - 1) else (0, step())
        row = {"step": i, "loss": loss, "seconds": time.perf_counter() - began, "peak": peak}
        print(json.dumps(row), flush=True)
        if peak:
            keep_freed_memory()
    if system == "mst":
        import mst_fx

        print(json.dumps({"report": "\n".join(map(str, mst_fx.reports()))}), flush=True)


def run_demo(out: str, device: str | None, steps: int | None, seq_len: int | None) -> int:
    """Train with both backends, show a table, write a plot; returns the exit status."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mst_fx.commands.models import UsageError  # not above: it imports Inductor, a part of what is timed

    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; leave out --device or use --device cpu")
    steps, seq_len = steps or SIZES[device]["steps"], seq_len or SIZES[device]["seq_len"]
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--out {out}: no folder can be made there ({e.strerror or e})") from e
    console.print(
        f"A Llama of {SIZES[device]['layers']} layers on {seq_len} bytes of Python sources per step, {device}"
    )
    results: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[info]}"))  # fmt: skip
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, **MALLOC_ENV, "TORCHINDUCTOR_CACHE_DIR": cache}
        task = progress.add_task("torch", total=1, info="building its C++ header")
        prepare_compiler(env)
        progress.update(task, advance=1, info="ready")
        for system in SYSTEMS:
            task = progress.add_task(system, total=steps, info="compiling")
            command = [system, device, str(steps), str(seq_len)]
            results[system] = _watch(command, env, lambda row, t=task: _show(progress, t, row, seq_len))
            if "error" in results[system]:
                console.print(f"[red]{system} failed:[/]\n{results[system]['error']}")
                return 1
    _table(console, results, seq_len)
    console.print(results["mst"]["report"], highlight=False, soft_wrap=True)
    plot = folder / "demo.png"
    _plot(plot, results)
    (folder / "demo.json").write_text(json.dumps(results, indent=1))
    console.print(f"plot: {plot}")
    return 0


def _watch(arguments: list[str], env: dict[str, str], show: Any) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "mst_fx.commands.demo", *arguments]
    rows, report = [], ""
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe that nobody reads yet would fill up
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            if "report" in row:
                report = row["report"]
            else:
                rows.append(row)
                show(row)
        if process.wait():
            errors.seek(0)
            return {"error": errors.read()[-4000:]}
    return {"rows": rows, "report": report}


def _show(progress: Any, task: Any, row: dict[str, Any], seq_len: int) -> None:
    speed = f"{seq_len / row['seconds']:,.0f} tokens/s" if row["step"] else f"compiled in {row['seconds']:.0f} s"
    progress.update(task, advance=1, info=f"loss {row['loss']:.3f}, {speed}")


def _table(console: Any, results: dict[str, dict[str, Any]], seq_len: int) -> None:
    from rich.table import Table

    table = Table(title="plain Inductor and mst")
    for name in ("", *SYSTEMS, "mst / inductor"):
        table.add_column(name, justify="right")
    figures: dict[str, list[float]] = {"peak memory": [], "tokens/s": [], "first step (s)": []}
    for system in SYSTEMS:
        rows = results[system]["rows"]
        seconds = sorted(r["seconds"] for r in rows[1:])
        figures["peak memory"].append(max(r["peak"] for r in rows))
        figures["tokens/s"].append(seq_len / seconds[len(seconds) // 2])
        figures["first step (s)"].append(rows[0]["seconds"])
    for name, (plain, ours) in figures.items():
        show = (lambda v: format_bytes(int(v))) if name == "peak memory" else (lambda v: f"{v:,.1f}")
        table.add_row(name, show(plain), show(ours), f"{ours / plain:.2f}")
    for plain, ours in zip(results["inductor"]["rows"], results["mst"]["rows"], strict=True):
        table.add_row(f"loss, step {plain['step']}", f"{plain['loss']:.5f}", f"{ours['loss']:.5f}", "")
    console.print(table)


def _plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for system, style in zip(SYSTEMS, ("-", "--"), strict=True):
        left.plot([r["loss"] for r in results[system]["rows"]], style, label=system)
    left.set(xlabel="step", ylabel="loss", title="the same loss")
    left.legend()
    peaks = [max(r["peak"] for r in results[s]["rows"]) / 2**20 for s in SYSTEMS]
    bars = right.bar(SYSTEMS, peaks, color=["C0", "C1"])
    right.bar_label(bars, fmt="%.0f MiB")
    right.set(ylabel="peak memory over start (MiB)", title="a fraction of the memory")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One training run of the demo; `mst-fx demo` starts it.")
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("device")
    parser.add_argument("steps", type=int)
    parser.add_argument("seq_len", type=int)
    train(**vars(parser.parse_args()))
