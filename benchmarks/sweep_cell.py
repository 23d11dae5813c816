"""One model of the sweep: made small, compared with and without the rewrite, in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import re
import resource
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.tiny import NotBuiltError, first_line, small_model
from mst_fx.config import PASS_NAMES

CHUNK_TOKENS = 8
GIBIBYTES = 12
EXACT_FP32 = 1e-5
EXACT_FP64 = 1e-6  # models that cast to fp32 inside keep that much rounding
REWRITE_FAILED = "the rewrite failed"
OPTIONS = {"mst.compiler": "aot_eager", "mst.chunk_tokens": CHUNK_TOKENS}
Row = dict[str, Any]


class Both:
    """A model compiled by one trace and run two ways: without the rewrite and with it."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs, self.rewritten = model, inputs, False
        self.reports: list[Any] = []
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        torch.compiler.reset()
        torch._dynamo.lookup_backend("mst")  # as torch.compile(backend="mst") does before Dynamo traces
        self.compiled = torch.compile(model, backend=self._compile)

    def _compile(self, graph: Any, inputs: list[Any]) -> Any:
        import mst_fx

        mst = torch._dynamo.lookup_backend("mst")
        plain = mst(graph, inputs, options={**OPTIONS, "mst.disable": PASS_NAMES})  # pyright: ignore[reportCallIssue]
        try:
            ours = mst(graph, inputs, options=OPTIONS)  # pyright: ignore[reportCallIssue]
            self.reports.append(mst_fx.reports()[-1])
        except Exception as e:
            raise RuntimeError(f"{REWRITE_FAILED}: {first_line(e)}") from e
        return lambda *args: ours(*args) if self.rewritten else plain(*args)

    def step(self, rewritten: bool) -> dict[str, Any]:
        """Run one training step; returns loss, logits and gradients by name."""
        self.rewritten = rewritten
        self.model.load_state_dict(self.state)
        torch.manual_seed(1)
        self.model.zero_grad(set_to_none=True)
        output = self.compiled(**self.inputs)
        output["loss"].backward()
        values = {"loss": output["loss"].detach()}
        if isinstance(output.get("logits"), torch.Tensor):
            values["logits"] = output["logits"].detach() + 0
        return values | {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def worst_error(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Return the greatest relative difference in the 2-norm, and of what.

    A gradient that is nothing but rounding (less than a millionth of the largest) is measured by the largest.
    """
    if ours.keys() != plain.keys():
        return float("inf"), f"only one has {sorted(ours.keys() ^ plain.keys())[0]}"
    largest = max(v.double().norm().item() for v in plain.values())
    worst, name = 0.0, ""
    for key, value in plain.items():
        scale = max(value.double().norm().item(), 1e-6 * largest)
        difference = (ours[key].double() - value.double()).norm().item() if value.numel() else 0.0
        error = difference / scale if scale else difference
        if not error <= worst:
            worst, name = error, key
    return worst, name


def measure(model_type: str, auto: str) -> Row:
    """Make one model and compare it with and without the rewrite."""
    import transformers

    import mst_fx

    row: Row = {"model": model_type, "auto": auto}
    torch.manual_seed(0)
    try:
        model, inputs = small_model(model_type, getattr(transformers, auto))
    except NotBuiltError as e:
        return row | {"status": "not built", "reason": str(e)}
    row |= {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": inputs["input_ids"].numel(),
    }
    both = Both(model, inputs)
    try:
        plain = both.step(rewritten=False)
    except Exception as e:
        ours_failed = REWRITE_FAILED in str(e)
        return row | {"status": "crash" if ours_failed else "plain crash", "reason": first_line(e)}
    try:
        ours = both.step(rewritten=True)
    except Exception as e:
        return row | {"status": "crash", "reason": first_line(e)}
    report = mst_fx.report.join_reports(both.reports)
    error, name = worst_error(ours, plain)
    row |= {"error": error, "worst": name, **regions(report)}
    exact = error <= EXACT_FP32
    if not exact:
        row["noise"] = worst_error(both.step(rewritten=False), plain)[0]
        both = Both(model.double(), inputs)
        try:
            truth = both.step(rewritten=False)
            row["error_fp64"], row["worst_fp64"] = worst_error(both.step(rewritten=True), truth)
            # As near to fp64 as the graph without the rewrite: both are rounding.
            row["from_fp64"] = [worst_error(plain, truth)[0], worst_error(ours, truth)[0]]
            exact = row["error_fp64"] <= EXACT_FP64 or row["from_fp64"][1] <= 1.5 * row["from_fp64"][0]
        except Exception as e:
            row["reason"] = f"not run in fp64: {first_line(e)}"
    return row | {"status": "exact" if exact else "inexact"}


def code_version() -> str:
    """Return a hash of the package's sources: a row of other sources is no proof for these."""
    files = sorted(pathlib.Path(__file__).parents[1].joinpath("mst_fx").rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def regions(report: Any) -> Row:
    """Return what a report says, without the paths of this machine."""
    found = []
    for region in report.regions:
        reason = re.sub(r"\(?[^ (]*site-packages/", "(", region.reason)
        found.append({"kind": region.kind, "status": region.status, "reason": reason, "path": region.path})
    counts = {
        f"{kind}_{status}": sum(r["kind"] == kind and r["status"] == status for r in found)
        for kind in ("mlp", "loss")
        for status in ("chunked", "skipped")
    }
    skipped = [r for r in found if r["status"] == "skipped"]
    return {"graphs": report.num_graphs, **counts, "skipped": skipped, "notes": list(report.notes)}


def work(pipe: Connection, model_type: str, auto: str) -> None:
    """Run one model and send its row: the whole life of a process."""
    import transformers

    resource.setrlimit(resource.RLIMIT_DATA, (GIBIBYTES * 2**30, GIBIBYTES * 2**30))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        row = measure(model_type, auto)
    except Exception as e:
        row = {"model": model_type, "auto": auto, "status": "crash", "reason": first_line(e)}
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    seconds = round(time.perf_counter() - started, 1)
    pipe.send(row | {"seconds": seconds, "versions": versions, "code": code_version()})
