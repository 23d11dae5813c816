"""The registered ops by themselves: torch's own checks and gradients in fp64."""

import operator

import pytest
import torch
from torch import fx

from mst_fx import kernels, ops
from mst_fx.body import Body, InputSpec, trace_backward, trace_forward
from mst_fx.config import Config
from mst_fx.context import Context
from mst_fx.plan import ChunkPlan
from mst_fx.regions.chunking import _size_class, compile_region
from mst_fx.rowform.random import KEEP_MASK
from mst_fx.sums import Sum

aten = torch.ops.aten
C, H, I = 4, 3, 5  # noqa: E741


def swiglu_body(dtype: torch.dtype, frozen: bool = False) -> Body:
    graph = fx.Graph()
    x, wide, narrow, bias = (graph.placeholder(n) for n in ("x", "wide", "narrow", "bias"))
    up = graph.call_function(aten.mm.default, (x, graph.call_function(aten.t.default, (wide,))))
    act = graph.call_function(aten.silu.default, (up,))
    down = graph.call_function(aten.addmm.default, (bias, act, graph.call_function(aten.t.default, (narrow,))))
    graph.output((down,))
    cpu = torch.device("cpu")

    def shared(*shape: int) -> InputSpec:
        stride = torch.empty(shape).stride()
        return InputSpec(shape, dtype, cpu, stride, not frozen)

    module = fx.GraphModule(torch.nn.Module(), graph)
    return Body(module, (InputSpec((H,), dtype, cpu, None, True),), (shared(I, H), shared(H, I), shared(H)), False)


def register(body: Body, op: str, accumulate: str = "float32", compiler: str = "aot_eager") -> str:
    context = Context(Config(compiler=compiler, accumulate=accumulate), None)  # type: ignore[arg-type]
    name = compile_region(body, op, ChunkPlan(C, 2, 0, 0), context)
    kernels.finish()
    return name


