"""The ``mst-fx`` command."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from mst_fx.bench.command import add_arguments, run_bench
from mst_fx.check import Check, IncomparableError, check
from mst_fx.config import OptionError
from mst_fx.dry_run import explain
from mst_fx.graph_diff import Hunk, hunks
from mst_fx.models import (
    ModelSpec,
    Subject,
    UsageError,
    build_model,
    parse_options,
    parse_pairs,
    short_traceback,
)
from mst_fx.page import check_writable, page_text
from mst_fx.render import memory, saved_text
from mst_fx.report import Report


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 on failure, 2 on a mistake in the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["finetune"]:  # its flags are those of Trainer
        return _answer("finetune", lambda: _finetune(argv[1:]))
    args = _parser().parse_args(argv)
    return _answer(args.command, lambda: args.run(args))


def _answer(command: str, run: Callable[[], int]) -> int:
    try:
        return int(run())
    except (UsageError, OptionError) as e:
        if int(os.environ.get("RANK", "0")) == 0:  # under a launcher all processes say the same
            print(f"mst-fx {command}: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mst-fx", description="See what the mst backend does.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small Llama with plain Inductor and with mst, side by side")
    demo.add_argument("--out", default="demo-out", help="folder for the plot and the figures")
    demo.add_argument("--device", choices=["cpu", "cuda"])
    demo.add_argument("--steps", type=_at_least(2), help="training steps for each backend")
    demo.add_argument("--seq-len", type=_at_least(64), help="tokens per step")
    demo.set_defaults(run=_demo)
    shared = _model_arguments()
    explained = commands.add_parser(
        "explain", parents=[shared], help="say what would be chunked in a model, and why the rest would not"
    )
    explained.add_argument("--format", choices=["text", "json"], default="text")
    explained.add_argument("--saved", action="store_true", help="account for what is kept between forward and backward")
    explained.set_defaults(run=_explain)
    diff = commands.add_parser("diff", parents=[shared], help="show a model's graph before and after")
    diff.add_argument("--format", choices=["text", "json", "html"], default="text")
    diff.add_argument("--backward", action="store_true", help="print the backward of every chunk body too")
    diff.add_argument("--html", metavar="FILE", help="write the page too")
    diff.add_argument("--check", action="store_true", help="run it: compare with plain and fp64; status 1 if worse")
    diff.add_argument("--compiler", choices=["aot_eager", "inductor"], help="what compiles both for --check")
    diff.add_argument("--tolerance", type=float, help="how much larger our relative error may be, for --check")
    diff.set_defaults(run=_diff)
    commands.add_parser(
        "finetune", help="fine-tune a causal LM at a long context; takes Trainer's flags", add_help=False
    )
    bench = commands.add_parser("bench", help="measure mst and its peers on the same work, a process for each")
    add_arguments(bench)
    bench.set_defaults(run=run_bench)
    return parser


def _finetune(argv: list[str]) -> int:
    try:
        from mst_fx.finetune.train import run_finetune
    except ImportError as e:
        raise UsageError(f"{e}; install the extra: pip install 'mst_fx[finetune]'") from e
    return run_finetune(argv)


def _model_arguments() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    model = shared.add_mutually_exclusive_group(required=True)
    model.add_argument("--entry", metavar="MODULE:FUNCTION", help="a function: (model, inputs), inputs a dict or tuple")
    model.add_argument("--hf", metavar="PATH_OR_TYPE", help="a causal LM: a folder with config.json, or a model type")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="config value, with --hf")
    shared.add_argument("--batch", type=_at_least(1), help="with --hf (1)")
    shared.add_argument("--seq-len", type=_at_least(1), help="with --hf (1024)")
    shared.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    shared.add_argument("--device")
    shared.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, with --hf")
    shared.add_argument("--fake", action="store_true", help="trace with fake tensors: no memory for any size")
    shared.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="e.g. chunk_tokens=512, or Inductor's"
    )
    shared.add_argument("--out", metavar="FILE", help="write there rather than on the terminal")
    return shared


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "int"
    return parse


def _demo(args: argparse.Namespace) -> int:
    try:
        importlib.import_module("transformers")
        importlib.import_module("rich")
        importlib.import_module("matplotlib")
    except ImportError as e:
        raise UsageError(f"{e}; install the extra: pip install 'mst_fx[demo]'") from e
    from mst_fx.demo import run_demo

    return run_demo(args.out, args.device, args.steps, args.seq_len)


def _explain(args: argparse.Namespace) -> int:
    report, _ = _report(args)
    if args.format == "json":
        kept = {"memory": _memory(report, saved=True)} if args.saved else {}
        text = json.dumps({**report.to_dict(), **kept}, indent=1)
    else:
        text = f"{report}\n{saved_text(report)}" if args.saved else str(report)
    _write(args.out, text)
    return 0


def _diff(args: argparse.Namespace) -> int:
    if args.check and args.fake:
        raise UsageError("--check runs the model, and fake tensors hold no numbers; leave out --check or --fake")
    if not args.check and (args.compiler or args.tolerance is not None):
        raise UsageError("--compiler and --tolerance go with --check")
    report, subject = _report(args)
    if args.html:
        report.to_html(args.html)
    checked = _check(args, subject) if args.check else None
    if args.format == "json":
        data = {**report.to_dict(), "memory": _memory(report), "hunks": [_hunk(h) for h in hunks(report)]}
        text = json.dumps({**data, "check": checked.to_dict()} if checked else data, indent=1)
    elif args.format == "html":
        text = page_text(report)
    else:
        text = report.diff(args.backward, colour=not args.out and _has_colour())
        text = f"{text}\n\n{checked}" if checked else text
    _write(args.out, text)
    if checked and checked.failures and args.format == "html":
        print(checked, file=sys.stderr)
    return 1 if checked and checked.failures else 0


def _memory(report: Report, saved: bool = False) -> list[dict[str, Any]]:
    """Return per graph what a step is estimated to take before and after, and what is kept for the backward."""
    found, _ = memory(report)
    names = ("peak_bytes", "saved_bytes", "largest_bytes", "largest")

    def data(timeline: Any) -> dict[str, Any]:
        values = {"saved": [dataclasses.asdict(s) for s in timeline.saved]} if saved else {}
        return {**{n: getattr(timeline, n) for n in names}, **values}

    return [{"before": data(before), "after": data(after)} for before, after in found]


def _hunk(hunk: Hunk) -> dict[str, Any]:
    return {**dataclasses.asdict(hunk), "places": hunk.places}


def _report(args: argparse.Namespace) -> tuple[Report, Subject]:
    """Make the model and trace it; what can be wrong with the command line is found before."""
    for path in (args.out, getattr(args, "html", None)):
        if path:
            try:
                check_writable(path)
            except OSError as e:
                raise UsageError(f"{path} can't be written: {os.strerror(e.errno or 0)}") from e
    options = parse_options(args.option)
    _progress("making the model")
    subject = build_model(
        ModelSpec(
            args.entry, args.hf, parse_pairs(args.set), args.batch, args.seq_len, args.dtype, args.device,
            args.checkpointing, args.fake,
        )
    )  # fmt: skip
    _progress("tracing it")
    try:
        return explain(subject.model, options)(*subject.args, **subject.kwargs), subject
    except Exception as e:
        raise UsageError(f"the model raised when it ran on its inputs:\n{short_traceback(e)}") from e


def _check(args: argparse.Namespace, subject: Subject) -> Check:
    options = parse_options(args.option)
    try:
        return check(
            subject.model, subject.args, subject.kwargs,
            options=options, compiler=args.compiler or "aot_eager", tolerance=args.tolerance, progress=_progress,
        )  # fmt: skip
    except IncomparableError as e:
        raise UsageError(f"--check: {e}") from e


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"mst-fx: {message}", file=sys.stderr, flush=True)


def _write(path: str | None, text: str) -> None:
    if path:
        pathlib.Path(path).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


def _has_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    sys.exit(main())
