"""Modules that their user declares token-wise: one node through Dynamo, one region, exact; false promises raise."""

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import mst_fx
from tests.harness import DEVICE, EAGER, check_exact, chunked, reasons
from tests.models import B, H, I, LanguageModel, S, SwiGLU, token_inputs

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


class MaskedExperts(nn.Module):
    """A mixture of experts as one writes it first: every expert on every token, masked; returns router logits."""

    def __init__(self, experts: int = 2, k: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(H, experts)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(experts))
        self.register_buffer("scale", torch.ones(experts))
        self.k, self.dropout = k, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, hidden = x.shape
        flat = x.view(batch * length, hidden)
        logits = self.router(flat) * self.scale
        top, index = logits.softmax(-1).topk(self.k, -1)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            share = (top * (index == e)).sum(-1, keepdim=True)
            y += share * self.dropout(expert(flat))
        y = y.view(batch, length, hidden)
        return (y if weight is None else y * weight[..., None]), logits


class Model(nn.Module):
    """A block around the experts, the loss with the router's auxiliary loss in it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.lm, self.moe = LanguageModel(), mst_fx.tokenwise(experts)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.lm.embed(ids)
        y, logits = self.moe(x)
        share = logits.softmax(-1).mean(0)
        z, _ = self.moe(self.lm.norm(x + y), weight=(labels >= 0).float())  # called twice, with another argument
        hidden = self.lm.head(self.lm.norm(x + y + z))
        return F.cross_entropy(hidden.flatten(0, 1), labels.flatten()) + 0.1 * (share * share).sum()


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_experts_with_router_logits_are_exact(dynamic: bool) -> None:
    model = Model(MaskedExperts())
    model.moe.experts[1].requires_grad_(not dynamic)
    ours = check_exact(model, token_inputs(), dynamic=dynamic, fullgraph=True)
    assert chunked(ours.report, "mlp") == 2, str(ours.report)
    assert all(r.bytes_after < r.bytes_before for r in ours.report.chunked if r.kind == "mlp")


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    class Cast(Model):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
                return super().forward(ids, labels)

    torch.manual_seed(3)
    ours = check_exact(Cast(MaskedExperts(k=2)), token_inputs(), autocast=not inside, slack=1e-2)
    assert chunked(ours.report, "mlp") == 2


class Tokens(nn.Module):
    """One promised module and a loss."""

    def __init__(self, fn, **parts: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, H)
        self.inner = mst_fx.tokenwise(Function(fn, **parts))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = self.inner(self.embed(ids))
        outs = out if isinstance(out, tuple) else (out,)
        return sum(o.square().mean() for o in outs) + 0 * labels.sum()


class Function(nn.Module):
    def __init__(self, fn, **parts: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.fn = nn.Linear(H, I), nn.Linear(I, H), fn
        self.register_buffer("count", torch.zeros(H))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor):
        return self.fn(self, x)


class Halved(torch.autograd.Function):
    """A gradient that autograd would not find: half of it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def detached(s, x):
    with torch.no_grad():
        gate = torch.sigmoid(s.up(x))
    return s.down(gate * s.up(x))


def in_place(s, x):
    y = s.up(x)
    y[..., ::2] *= 2
    y.add_(1.0).relu_()
    return s.down(y)


def literal_sizes(s, x):
    return s.down(s.up(x).view(x.shape[0], x.shape[1], 4, -1).softmax(-1).view(x.shape[0] * x.shape[1], -1)).view_as(x)


