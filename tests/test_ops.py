"""The registered ops by themselves: torch's own checks and gradients in fp64."""

import pytest
import torch
from torch import fx

from mst_fx.body import Body, InputSpec
from mst_fx.chunking import Context, compile_region
from mst_fx.config import Config
from mst_fx.plan import ChunkPlan

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


def register(body: Body, op: str, accumulate: str = "float32") -> str:
    context = Context(Config(compiler="aot_eager", accumulate=accumulate), None)  # type: ignore[arg-type]
    return compile_region(body, op, ChunkPlan(C, 2, 0, 0), context)


def values(tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = torch.randn(tokens, H, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((I, H), (H, I), (H,))]
    return x, weights


@pytest.mark.parametrize("tokens", [0, 1, 4, 9])
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


def test_opcheck() -> None:
    name = register(swiglu_body(torch.float64), "map")
    x, weights = values(9)
    torch.library.opcheck(torch.ops.mst_fx.map.default, ([x], weights, None, name, C))


def test_names_follow_content() -> None:
    one, two = swiglu_body(torch.float64), swiglu_body(torch.float32)
    assert one.digest("map") == swiglu_body(torch.float64).digest("map")
    assert len({one.digest("map"), one.digest("sum"), two.digest("map")}) == 3


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