def values(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((I, H), (H, I), (H,))]
    return x, weights


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8, 9])
def test_map_gradients_in_fp64(tokens: int) -> None:
    name = register(swiglu_body(torch.float64), "map")
    x, weights = values(tokens)

    def run(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return torch.ops.mst_fx.map([x], list(w), None, name, C)[0]

    torch.testing.assert_close(run(x, *weights), torch.nn.functional.silu(x @ weights[0].T) @ weights[1].T + weights[2])
    if tokens:
        assert torch.autograd.gradcheck(run, (x, *weights))


def test_frozen_weights_get_no_gradient() -> None:
    body = swiglu_body(torch.float64, frozen=True)
    assert body.needs == (0,)
    name = register(body, "map")
    x, weights = values(9)
    weights = [w.detach() for w in weights]
    assert torch.autograd.gradcheck(lambda x: torch.ops.mst_fx.map([x], weights, None, name, C)[0], (x,))


def loss_body(dropout: bool = False) -> Body:
    """Cross-entropy of ``[C, H] @ [H, V]``, one label in three ignored; maybe with dropout on the logits."""
    graph = fx.Graph()
    x, labels, head = (graph.placeholder(n) for n in ("x", "labels", "head"))
    logits = graph.call_function(aten.mm.default, (x, graph.call_function(aten.t.default, (head,))))
    if dropout:
        mask = graph.call_function(KEEP_MASK, (logits, graph.placeholder("seed"), 0, 0.5))
        logits = graph.call_function(aten.mul.Tensor, (logits, mask))
    logp = graph.call_function(aten._log_softmax.default, (logits, 1, False))
    loss = graph.call_function(aten.nll_loss_forward.default, (logp, labels, None, 0, -100))
    graph.output((graph.call_function(operator.getitem, (loss, 0)),))
    cpu = torch.device("cpu")
    rows = (InputSpec((H,), torch.float64, cpu, None, True), InputSpec((), torch.int64, cpu))
    shared = (InputSpec((I, H), torch.float64, cpu, (H, 1), True),)
    return Body(fx.GraphModule(torch.nn.Module(), graph), rows, shared, dropout)


def loss_values(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, I, (tokens,))
    labels[::3] = -100
    x, head = (torch.randn(n, H, dtype=torch.float64, requires_grad=True) for n in (tokens, I))
    return x, labels, head


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("op", ["sum", "map"])
@pytest.mark.parametrize("dropout", [False, True])
def test_loss_gradients_in_fp64(tokens: int, op: str, dropout: bool) -> None:
    name = register(loss_body(dropout), op)
    x, labels, head = loss_values(tokens)
    seed = torch.tensor(5) if dropout else None

    def run(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        out = getattr(torch.ops.mst_fx, op)([x, labels], [head], seed, name, C)[0]
        return out if op == "sum" else out.sum()

    if not dropout:
        expected = torch.nn.functional.cross_entropy(x @ head.T, labels, reduction="sum")
        torch.testing.assert_close(run(x, head), expected)
    assert run(x, head).dtype == torch.float64
    if tokens:
        assert torch.autograd.gradcheck(lambda x, h: 3 * run(x, h), (x, head))
    else:
        (grad,) = torch.autograd.grad(run(x, head), head)
        assert torch.equal(grad, torch.zeros_like(head))


@pytest.mark.parametrize("op", ["sum", "map"])
def test_a_single_chunk_is_summed_as_without_chunks(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the weight's dtype: there is nothing to add, and a wider sum would cost memory at short lengths."""
    kept: list[str] = []
    monkeypatch.setattr(
        ops, "Sum", lambda dtype, accumulate, *rest: kept.append(accumulate) or Sum(dtype, "parameter", *rest)
    )
    name = register(loss_body(), op)
    for tokens in (C - 1, C, C + 1):
        x, labels, head = loss_values(tokens)
        out = getattr(torch.ops.mst_fx, op)([x, labels], [head], None, name, C)[0]
        (found,) = torch.autograd.grad(out.sum(), head)
        (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ head.T, labels, reduction="sum"), head)
        torch.testing.assert_close(found, expected)
    assert kept == ["parameter", "parameter", "float32"]


def test_unused_results_and_a_missing_gradient() -> None:
    """The sum's gradients are no outputs to differentiate; a loss nobody uses gives none."""
    x, labels, head = loss_values(9)
    name = register(loss_body(), "sum")
    total, *gradients = torch.ops.mst_fx.sum([x, labels], [head], None, name, C)
    assert total.requires_grad
    assert not any(g.requires_grad for g in gradients)
    assert torch.autograd.grad((total * 0 + x.sum()), [x, head])[1].abs().max() == 0


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_opcheck(compiler: str, tokens: int) -> None:
    """Schemas, fake kernels, autograd registration and AOT dispatch, with bodies as the backend compiles them."""
    name = register(swiglu_body(torch.float64), "map", compiler=compiler)
    x, weights = values(tokens)
    torch.library.opcheck(torch.ops.mst_fx.map.default, ([x], weights, None, name, C))
    frozen = [w.detach() for w in weights]
    tangent = torch.randn(tokens, H, dtype=torch.float64)
    arguments = ([tangent], [x.detach()], frozen, None, name, C)
    torch.library.opcheck(torch.ops.mst_fx.map_backward.default, arguments)
    x, labels, head = loss_values(tokens)
    for dropout in (False, True):
        name = register(loss_body(dropout), "sum", compiler=compiler)
        seed = torch.tensor(5) if dropout else None
        torch.library.opcheck(torch.ops.mst_fx.sum.default, ([x, labels], [head], seed, name, C))
    torch.library.opcheck(torch.ops.mst_fx.keep_mask.default, (torch.empty(tokens, 5), torch.tensor(3), 1, 0.25))


def test_names_follow_content() -> None:
    one, two = swiglu_body(torch.float64), swiglu_body(torch.float32)
    assert one.digest("map") == swiglu_body(torch.float64).digest("map")
    assert len({one.digest("map"), one.digest("sum"), two.digest("map")}) == 3


def test_names_follow_the_sources_that_answer_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's caches hold graphs that know a body by its name, and its results by their order."""
    before = swiglu_body(torch.float64).digest("map")
    monkeypatch.setattr("mst_fx.body.own_sources", lambda: "of another version")
    assert swiglu_body(torch.float64).digest("map") != before


def test_a_body_serves_chunks_of_about_its_size_alone() -> None:
    body = swiglu_body(torch.float32)
    widest = max(s for spec in body.inputs for s in spec.shape if isinstance(s, int))
    near = 2**31 // widest
    assert _size_class(body, 1024) == _size_class(body, 2047)
    sizes = (1024, 4096, 8192, near // 2, near - 1, near, near + 1, 2 * near)
    assert len({_size_class(body, n) for n in sizes}) == len(sizes)


def test_double_backward_is_refused() -> None:
    name = register(swiglu_body(torch.float64), "map")
    x, weights = values(9)
    y = torch.ops.mst_fx.map([x], weights, None, name, C)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|no autograd formula"):
        grad.sum().backward()


def test_keep_mask_is_a_function_of_its_seed() -> None:
    x = torch.empty(1000, 50)
    draw = torch.ops.mst_fx.keep_mask
    one = draw(x, torch.tensor(3), 0, 0.3)
    assert torch.equal(one, draw(x, torch.tensor(3), 0, 0.3))
    assert not torch.equal(one, draw(x, torch.tensor(4), 0, 0.3))
    assert not torch.equal(one, draw(x, torch.tensor(3), 1, 0.3))
    assert abs(one.float().mean().item() - 0.7) < 0.01


class FixesRows:
    """Reads its number of rows as an integer, as C++ composite ops of older versions of torch do."""

    code = "fixes rows"

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x @ weight).reshape(int(x.shape[0]), -1),)


def test_a_body_whose_rows_are_fixed_is_refused_inside_a_backend() -> None:
    """Dynamo's fake mode is the ambient one there: a body traced in it would hide what became of its own symbol."""
    spec = InputSpec((4,), torch.float32, torch.device("cpu"), None, True)
    body = Body(FixesRows(), (spec,), (InputSpec((4, 9), torch.float32, spec.device, (9, 1), True),), False)
    refused = []

    def backend(graph: fx.GraphModule, _: object) -> fx.GraphModule:
        for trace in (trace_forward, trace_backward):
            with pytest.raises(ValueError, match="fixed the number of its rows"):
                trace(body, 64)
            refused.append(trace)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert len(refused) == 2
