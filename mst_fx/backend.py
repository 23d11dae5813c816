"""``torch.compile(model, backend="mst")``: options -> passes -> Inductor.

The entry point group ``torch_dynamo_backends`` names ``mst``; nothing need be imported. Torch loads the
entry point when ``torch.compile`` is called, before Dynamo traces, so the few settings that joining
graphs needs are made here, at import, and what Inductor asks once per process is asked early.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from mst_fx import buckets, dynamo, extended, inductor, kernels
from mst_fx.config import Config, OptionError, did_you_mean
from mst_fx.layers import share_layers, tracing_of_calls
from mst_fx.lazy_logits import LogitsSpec, build_outputs
from mst_fx.ops import BODIES
from mst_fx.pipeline import run_passes
from mst_fx.report import Report

log = logging.getLogger(__name__)

_reports: list[Report] = []


def mst(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its MLPs and its loss chunked.

    Args:
        gm: Graph in torch IR, from Dynamo.
        example_inputs: Its (fake) inputs.
        options: Ours (``mst.*``) and Inductor's.
        mode: As for ``torch.compile``.

    Raises:
        OptionError: (a ``ValueError``) on an unknown ``mst.`` option or a bad value.
    """
    check_torch()
    config = Config.parse(options, inductor.mode_options(mode))
    check_inductor_options(config)
    join_graphs()  # again: Transformers may have been imported after this module
    compiled, report = compile_chunked(gm, example_inputs, config)
    _reports.append(report)
    _publish(report, len(_reports))
    return compiled


def compile_chunked(
    gm: fx.GraphModule, example_inputs: list[Any], config: Config, only: Collection[tuple[str, str]] | None = None
) -> tuple[Callable[..., Any], Report]:
    """Rewrite and compile a Dynamo graph; ``only`` is that of ``run_passes``."""
    known = set(BODIES)
    compiled, report, logits = _compile(gm, example_inputs, config, only)
    try:
        kernels.finish()
    except Exception:
        log.debug("a body's kernel failed in the background; compiled again one by one to know which", exc_info=True)
        for name in BODIES.keys() - known:
            del BODIES[name]
        extended.forget()
        with kernels.at_once():
            compiled, report, logits = _compile(gm, example_inputs, config, only)
    if not report.chunked:
        return compiled, report
    count = len(next(n for n in gm.graph.nodes if n.op == "output").args[0])

    # A function of this process, which `aot_compile` refuses to save: the chunk bodies it needs are in BODIES.
    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        return build_outputs(outputs, args, logits, count) if logits else outputs

    return run, report


@inductor.old_objects_frozen()
def _compile(
    gm: fx.GraphModule, example_inputs: list[Any], config: Config, only: Collection[tuple[str, str]] | None
) -> tuple[Callable[..., Any], Report, list[LogitsSpec]]:
    piece = dynamo.is_piece()
    if piece:
        config = dataclasses.replace(config, logits="keep")  # the pieces hand plain tensors to each other
    module, report, logits = run_passes(gm, config, only)
    if piece:
        report = dataclasses.replace(report, notes=(*report.notes, _PIECE))
    chunked, options = bool(report.chunked), dict(config.inductor)
    whole = not (piece or buckets.cutting())
    shares = chunked and whole and config.share_layers and inductor.shares_layers(config.compiler, options)
    with tracing_of_calls(module) if shares and share_layers(module) else contextlib.nullcontext():
        compiled = buckets.compile_graph(module, example_inputs, config.compiler, options, chunked)
    return compiled, report, logits


_PIECE = (
    "DDP's gradient buckets cut this graph before the backend saw it, perhaps through a region. Name the backend "
    "itself (backend='mst') rather than a function that calls it, or set torch._dynamo.config.optimize_ddp = False."
)


def _publish(report: Report, number: int) -> None:
    """Put a report where torch puts its own: the structured trace, and the debug folder."""

    def diff() -> str:
        return report.diff(backward=True, estimate=False)

    inductor.trace_artifact("mst_report", lambda: str(report))
    inductor.trace_artifact("mst_diff", diff)
    folder = inductor.debug_folder()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"report_{number}.txt").write_text(str(report))
        (folder / f"diff_{number}.txt").write_text(diff())


def check_torch() -> None:
    """Refuse a torch that this backend was never run with.

    Raises:
        OptionError: If torch is older than the oldest supported version.
    """
    oldest = inductor.MINIMUM_TORCH
    if inductor.torch_version() < oldest:
        wanted = ".".join(map(str, oldest))
        raise OptionError(f"backend 'mst' needs torch {wanted} or newer, this is {torch.__version__}")


def check_inductor_options(config: Config) -> None:
    """Refuse an option that Inductor does not have, before a region's body fails by it.

    Raises:
        OptionError: If there is one.
    """
    known = inductor.option_names() if config.inductor else ()
    for name, _ in config.inductor:
        if name.replace("-", "_") not in known:
            ours = [f"mst.{f.name}" for f in dataclasses.fields(config) if f.name != "inductor"]
            raise OptionError(
                f"unknown option {name!r}: neither of mst nor of Inductor.{did_you_mean(name, [*ours, *known])}"
            )


def reports() -> list[Report]:
    """Return the reports of what was compiled in this process, oldest first."""
    return list(_reports)


def join_graphs() -> None:
    """Keep one log line of Transformers from breaking the graph between head and loss.

    ``PreTrainedModel.loss_function`` calls ``logger.warning_once`` for models without a loss type (GPT-2 and
    others). Dynamo breaks there unless it is told to ignore the method. Called when this module is imported,
    which is before Dynamo traces; a model of Transformers has imported Transformers by then.
    """
    once = getattr(logging.Logger, "warning_once", None)
    if once is not None:
        torch._dynamo.config.ignore_logging_functions.add(once)  # pyright: ignore
        _log_any_settings()


def _log_any_settings() -> None:
    """Keep torch 2.11 from logging an error after every compilation: it writes settings as JSON, but no functions."""
    dynamo: Any = torch._dynamo
    try:
        dynamo.utils._get_dynamo_config_for_logging()
    except TypeError:
        dynamo.utils._get_dynamo_config_for_logging = lambda: None


join_graphs()
buckets.rewrite_before_cutting(mst)
kernels.prepare()
