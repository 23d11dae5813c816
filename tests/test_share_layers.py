"""Equal layers compiled as calls of one graph: same numbers, less to compile, and what must not be shared."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.harness import EAGER, check_exact, error, slow_but
from tests.models import hf, hf_inputs
from tests.sharing import LAYERS, OPTIONS, SAME_BITS, H, Layers, mlp, together_and_apart, tokens

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="layers share a graph on torch >= 2.13")

# -- shared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(["gemma2"], ["llama", "gpt2", "gemma2"]))
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_models_are_exact(name: str, checkpointing: bool, shared: list[int]) -> None:
    """Alternating layers share in pairs."""
    torch.manual_seed(0)
    more = {} if name == "gpt2" else {"num_hidden_layers": 4}
    model = hf(name, **more)
    if checkpointing:
        model.gradient_checkpointing_enable()  # pyright: ignore
    check_exact(model, hf_inputs(name), options={**OPTIONS, **EAGER})
    assert sum(shared) >= 2, shared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "checkpointing"),
    slow_but(
        [("aot_eager", True)],
        itertools.product(["aot_eager", "inductor"], [False, True]),
    ),
)
def test_same_bits_as_apart(compiler: str, checkpointing: bool, shared: list[int]) -> None:
    torch.manual_seed(0)
    model = hf("llama", num_hidden_layers=LAYERS)
    if checkpointing:
        model.gradient_checkpointing_enable()  # pyright: ignore
    # Inductor fuses norms at the seam of two layers otherwise, which orders a sum differently.
    within = SAME_BITS if compiler == "aot_eager" else {"rtol": 1e-5, "atol": 1e-6}
    together_and_apart(model, hf_inputs("llama"), within, **{"mst.compiler": compiler})
    assert shared == [LAYERS]


@pytest.mark.parametrize("count", [2, 6])
def test_a_layer_is_traced_as_often_however_many_share_it(count: int, shared: list[int], looked: list[str]) -> None:
    torch.compile(Layers(F.relu, count), backend="mst", options={**OPTIONS, **EAGER})(**tokens(True)).backward()
    assert shared == [count]
    assert len(looked) == 2  # forward and backward


class OwnRegion(Layers):
    """A region of the user's own, before the layers; of one call torch makes no graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:2]:
            x = own_region(x.cumsum(1), layer.mix.weight)
        return super().forward(x)


