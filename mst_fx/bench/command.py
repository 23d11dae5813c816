"""The arguments and the output of ``mst-fx bench``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mst_fx.bench.cell import AS_MADE
from mst_fx.bench.questions import LENGTHS, WORK_OF, Question, ask, load_rows, plan, save_rows
from mst_fx.bench.systems import SYSTEMS
from mst_fx.bench.tables import markdown, plot, summary, table
from mst_fx.bench.works import SHAPES
from mst_fx.commands.models import DTYPES, UsageError, parse_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("question", choices=WORK_OF, help="what is compared")
    named = parser.add_mutually_exclusive_group()
    named.add_argument("--model", choices=SHAPES, help="shapes of a model; sizes given with --set win")
    named.add_argument(
        "--hf", metavar="PATH_OR_TYPE", help="for model, length, compile: this causal LM; --set goes to its config"
    )
    named.add_argument(
        "--entry", metavar="MODULE:FUNCTION", help="for model, compile: a function that returns (model, inputs)"
    )
    parser.add_argument("--seq-len", type=int, help="S of --hf (1024)")
    parser.add_argument("--batch", type=int, help="B of --hf (1)")
    parser.add_argument("--systems", help=f"comma-separated, all that fit by default; of {', '.join(SYSTEMS)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, else float32; --entry: as made")
    parser.add_argument("--set", action="append", default=[], metavar="SIZE=N", help="e.g. tokens=4096, layers=8")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of mst, e.g. chunk_tokens=512"
    )
    parser.add_argument("--lengths", help=f"for length: S, comma-separated ({','.join(map(str, LENGTHS['cpu']))})")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per cell (3)")
    parser.add_argument("--rounds", type=int, default=1, help="times every cell is run, the systems by turns (1)")
    parser.add_argument("--minutes", type=float, help="start no cell after this long")
    parser.add_argument("--out", metavar="FILE", help="save the rows as JSON")
    parser.add_argument("--rows", metavar="FILE", help="run nothing; show the rows saved there")
    parser.add_argument("--plot", metavar="FILE", help="draw a PNG")
    parser.add_argument("--format", choices=["table", "markdown"], default="table")


def run_bench(args: argparse.Namespace) -> int:
    """Carry out the command.

    Raises:
        UsageError: On a mistake in the command line.
    """
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install the extra: pip install 'mst_fx[demo]'")
    if args.rows:
        given = [n for n in ("out", "systems", "lengths", "minutes", "set", "option") if getattr(args, n)]
        if given:
            raise UsageError(f"--rows shows saved rows and runs nothing: --{given[0]} does not go with it")
    saved = load_rows(Path(args.rows)) if args.rows else None
    question = read_question(args) if saved is None else saved[0]
    if question.name != args.question:
        raise UsageError(f"{args.rows} answers {question.name!r}, not {args.question!r}")
    if saved is None:
        plan(question)  # mistakes are told before anything runs
    for path in (args.out, args.plot):
        if path:
            _check_writable(Path(path))
    rows = _ask(question, args.out) if saved is None else saved[1]
    if args.plot:
        plot(question, rows, Path(args.plot))
    header, lines = table(question, rows)
    if args.format == "markdown":
        sys.stdout.write(f"{summary(question, rows)}\n\n{markdown(header, lines)}\n")
    else:
        _print(summary(question, rows), header, lines)
    return 0 if any("reason" not in r for r in rows) else 1


def read_question(args: argparse.Namespace) -> Question:
    """Return what the command line asks, defaults filled in."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        lengths = tuple(int(n) for n in args.lengths.split(",")) if args.lengths else ()
    except ValueError as e:
        raise UsageError(f"--lengths {args.lengths}: numbers with commas between") from e
    usual = AS_MADE if args.entry else "bfloat16" if device.startswith("cuda") else "float32"
    return Question(
        args.question, device, args.dtype or usual, args.model,
        tuple(args.systems.split(",")) if args.systems else (), _shapes(args), parse_pairs(args.option),
        lengths, args.steps, args.rounds, args.minutes,
    )  # fmt: skip


def _shapes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes of the work; for a model of the user's what ``ModelSpec`` takes.

    Raises:
        UsageError: If flags don't go together.
    """
    settings = parse_pairs(args.set)
    sizes = {k: v for k, v in (("seq_len", args.seq_len), ("batch", args.batch)) if v is not None}
    for name, value in sizes.items():
        if not args.hf:
            raise UsageError(f"--{name.replace('_', '-')} goes with --hf; sizes of the works here are --set NAME=N")
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1")
    if not (args.hf or args.entry):
        return settings
    if args.hf and args.question in ("head", "mlp"):
        raise UsageError("--hf goes with model, length and compile")
    if args.entry and args.question not in ("model", "compile"):
        raise UsageError("--entry goes with model and compile; its function makes inputs of one length")
    if args.entry:
        if settings:
            raise UsageError("--set goes with --hf; the function of --entry makes its own model and inputs")
        return {"entry": args.entry}
    return {"hf": args.hf, "seq_len": 1024, **sizes, **({"settings": settings} if settings else {})}


def _check_writable(path: Path) -> None:
    """Raise unless a file can be written there; folders on the way are made when it is."""
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())).close()
    except OSError as e:
        raise UsageError(f"{path} can't be written: {e.strerror}") from e


def _ask(question: Question, out: str | None) -> list[dict[str, Any]]:
    """Run the cells with a progress bar; rows are saved as they come."""

    def keep(rows: list[dict[str, Any]]) -> None:
        if out:
            save_rows(Path(out), question, rows)

    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return ask(question, _say, keep)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(question.name, total=None)

        def advance(label: str, done: int, total: int) -> None:
            bar.update(task, description=f"{question.name}: {label}", completed=done, total=total)

        return ask(question, advance, keep)


def _say(label: str, done: int, total: int) -> None:
    if done < total:
        sys.stderr.write(f"mst-fx bench: {done + 1} of {total}, {label}\n")


def _print(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    """Print columns; a reason runs over the empty columns after it."""
    widths = [max([len(h), *(len(line[i]) for line in lines if any(line[i + 1 :]))]) for i, h in enumerate(header)]
    sys.stdout.write(f"{title}\n")
    for line in (header, *lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(f"  {text.rstrip()}\n")
