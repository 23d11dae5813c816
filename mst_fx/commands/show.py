"""``mst-fx explain`` and ``mst-fx diff``: make the model, trace it, show what the backend does."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from mst_fx.commands.check import Check, IncomparableError, check
from mst_fx.commands.models import (
    ModelSpec,
    Subject,
    UsageError,
    build_model,
    parse_options,
    parse_pairs,
    short_traceback,
)
from mst_fx.config import NothingChunkedError
from mst_fx.diff.graph_diff import Hunk, hunks
from mst_fx.diff.page import check_writable, page_text
from mst_fx.diff.render import memory, saved_text
from mst_fx.dry_run import explain
from mst_fx.regions.promise_check import PromiseError
from mst_fx.report import Report
from mst_fx.verify import VerifyError


def run_explain(args: argparse.Namespace) -> int:
    """Say what would be chunked, and what can be done about the rest; returns the exit status."""
    report, _ = _report(args)
    if args.format == "json":
        kept = {"memory": _memory(report, saved=True)} if args.saved else {}
        text = json.dumps({**report.to_dict(), **kept}, indent=1)
    else:
        text = f"{report}\n{saved_text(report)}" if args.saved else str(report)
    _write(args.out, text)
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Show the graph before and after, compare the numbers if asked to; returns the exit status."""
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
    except (NothingChunkedError, PromiseError):
        raise
    except Exception as e:
        inner = getattr(e, "inner_exception", None)  # of Dynamo's BackendCompilerFailed
        if isinstance(inner, VerifyError):
            raise inner from e
        raise UsageError(f"the model raised when it ran on its inputs:\n{short_traceback(e)}") from e


def _check(args: argparse.Namespace, subject: Subject) -> Check:
    options = parse_options(args.option)
    compiler = args.compiler or options.get("mst.compiler", "aot_eager")
    try:
        return check(
            subject.model, subject.args, subject.kwargs,
            options=options, compiler=compiler, tolerance=args.tolerance, progress=_progress,
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
