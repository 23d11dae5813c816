"""Does the rewritten model compute the same? Both against the same model in fp64, number by number.

Terms:
    plain: the model compiled without our passes. ours: with them. truth: a copy in double, uncompiled.
    error: distance from the truth in the 2-norm, relative to the truth.
    loss: ``.loss`` of the output, else its scalars; without either, gradients flow from fixed random cotangents.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mst_fx.backend import compile_chunked
from mst_fx.commands.outputs import Values, named_tensors, trained
from mst_fx.config import Config
from mst_fx.diff.graph_diff import fold_paths, in_graph_order
from mst_fx.diff.render import short_source
from mst_fx.graph import fake, tensors_in
from mst_fx.inductor import compile_graph
from mst_fx.report import RegionReport, Report, join_reports

log = logging.getLogger(__name__)

SEED = 0
SLACK = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""What ours may be off more than plain, by the lowest precision in which the model computes what trains."""
MOST_ROUNDING = 4.0
"""How many times plain's error ours may have where the truth is nothing: both are sums of rounding then."""


class IncomparableError(Exception):
    """Runs of this model can't be compared; the message says why."""


@dataclass(frozen=True)
class Row:
    """One output or gradient compared. ``index`` is where ours is farthest from the truth."""

    name: str
    plain_error: float
    our_error: float
    bound: float
    """The largest error of ours that passes."""
    index: tuple[int, ...]
    plain: float
    ours: float
    truth: float
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether ours is worse than plain by more than the tolerance."""
        return bool(self.problem) or not self.our_error <= self.bound


@dataclass(frozen=True)
class Check:
    """What a comparison found."""

    rows: tuple[Row, ...]
    report: Report
    compiler: str
    slack: float
    culprit: RegionReport | None = None
    """The first region that moves a number when it alone is rewritten."""
    culprit_rows: tuple[Row, ...] = ()

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows in which ours is worse than plain."""
        return tuple(r for r in self.rows if r.failed)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "passed": not self.failures,
            "compiler": self.compiler,
            "tolerance": self.slack,
            "values": [{**asdict(r), "failed": r.failed} for r in self.rows],
            "culprit": asdict(self.culprit) if self.culprit else None,
        }

    def __str__(self) -> str:
        return "\n".join(_text(self))