@torch.compiler.nested_compile_region
def own_region(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight.mean()


def test_writes_in_regions_of_the_users_are_looked_for(shared: list[int], looked: list[str]) -> None:
    check_exact(OwnRegion(F.relu), tokens(True), options={**OPTIONS, **EAGER})
    assert shared == [LAYERS]
    assert len([n for n in looked if not n.startswith("mst_layer_")]) >= 2
    assert len(looked) > LAYERS + 3


def test_only_layers_alike_share(shared: list[int]) -> None:
    """A frozen input makes the first layer another one, frozen weights the second: their backwards differ."""
    torch.manual_seed(0)
    model = Layers(torch.tanh, 5)
    model.layers[1].requires_grad_(False)
    check_exact(model, tokens(), options={**OPTIONS, **EAGER})
    assert shared == [3]


def test_every_layer_has_its_own_weights_and_gradients(shared: list[int]) -> None:
    torch.manual_seed(0)
    model = Layers(torch.tanh)
    for i, layer in enumerate(model.layers):
        for p in layer.parameters():
            p.data.mul_(1 + i)
    check_exact(model, tokens(requires_grad=True), options={**OPTIONS, **EAGER})
    assert shared == [LAYERS]


def test_layers_of_one_weight(shared: list[int]) -> None:
    """A model that runs one layer several times: its gradient is the sum of all calls."""
    torch.manual_seed(0)
    model = Layers(torch.tanh)
    for i in range(1, LAYERS):
        model.layers[i] = model.layers[0]
    check_exact(model, tokens(requires_grad=True), options={**OPTIONS, **EAGER})


def test_unread_outputs_and_many_readers(shared: list[int]) -> None:
    """Hidden states of every layer are returned and used in the loss."""

    class Deep(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            states = []
            for layer in self.layers:
                x = layer(x)
                states.append(x)
            return torch.stack([s.square().mean() * (i + 1) for i, s in enumerate(states)]).sum()

    torch.manual_seed(0)
    check_exact(Deep(torch.tanh), tokens(requires_grad=True), options={**OPTIONS, **EAGER})


# -- left alone --------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "writes into a value": lambda x: x.copy_(x * 2),
    "draws": lambda x: x + 0 * torch.rand_like(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, shared: list[int]) -> None:
    torch.manual_seed(0)
    model = Layers(REFUSED[name])
    fn = torch.compile(model, backend="mst", options={**OPTIONS, **EAGER})
    fn(**tokens(requires_grad=True)).backward()
    assert shared == [0]


def test_a_number_of_each_layer_that_changes(shared: list[int]) -> None:
    """Dynamo makes it a symbolic one, read in the layer off an input."""
    model = Layers(torch.tanh)
    fn = torch.compile(model, backend="mst", fullgraph=True, options={**OPTIONS, **EAGER})
    for scale in (1.5, 1.25, 1.125):
        for layer in model.layers:
            layer.scale = scale
        fn(**tokens()).backward()
    assert shared[0]
    assert shared[1:] == [0]


def test_masks_of_layers_differ(shared: list[int]) -> None:
    """Were dropout shared with one seed, every layer would drop the same places."""
    model = Layers(lambda x: F.dropout(torch.ones_like(x) + 0 * x, 0.5), 2, lambda layer, x: x + layer.extra(x))

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.mlp = mlp()

        def forward(self, x: torch.Tensor) -> Any:
            masks = [layer.extra(x) for layer in self.inner.layers]
            return masks, self.mlp(x).mean()

    masks, _ = torch.compile(Masks(), backend="mst", options={**OPTIONS, **EAGER})(torch.randn(2, 23, H))
    assert not torch.equal(*masks)


def test_batch_norm_keeps_its_running_values(shared: list[int]) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(H)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    model = Layers(torch.tanh)
    for layer in model.layers:
        layer.extra = Normed()
    plain = copy.deepcopy(model)
    inputs = tokens()
    torch.compile(model, backend="mst", options={**OPTIONS, **EAGER})(**inputs).backward()
    plain(**inputs).backward()
    assert shared == [0]
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def contexts() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def test_selective_checkpointing_keeps_its_policy(shared: list[int]) -> None:
    def wrapped(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)  # pyright: ignore

    torch.manual_seed(0)
    check_exact(Layers(torch.tanh, wrapped=wrapped), tokens(), options={**OPTIONS, **EAGER})
    assert sum(shared) == 0


@pytest.mark.parametrize("options", [{"triton.cudagraphs": True}, {"mst.share_layers": False}])
def test_not_where_it_is_of_no_use(options: dict[str, Any], shared: list[int]) -> None:
    from mst_fx.config import Config
    from mst_fx.inductor import shares_layers

    config = Config.parse(options)
    assert not (config.share_layers and shares_layers(config.compiler, dict(config.inductor)))


def test_another_length_is_compiled_apart(shared: list[int]) -> None:
    torch.manual_seed(0)
    model = Layers(torch.tanh)
    plain = copy.deepcopy(model)
    fn = torch.compile(model, backend="mst", options={**OPTIONS, **EAGER})
    for length in (23, 31, 47):
        x = torch.randn(2, length, H, requires_grad=True)
        for m in (model, plain):
            m.zero_grad()
        fn(x).backward()
        plain(x).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert error(ours.grad, theirs.grad) < 1e-5, name
    assert shared == [LAYERS, 0]


@pytest.mark.slow
def test_caches_know_what_is_within_a_layer() -> None:
    """Two models whose outer graphs are alike, on one cache folder; only what their layers call differs."""
    for extra in (torch.tanh, torch.sin):
        torch._dynamo.reset()
        torch.manual_seed(0)
        check_exact(Layers(extra, 2), tokens(requires_grad=True), options=OPTIONS, compiler="inductor")


@pytest.mark.slow
def test_evaluation(shared: list[int]) -> None:
    torch.manual_seed(0)
    model = hf("llama", num_hidden_layers=LAYERS).eval()
    inputs = hf_inputs("llama")
    with torch.no_grad():
        loss = torch.compile(model, backend="mst", options={**OPTIONS, **EAGER})(**inputs).loss
        torch.testing.assert_close(loss, model(**inputs).loss)
    assert shared == [LAYERS]


@pytest.mark.parametrize("read", [(), (1, 3), (0, 2)])
def test_a_router_that_is_only_logged_gets_no_gradient(shared: list[int], read: tuple[int, ...]) -> None:
    """None, as in eager, and no zeros, by which an optimizer would decay the weights."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.router = nn.LayerNorm(H), nn.Linear(H, 4)
            self.mix, self.mlp = nn.Linear(H, H), nn.Sequential(nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x + self.mix(x).tanh()
            h = self.norm(x)
            return x + self.mlp(h), self.router(h)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: torch.Tensor) -> Any:
            loss, logged = 0.0, []
            for i, layer in enumerate(self.layers):
                x, router = layer(x)
                if i in read:
                    loss = loss + router.logsumexp(-1).mean()
                else:
                    logged.append(router.detach().mean())
            return x.square().mean() + loss, *logged

    model, x = Stack(), torch.randn(26, H)
    model(x)[0].backward()
    plain = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="mst", options={**OPTIONS, **EAGER})(x)[0].backward()
    assert sum(shared) >= (0 if read else 3)
    for name, parameter in model.named_parameters():
        grad, truth = parameter.grad, plain[name]
        assert (grad is None) == (truth is None), name
        assert truth is None or grad is None or error(grad, truth.double()) < 1e-5
    assert (plain["layers.0.router.weight"] is None) == (0 not in read)
