"""``explain(fn)(*args)``: what the backend would do, without compiling anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from mst_fx.backend import check_inductor_options, join_graphs
from mst_fx.config import Config
from mst_fx.dynamo import refusals_so_far
from mst_fx.inductor import fake_mode_of
from mst_fx.pipeline import left_notes, left_to_eager, run_passes
from mst_fx.report import Report, join_reports


def explain(fn: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Callable[..., Report]:
    """Return a function that runs ``fn`` once, traced and uncompiled, and reports on its graphs.

    The calling convention is that of ``torch._dynamo.explain``. A model whose parameters are fake tensors is traced
    with these, and nothing is computed. Dynamo is reset before and after: what the process had compiled is compiled
    again when it is next called.

    Args:
        fn: A model or a function, compiled already or not.
        options: As for ``torch.compile``; ``mst.*`` keys are honoured.

    Raises:
        OptionError: (a ``ValueError``) on an unknown ``mst.`` option or a bad value.
    """
    config = Config.parse({**(options or {}), "mst.compiler": "aot_eager"})
    check_inductor_options(config)

    def inner(*args: Any, **kwargs: Any) -> Report:
        found: list[Report] = []
        mode = fake_mode_of([*(fn.parameters() if isinstance(fn, torch.nn.Module) else ()), *args, *kwargs.values()])

        def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            found.append(run_passes(gm, config)[1])

            def run(*inputs: Any) -> Any:
                # Tensors a graph makes itself are fake too where its inputs are.
                with mode or contextlib.nullcontext():
                    return gm.forward(*inputs)

            return run

        torch._dynamo.reset()
        join_graphs()
        left_to_eager()  # what Dynamo said of other functions is none of this one's
        refused = refusals_so_far()
        try:
            with _not_compiled_in_place(fn):
                torch.compile(fn, backend=record)(*args, **kwargs)
        finally:
            torch._dynamo.reset()
        if found:
            return join_reports(found)
        met = [r for r, times in refusals_so_far().items() if times > refused.get(r, 0)]
        return Report(notes=tuple(left_to_eager() or left_notes(met)))

    return inner


@contextlib.contextmanager
def _not_compiled_in_place(fn: Any) -> Iterator[None]:
    """Have modules that were compiled by ``module.compile`` run as if they were not, for Dynamo to trace them."""
    modules = list(fn.modules()) if isinstance(fn, torch.nn.Module) else []
    compiled = [(m, m._compiled_call_impl) for m in modules if m._compiled_call_impl is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
