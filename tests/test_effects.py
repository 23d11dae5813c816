"""What a node does beside giving a value: it changes others in place, it has a gradient or a name of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import EAGER, chunked, error, reasons

T, H, I, V = 32, 16, 64, 32  # noqa: E741  T == V: sizes tell no dimension apart
SMALL = {"mst.chunk_tokens": 8, **EAGER}
LABELS = torch.arange(T) % V
MASK = torch.arange(T) % 3 > 0

torch.library.define("mst_tests::mean", "(Tensor x) -> Tensor")
torch.library.define("mst_tests::scale_", "(Tensor(a!) x) -> ()")
torch.library.define("mst_tests::scale", "(Tensor(a!) x) -> ()")


@torch.library.impl("mst_tests::mean", "CompositeImplicitAutograd")
def _first_counts_most(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.linspace(1, 0, x.numel(), dtype=x.dtype)).sum()


@torch.library.impl("mst_tests::scale", "CPU")
def _scale(x: torch.Tensor) -> None:
    x.mul_(3)


@torch.library.register_fake("mst_tests::scale")
def _scale_fake(x: torch.Tensor) -> None:
    return None


@torch.compiler.allow_in_graph
def mean(x: torch.Tensor) -> torch.Tensor:
    """Not torch's."""
    return (x * torch.linspace(0, 1, x.numel(), dtype=x.dtype)).sum()


@torch.compiler.allow_in_graph
def normalized(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        size = x.abs().amax(-1, keepdim=True)
    return x / size


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad


@torch.compiler.allow_in_graph
def doubled(x: torch.Tensor) -> torch.Tensor:
    return _Doubled.apply(x)  # pyright: ignore


@torch.compiler.allow_in_graph
def scaled(x: torch.Tensor) -> torch.Tensor:
    x.mul_(3)
    return x


class Parts(nn.Module):
    """Up, down, a head, running statistics; ``fn(self, x)`` is the model."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(H, I), nn.Linear(I, H), nn.Linear(H, V)
        self.mean, self.var = nn.Buffer(torch.zeros(I)), nn.Buffer(torch.ones(I))
        self.fn = fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def nll(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(x), LABELS, reduction="none")


def run(fn: Callable[..., Any], options: dict[str, Any] | None, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the outputs, every gradient and the buffers of one step in fp64."""
    torch.manual_seed(0)
    model = Parts(fn).double()
    x = torch.randn(*shape, H, dtype=torch.float64, requires_grad=True)
    out = (torch.compile(model, backend="mst", options=options) if options else model)(x)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    total = [(o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outs if o.requires_grad]
    sum(total).backward()  # pyright: ignore
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in (x, *model.parameters())]
    return [*(o.detach().clone() for o in outs), *grads, *model.buffers()]


def same(fn: Callable[..., Any], shape: tuple[int, ...] = (T,), **options: Any) -> mst_fx.Report:
    """Assert that outputs and gradients are eager's; return what the backend says."""
    plain, ours = run(fn, None, shape), run(fn, {**SMALL, **options}, shape)
    for i, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert a.shape == b.shape
        assert error(b, a) < 1e-12, f"value {i}: {error(b, a):.1e} off"
    return mst_fx.report.join_reports(mst_fx.reports())


# -- other functions of a known name -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduce",
    [
        lambda v: torch.masked.mean(v, mask=MASK), lambda v: torch.masked.sum(v, mask=MASK),
        lambda v: torch.ops.mst_tests.mean(v), mean,
    ],
    ids=["masked mean", "masked sum", "registered op", "function"],
)  # fmt: skip
def test_a_reduction_is_what_it_is_not_what_it_is_called(reduce: Callable[..., Any]) -> None:
    report = same(lambda s, x: reduce(s.nll(x)))
    assert "gradients formed in the forward" not in str(report)


@pytest.mark.parametrize("fn", [normalized, doubled])
def test_a_function_with_a_gradient_of_its_own_is_left_alone(fn: Callable[..., Any]) -> None:
    report = same(lambda s, x: s.down(fn(s.up(x))))
    assert "where Dynamo does not look" in reasons(report)


# -- results of several under no_grad -----------------------------------------------------------------------