LEGAL = {
    "autograd_function": lambda s, x: s.down(Halved.apply(s.up(x))),
    "no_grad_inside": detached,
    "in_place_inside": in_place,
    "literal_sizes": literal_sizes,
    "python_constant": lambda s, x: s.down(s.up(x) * torch.tensor([2.0] * I)),
    "adapter": lambda s, x: s.down(F.gelu(s.up(x) + s.b(s.a(x)))),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_a_promised_module_may_do(name: str) -> None:
    model = Tokens(LEGAL[name], a=nn.Linear(H, 2), b=nn.Linear(2, I))
    ours = check_exact(model, token_inputs(), options={"mst.verify_tokenwise": True})
    assert chunked(ours.report, "mlp") == 1, str(ours.report)


def counted(s, x):
    with torch.no_grad():
        s.count += x.sum((0, 1))
    return s.down(F.gelu(s.up(x)))


def counted_into(s, x):
    with torch.no_grad():
        torch.add(s.count, 1.0, out=s.count)
    return s.down(F.gelu(s.up(x)))


REFUSED = {
    "buffer_updated": (counted, "buffer in place"),
    "buffer_given_as_out": (counted_into, "buffer in place"),
    "noise": (lambda s, x: s.down(s.up(x) + torch.rand_like(s.up(x))), "random numbers"),
    "scalar_output": (lambda s, x: (s.down(s.up(x)), x.mean()), "output 1 has shape .*no row per token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_with_its_reason(name: str) -> None:
    fn, reason = REFUSED[name]
    model = Tokens(fn)
    report = mst_fx.explain(model, OPTIONS)(**token_inputs())
    assert "test_tokenwise.py" in report.regions[0].source
    assert not [r for r in report.chunked if r.kind == "mlp"]
    assert re.search(reason, reasons(report)), str(report)


FALSE = {
    "statistic": lambda s, x: s.down(s.up(x) - s.up(x).mean(1, keepdim=True)),
    "attention": lambda s, x: x + F.scaled_dot_product_attention(x, x, x),
    "capacity": lambda s, x: s.down(s.up(x)) * ((s.up(x)[..., :1] > 0).flatten().cumsum(0) < 9).view(*x.shape[:2], 1),
    "backward_only": lambda s, x: s.down(Normed.apply(s.up(x))),
    "position": lambda s, x: s.down(s.up(x)) * torch.arange(x.shape[1]).view(1, -1, 1),
}


class Normed(torch.autograd.Function):
    """Token-wise forward, a gradient divided by that of all tokens."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


@pytest.mark.parametrize("name", FALSE)
def test_false_promise_raises_when_verified(name: str) -> None:
    compiled = torch.compile(Tokens(FALSE[name]), backend="mst", options={"mst.verify_tokenwise": True, **OPTIONS})
    with pytest.raises(ValueError, match="`Function` is not token-wise: with 48 random tokens"):
        compiled(**token_inputs())


def test_true_promise_is_verified_quietly_and_random_state_is_left_alone() -> None:
    model = Model(MaskedExperts(dropout=0.3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    report = mst_fx.explain(model.moe, {"mst.verify_tokenwise": True, **OPTIONS})(torch.ones(2, 9, H))
    assert len(report.chunked) == 1
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


def test_dropout_inside_is_seeded() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.drop = nn.Linear(4, 64, bias=False), nn.Linear(64, 4, bias=False), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.drop(self.up(x)))

    module = mst_fx.tokenwise(Dropped().double())
    fn = torch.compile(lambda x: module(x), backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, 4, dtype=torch.float64, requires_grad=True)
    y = fn(x)
    assert len(mst_fx.reports()[-1].chunked) == 1
    y.backward(tangent := torch.randn_like(y))
    inner = (y * tangent).sum()  # linear in x and in each weight for a fixed mask: see test_dropout
    torch.testing.assert_close((x * x.grad).sum(), inner)
    torch.testing.assert_close((module.up.weight * module.up.weight.grad).sum(), inner)
    assert not torch.equal(fn(x), y)
    module.eval()
    torch.testing.assert_close(fn(x), module(x))  # a new mode is a new graph


def test_a_changed_number_is_a_new_graph() -> None:
    module = Function(lambda s, x: s.down(s.up(x)) * s.factor)
    module.factor = 2.0
    fn = torch.compile(mst_fx.tokenwise(module), backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, H)
    for module.factor in (2.0, 3.0, 5.0, 7.0):
        torch.testing.assert_close(fn(x), module(x))


def scaled_where_asked(s, x):
    return s.down(s.up(x) * (1.0 if s.factor is None else s.factor) * getattr(s, "late", 1.0))


def test_a_number_and_a_part_that_come_later_are_seen() -> None:
    module = Function(scaled_where_asked)
    module.factor = None
    fn = torch.compile(mst_fx.tokenwise(module), backend="mst", options=OPTIONS)
    x = torch.randn(2, 13, H)
    if torch.__version__ < (2, 13):
        module.late = 1.0  # Dynamo does not see what is not there when it traces
    for name, value in (("factor", 2.0), ("late", 3.0), ("up", nn.Sequential(module.up, nn.Dropout(1.0)))):
        torch.testing.assert_close(fn(x), module(x))
        setattr(module, name, value)
    module.eval()
    torch.testing.assert_close(fn(x), module(x))
    module.up[1].train()
    torch.testing.assert_close(fn(x), module.down(torch.zeros(2, 13, I)))


def test_module_stays_what_it_was() -> None:
    plain, module = SwiGLU(), SwiGLU()
    same = mst_fx.tokenwise(module)
    assert same is module
    assert mst_fx.tokenwise(module) is module
    assert type(module) is SwiGLU
    assert list(module.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, H)
    clone = copy.deepcopy(module)
    clone.down.weight.data.zero_()
    assert not clone(x).any()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), module(x))
    fn = torch.compile(clone, backend="mst", options=OPTIONS)
    fn(torch.randn(20, H))
    assert len(mst_fx.reports()[-1].chunked) == 1
    assert not fn(torch.randn(20, H)).any()


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_other_backends_lose_nothing(backend: str) -> None:
    model, inputs = Model(MaskedExperts()), token_inputs()
    expected = torch.autograd.grad(model(**inputs), list(model.parameters()))
    found = torch.autograd.grad(torch.compile(model, backend=backend)(**inputs), list(model.parameters()))
    torch.testing.assert_close(found, expected)


def test_checkpointed_block() -> None:
    class Checkpointed(Model):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            run = torch.utils.checkpoint.checkpoint
            y, logits = run(self.moe, self.lm.embed(ids), use_reentrant=False)
            return self.lm.head(y).square().mean() + logits.square().mean() + 0 * labels.sum()

    ours = check_exact(Checkpointed(MaskedExperts()), token_inputs())
    assert chunked(ours.report, "mlp") == 1, str(ours.report)


def test_what_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module"):
        mst_fx.tokenwise(F.gelu)  # pyright: ignore
    module = SwiGLU()
    module.offset = torch.ones(H)
    with pytest.raises(ValueError, match=r"`offset` is a tensor .*register_buffer"):
        mst_fx.tokenwise(module)


def test_a_module_that_reads_values_says_so() -> None:
    module = mst_fx.tokenwise(Function(lambda s, x: x if x.sum() > 0 else s.down(s.up(x))))
    x = torch.randn(2, 9, H)
    with pytest.warns(UserWarning, match="`Function` can't be traced as one call"):
        y = torch.compile(lambda x: module(x) + 1, backend="mst", options=OPTIONS)(x)
    torch.testing.assert_close(y, module(x) + 1)


def test_arguments_that_are_not_tokens_are_refused() -> None:
    module = Function(lambda s, x: s.down(s.up(x[0]) + x[1]))
    module.forward = lambda x, bias: module.down(module.up(x) + bias)  # an instance's own forward is kept
    fn = torch.compile(mst_fx.tokenwise(module), backend="mst", options=OPTIONS)
    x, bias = torch.randn(2, S, H), torch.randn(I)
    torch.testing.assert_close(fn(x, bias), module(x, bias))
    assert f"has shape [{I}]: no row per token of [{B}, {S}]" in reasons(mst_fx.reports()[-1])


class Constant(nn.Module):
    """Eight numbers, as rows or as columns."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.up, self.down, self.shape = nn.Linear(H, 64), nn.Linear(64, H), shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.shape == (8, 1):
            constant = torch.tensor([[1.0], [2], [3], [4], [5], [6], [7], [8]])
        else:
            constant = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
        return self.down(F.gelu((self.up(x).unflatten(-1, (8, 8)) * constant).flatten(-2)))


def test_constants_of_another_shape_are_another_body() -> None:
    model = nn.Sequential(mst_fx.tokenwise(Constant((8, 1))), mst_fx.tokenwise(Constant((1, 8))))
    x = torch.randn(2, 13, H)
    torch.testing.assert_close(torch.compile(model, backend="mst", options=OPTIONS)(x), model(x))
    assert chunked(mst_fx.reports()[-1], "mlp") == 2


def test_modules_compiled_on_their_own() -> None:
    x = torch.randn(2, 13, H)
    for module in [mst_fx.tokenwise(Function(lambda s, x: s.down(F.gelu(s.up(x))))) for _ in range(3)]:
        torch.testing.assert_close(torch.compile(module, backend="mst", options=OPTIONS)(x), module(x))
        assert chunked(mst_fx.reports()[-1], "mlp")


def kept(s, x):
    h = F.gelu(s.up(x))
    s.aux = h.detach().mean()
    return s.down(h)


def kept_number(s, x):
    s.aux = x.shape[0]
    return s.down(F.gelu(s.up(x)))


@pytest.mark.parametrize("fn", [kept, kept_number])
def test_a_module_that_keeps_something_is_left_to_eager(fn) -> None:
    module, x = Function(fn), torch.randn(2, 13, H)
    module.aux = None
    with pytest.warns(UserWarning, match="its forward keeps something in `aux`"):
        y = torch.compile(mst_fx.tokenwise(module), backend="mst", options=OPTIONS)(x)
    assert not isinstance(module.aux, FakeTensor)
    assert float(module.aux) == float(F.gelu(module.up(x)).mean() if fn is kept else 2)
    torch.testing.assert_close(y, module(x))


def test_a_part_under_two_names_cannot_be_declared() -> None:
    module = Function(lambda s, x: s.down(F.gelu(s.alias(x))))
    module.alias = module.up
    with pytest.raises(ValueError, match="`up` and `alias` are one module"):
        mst_fx.tokenwise(module)