def check(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    compiler: str = "aot_eager",
    tolerance: float | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Check:
    """Run a model plain, rewritten and in fp64 on the same inputs and compare outputs and gradients.

    Args:
        model: A module or function; its parameters' ``.grad`` is cleared.
        args: Positional inputs.
        kwargs: Named inputs.
        options: As for ``torch.compile``.
        compiler: What compiles plain and ours: "aot_eager" or "inductor".
        tolerance: How much larger our relative error may be than plain's; None for a bound by dtype.
        progress: Called with a few words before each run.

    Raises:
        IncomparableError: If the model draws random numbers, is a function around a module, or can't run in fp64.
        OptionError: On a bad option.

    Memory:
        A copy of the model in double beside the model, and three sets of gradients.
    """
    config = Config.parse({**(options or {}), "mst.compiler": compiler, "mst.strict": False})
    call = _Call(model, args, dict(kwargs or {}))
    progress("running it plain")
    plain, computed = _run_plain(call, config)
    dtypes = {v.dtype for v in call.floating()} | computed
    low = min(dtypes, key=lambda d: -torch.finfo(d).eps, default=torch.float32)
    slack = SLACK.get(low, 4e-3) if tolerance is None else tolerance
    factor = 1.5 if low.itemsize < 4 else 1.0
    progress("running it in fp64")
    truth = _run_truth(call)
    progress("running it rewritten")
    ours, report = _run_ours(call, config, None)
    rows = _compare(truth, plain, ours, slack, factor)
    found = Check(rows, report, compiler, slack)
    if not found.failures:
        return found
    for i, region in enumerate(in_graph_order(report)):
        progress(f"worse than plain; rewriting region {i + 1} of {len(report.chunked)} alone")
        alone, _ = _run_ours(call, config, [region])
        moved = tuple(r for r in _compare(truth, plain, alone, slack, factor) if r.failed)
        if moved:
            return Check(rows, report, compiler, slack, region, moved)
    return found


def _run_truth(call: _Call) -> Values:
    try:
        return call.doubled().run(None)
    except IncomparableError:
        raise
    except Exception:
        log.debug("the model casts to a lower precision inside; run again with these casts giving fp64", exc_info=True)
    try:
        with _in_double():
            return call.doubled().run(None)
    except IncomparableError:
        raise
    except Exception as e:
        first = (str(e).splitlines() or [""])[0]
        raise IncomparableError(f"the model does not run in fp64 ({type(e).__name__}: {first})") from e


class _CastsToDouble(TorchFunctionMode):
    """Let casts to a lower precision inside a model give fp64: a weight in double can't meet ``x.float()``.

    Recomputation of checkpointed blocks runs outside of any mode, so it is for models that need it alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("float", "half", "bfloat16"):
            return func(*args, **(kwargs or {})).double() if not args[0].is_floating_point() else args[0].double()
        if name == "view":  # view(dtype) reads the same bits
            return func(*args, **(kwargs or {}))
        wide = {k: _double(v) for k, v in (kwargs or {}).items()}
        return func(*map(_double, args), **wide)


def _double(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in SLACK else value


@contextlib.contextmanager
def _in_double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _CastsToDouble():
            yield
    finally:
        torch.set_default_dtype(default)


def _run_plain(call: _Call, config: Config) -> tuple[Values, set[torch.dtype]]:
    """Run without the passes; returns what came out, and the dtypes in which something is computed that trains."""
    hidden: list[bool] = []
    dtypes: set[torch.dtype] = set()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        hidden.extend(isinstance(i, torch.nn.Parameter) for i in inputs)
        graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
        made = [v for graph in graphs for n in graph.nodes for v in tensors_in(fake(n))]
        dtypes.update(v.dtype for v in made if v.requires_grad and v.is_floating_point())
        return compile_graph(gm, inputs, config.compiler, dict(config.inductor), False)

    values = call.run(backend)
    if any(hidden) and not isinstance(call.model, torch.nn.Module):
        raise IncomparableError(
            "the model is a function that holds parameters of its own, whose gradients and fp64 copy are out of "
            "reach. Give the nn.Module itself, or one whose forward does what the function does"
        )
    return values, dtypes


def _run_ours(call: _Call, config: Config, chosen: Collection[RegionReport] | None) -> tuple[Values, Report]:
    """Run with the passes, on all regions or on the chosen ones of an earlier run."""
    found: list[Report] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        number = len(found)
        only = None if chosen is None else [(r.graph, r.nodes[0]) for r in chosen if r.number == number]
        compiled, report = compile_chunked(gm, inputs, config, only)
        found.append(report)
        return compiled

    values = call.run(backend)
    return values, join_reports(found)


@dataclass
class _Call:
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def floating(self) -> Iterator[torch.Tensor]:
        """Yield every floating parameter and input."""
        for value in [*self._parameters().values(), *pytree.tree_leaves((self.args, self.kwargs))]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield value

    def doubled(self) -> _Call:
        model = copy.deepcopy(self.model).double() if isinstance(self.model, torch.nn.Module) else self.model
        args, kwargs = _fresh((self.args, self.kwargs), torch.float64)
        return _Call(model, args, kwargs)

    def run(self, backend: Callable[..., Any] | None) -> Values:
        """Run forward and backward from a clean state; return floating outputs and all gradients."""
        torch._dynamo.reset()
        fn = torch.compile(self.model, backend=backend) if backend is not None else self.model
        args, kwargs = _fresh((self.args, self.kwargs), None)
        buffers = {n: b.clone() for n, b in self._buffers().items()}
        for parameter in self._parameters().values():
            parameter.grad = None
        torch.manual_seed(SEED)
        state = _random_states()
        try:
            outputs = named_tensors(fn(*args, **kwargs), "output")
            if backend is None and not all(map(torch.equal, state, _random_states())):
                raise IncomparableError(
                    "the model draws random numbers (dropout?): plain and rewritten draw them in another order, so "
                    "their runs are not comparable. Make it without them: dropout with p=0 (with --hf: "
                    "--set attention_dropout=0), or eval mode"
                )
            _backward(outputs)
            values = {n: v.detach().clone() for n, v in outputs.items()}
            holders = {f"grad {n}": p for n, p in self._parameters().items()}
            holders |= {f"grad {n}": v for n, v in named_tensors({**dict(enumerate(args)), **kwargs}, "input").items()}
            values |= {n: p.grad.detach().clone() for n, p in holders.items() if p.is_leaf and p.grad is not None}
        finally:
            for name, buffer in self._buffers().items():
                buffer.data.copy_(buffers[name])
            for parameter in self._parameters().values():
                parameter.grad = None
            torch._dynamo.reset()
        return values

    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters()) if isinstance(self.model, torch.nn.Module) else {}

    def _buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_buffers()) if isinstance(self.model, torch.nn.Module) else {}


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _fresh(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Copy inputs, floating ones to ``dtype``, so that each run has leaves of its own."""

    def copied(value: torch.Tensor) -> torch.Tensor:
        wide = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        return wide.clone().requires_grad_(value.requires_grad)

    return pytree.tree_map_only(torch.Tensor, copied, inputs)


def _backward(outputs: Values) -> None:
    losses = trained(outputs)
    if not losses:
        return
    generator = torch.Generator().manual_seed(SEED)
    tangents = [
        (torch.randn(v.shape, generator=generator, dtype=torch.float64) if v.ndim else torch.ones(())).to(v)
        for v in losses.values()
    ]
    torch.autograd.backward(list(losses.values()), tangents)


# -- comparing ---------------------------------------------------------------------------------------


def _compare(truth: Values, plain: Values, ours: Values, slack: float, factor: float) -> tuple[Row, ...]:
    rows = [_row(n, truth[n], plain[n], ours.get(n), slack, factor) for n in plain if n in truth]
    grads = [n for n in truth if n.startswith("grad ") and n in plain and n in ours]
    if len(grads) > 1 and not any(r.problem for r in rows):
        # In low precision the errors of single gradients scatter; together they say more.
        joined = [torch.cat([values[n].flatten() for n in grads]) for values in (truth, plain, ours)]
        rows.append(_row("all gradients", *joined, slack / 4, 1.05))
    return tuple(rows)


def _row(
    name: str, truth: torch.Tensor, plain: torch.Tensor, ours: torch.Tensor | None, slack: float, factor: float
) -> Row:
    if ours is None or ours.shape != plain.shape:
        problem = "missing" if ours is None else f"has shape {tuple(ours.shape)}, plain's is {tuple(plain.shape)}"
        return Row(name, _error(plain, truth), float("nan"), float("nan"), (), *[float("nan")] * 3, problem)
    problem = "" if ours.dtype == plain.dtype else f"is {ours.dtype}, plain's is {plain.dtype}"
    where = _number_lost(truth, plain, ours)
    if where is not None:
        is_number = truth.flatten()[where].isfinite()
        problem = "has no number where plain has" if is_number else "is not NaN or infinite as plain rightly is"
    elif truth.numel():
        where = int((ours.double() - truth).abs().nan_to_num(nan=-1.0).argmax())
    index = () if where is None else tuple(int(i) for i in torch.unravel_index(torch.tensor(where), truth.shape))
    at = [v[index].item() if v.numel() else 0.0 for v in (plain, ours, truth)]
    comparable = truth.isfinite() & plain.isfinite() & ours.isfinite()
    theirs, mine = (_error(torch.where(comparable, v, 0), torch.where(comparable, truth, 0)) for v in (plain, ours))
    if truth.norm() < 1e-6 * plain.double().norm():  # a bias in front of a norm: its gradient is 0, plain's is rounding
        factor = MOST_ROUNDING
    return Row(name, theirs, mine, theirs * factor + slack, index, at[0], at[1], at[2], problem)


def _number_lost(truth: torch.Tensor, plain: torch.Tensor, ours: torch.Tensor) -> int | None:
    """Return the first place where plain has the truth's infinity, NaN or a number, and ours has not.

    Where plain itself has NaN for a number, ours may have anything.
    """
    is_right = torch.where(truth.isfinite(), plain.isfinite(), _same(plain, truth))
    is_lost = is_right & ~torch.where(truth.isfinite(), ours.isfinite(), _same(ours, truth))
    return int(is_lost.flatten().int().argmax()) if is_lost.any() else None


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the 2-norm; absolute where the truth is nothing."""
    scale = truth.norm().item()
    return (value.double() - truth).norm().item() / (scale if scale > 1e-12 else 1.0)


def _text(found: Check) -> Iterator[str]:
    failed = len(found.failures)
    verdict = f"{failed} of {len(found.rows)} values are worse than plain's" if failed else "as near to fp64 as plain"
    yield f"check ({found.compiler}, tolerance {found.slack:.1e}): {verdict}"
    title = "relative error against fp64"
    width = max([len(title), *(len(r.name) for r in found.rows)])
    yield f"  {'':6}{title:<{width}}  plain    ours     worst element: plain, ours, fp64"
    for r in found.rows:
        head = f"  {'FAIL' if r.failed else 'ok':6}{r.name:<{width}}"
        if r.our_error != r.our_error and r.problem:
            yield f"{head}  {r.problem}"
            continue
        where = "[" + ", ".join(map(str, r.index)) + "]"
        values = f"{where}: {r.plain:.7g}, {r.ours:.7g}, {r.truth:.7g}"
        yield f"{head}  {r.plain_error:.1e}  {r.our_error:.1e}  {values}" + (f"  {r.problem}" if r.problem else "")
    if found.culprit is not None:
        where = " ".join(filter(None, [fold_paths([found.culprit.path]), f"({short_source(found.culprit.source)})"]))
        moved = ", ".join(r.name for r in found.culprit_rows[:3])
        more = f" and {len(found.culprit_rows) - 3} more" if len(found.culprit_rows) > 3 else ""
        yield f"first region whose rewrite moves a number: {found.culprit.kind} {where}"
        yield f"  rewritten alone it moves {moved}{more}"
    elif failed:
        yield "no region rewritten alone moves a number beyond the tolerance"