def _without_gradient(pick: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def fn(s: Parts, x: torch.Tensor) -> torch.Tensor:
        h = s.up(x)
        with torch.no_grad():
            scale = pick(h)
        return s.down(h / (scale + 1))

    return fn


@pytest.mark.parametrize(
    "pick",
    [
        lambda h: h.max(-1, keepdim=True).values, lambda h: h.topk(2, -1).values[..., :1],
        lambda h: h.sort(-1)[0], lambda h: torch.cat(h.chunk(2, -1), -1),
        lambda h: torch.var_mean(h, -1, keepdim=True)[1],
    ],
    ids=["max", "topk", "sort", "chunk", "var_mean"],
)  # fmt: skip
def test_one_of_several_results_under_no_grad_gets_no_gradient(pick: Callable[..., Any]) -> None:
    assert chunked(same(_without_gradient(pick)), "mlp") == 1


def test_a_confidence_under_no_grad_weighs_the_loss() -> None:
    def fn(s: Parts, x: torch.Tensor) -> torch.Tensor:
        logits = s.head(x)
        with torch.no_grad():
            best, _ = logits.max(-1)
        return (F.cross_entropy(logits, LABELS, reduction="none") * best).mean()

    assert chunked(same(fn), "loss") == 1


# -- changes in place ----------------------------------------------------------------------------------------


def _changed(change: Callable[..., Any]) -> Callable[..., Any]:
    def fn(s: Parts, x: torch.Tensor) -> torch.Tensor:
        x = x.detach() * 1
        h = F.linear(x, s.up.weight.detach())
        change(s, x)
        return s.down(F.silu(h) * x.sum(-1, keepdim=True))

    return fn


@pytest.mark.parametrize(
    "change",
    [lambda s, x: torch.ops.mst_tests.scale(x), lambda s, x: x.__imul__(3), lambda s, x: scaled(x)],
    ids=["registered op", "__imul__", "function"],
)
def test_what_changes_between_is_seen(change: Callable[..., Any]) -> None:
    assert "changes in place" in reasons(same(_changed(change)))


def test_running_statistics_change_in_place() -> None:
    def fn(s: Parts, x: torch.Tensor) -> torch.Tensor:
        h = s.up(x) - s.mean
        F.batch_norm(s.up(x).detach(), s.mean, s.var, training=True, momentum=0.5)
        return s.down(F.silu(h))

    same(fn)


VIEWS: dict[str, Callable[..., Any]] = {
    "residual": lambda s, x: _then(s.mlp(x), lambda y: (y.add_(x), y[:, :3].mul_(2))),
    "another value": lambda s, x: s.mlp(x) * _then(x.detach() * 1, lambda y: (y.mul_(2), y[:, :3].add_(1))),
    "base after view": lambda s, x: _then(s.mlp(x), lambda y: (y.add_(x), v := y[:, :3], y.mul_(2), v)[-1], last=True),
    "wide": lambda s, x: s.down(F.gelu(_then(s.up(x), lambda h: (h.add_(1), h[..., :5].mul_(2))))),
    "flat": lambda s, x: _then(s.mlp(x), lambda y: (y.add_(x), y.view(-1, H).mul_(2))),
    "logits": lambda s, x: F.cross_entropy(
        _then(s.head(x), lambda y: (y.div_(0.7), y[..., :10].add_(1))).view(-1, V), LABELS.repeat(2)
    ),
}


def _then(value: torch.Tensor, change: Callable[..., Any], last: bool = False) -> torch.Tensor:
    result = change(value)
    return result if last else value


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_changes_in_place_after_its_base_did(name: str) -> None:
    report = same(VIEWS[name], (2, T))
    assert report.chunked or name in ("wide", "logits"), str(report)


MOVES: dict[str, Callable[..., Any]] = {
    "transpose_": lambda s, x: s.mlp(x).transpose_(0, 1),
    "back again": lambda s, x: s.mlp(x.transpose(0, 1)).transpose_(0, 1),
    "squeeze_": lambda s, x: s.mlp(x[:, None]).squeeze_(1) + x,
    "unsqueeze_": lambda s, x: s.mlp(x).unsqueeze_(0),
    "twice": lambda s, x: s.mlp(x).unsqueeze_(0).transpose_(1, 2) * 2,
    "read before": lambda s, x: _then(s.mlp(x), lambda y: y.mean() + y.swapaxes_(0, 1), last=True),
    "labels' logits": lambda s, x: -s.head(x).log_softmax(-1).gather(-1, LABELS.repeat(2, 1)[..., None]).squeeze_(-1),
    "losses": lambda s, x: F.cross_entropy(s.head(x).view(-1, V), LABELS.repeat(2), reduction="none").unsqueeze_(0),
    "loss": lambda s, x: F.cross_entropy(s.head(x).view(-1, V), LABELS.repeat(2)).unsqueeze_(0),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_a_value_whose_shape_changes_in_place(name: str) -> None:
    report = same(MOVES[name], (2, T))
    assert report.chunked, str(report)


def test_a_shape_that_changes_in_place_and_is_not_followed_leaves_the_graph_alone() -> None:
    report = same(MOVES["transpose_"], (2, T), **{"mst.disable": ["functionalize"]})
    assert not report.chunked
    assert "changes what a value looks like in place" in reasons(report)


# -- in an autograd function of the user's own -------------------------------------------------------------


class ViewThenChange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = x.clone()
        first = y[..., : I // 2]
        y.mul_(2)
        return torch.cat([first, first], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = grad.chunk(2, -1)
        return torch.cat([2 * (a + b), torch.zeros_like(a)], -1)


class KeepsDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = x.to(torch.float16)
        y.mul_(x)
        ctx.save_for_backward(y)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return grad * y.to(grad.dtype)


@pytest.mark.parametrize(("function", "count"), [(ViewThenChange, 0), (KeepsDtype, 1)])
def test_in_place_ops_of_an_autograd_function(function: Any, count: int) -> None:
    report = same(lambda s, x: s.down(function.apply(s.up(x) * 1e-3) * 1e3))
    assert chunked(report, "mlp") == count, str(report)


# -- where sizes say nothing ---------------------------------------------------------------------------------


def test_soft_labels_of_other_tokens() -> None:
    report = same(lambda s, x: F.cross_entropy(s.head(x), s.head(x).detach().softmax(-1).t()))
    assert "tokens lie along another dimension" in reasons(report)


@pytest.mark.parametrize("along", [lambda v: v.softmax(-1), lambda v: v.log_softmax(0), lambda v: v.sum(-1, True) * v])
def test_rows_without_dimensions_are_not_worked_along(along: Callable[..., Any]) -> None:
    def fn(s: Parts, x: torch.Tensor) -> Any:
        return s.mlp(x), torch.stack([along(v) for v in x[:, 0].unbind()])

    assert chunked(same(fn), "mlp") == 1


# -- graphs that return a bare value ---------------------------------------------------------------------------


def test_a_hook_on_a_value_beside_a_chunked_region() -> None:
    def fn(s: Parts, x: torch.Tensor) -> torch.Tensor:
        y = s.mlp(x)
        y.register_hook(lambda g: g * 2)
        return y * 3

    assert chunked(same(fn), "mlp") == 1
