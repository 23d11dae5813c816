"""Found by trying to break it; each is exact now, chunked or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import DEVICE, EAGER, check_exact, chunked, error, reasons, step
from tests.models import LanguageModel, SwiGLU, token_inputs

SMALL = {"mst.chunk_tokens": 8, **EAGER}
V, H, I = 61, 16, 48  # noqa: E741


class Parts(nn.Module):
    """Embedding, norm, up, down, two heads; ``fn(self, hidden, labels)`` makes the loss."""

    def __init__(self, fn: Callable[..., torch.Tensor], frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, H), nn.LayerNorm(H)
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
        self.head, self.head2 = nn.Linear(H, V), nn.Linear(H, V)
        self.fn = fn
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.fn(self, self.embed(ids), labels)


def ce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def masked_vocabulary(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = s.head(s.norm(x))
    logits[..., 50:] = -1e4
    return ce(logits[:, :-1], labels[:, 1:].clamp(max=49))


def scaled_in_place(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = s.head(s.norm(x))
    logits.mul_(0.5)
    return ce(logits[:, :-1], labels[:, 1:])


def input_changed_after_the_head(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    h = s.norm(x)
    logits = s.head(h)
    with torch.no_grad():
        h.mul_(3.0)
    return ce(logits[:, :-1], labels[:, 1:])


def statistics_under_no_grad(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    y = s.down(F.gelu(s.up(x)))
    with torch.no_grad():
        statistic = y.abs().mean()
    return (y**2).mean() + 0 * statistic + x.mean()


def loss_read_under_no_grad(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = ce(s.head(x), labels)
    with torch.no_grad():
        metric = loss * 2
    return loss + 0 * metric


def weights_from_the_loss(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(s.head(x).flatten(0, 1), labels.flatten(), reduction="none")
    with torch.no_grad():
        weight = torch.sigmoid(loss)
    return (loss * weight).mean()


def positional_inplace(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    x = x * 1.0
    y = s.up(x)
    F.leaky_relu(x, 0.1, True)
    return (s.down(F.gelu(y)) ** 2).mean() + x.mean()


def side_input_changed(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    m = torch.ones(2, 23, 1) * 2
    y = s.down(F.gelu(s.up(x)) + m)
    F.hardtanh(m, -1.0, 1.0, True)
    return (y**2).mean() + m.mean()


def aten_in_place(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    m = torch.ones(2, 23, 1) * 2
    y = s.down(F.gelu(s.up(x)) + m)
    torch.ops.aten.mul_.Scalar(m, 5)
    return (y**2).mean() + m.mean()


def detached_teacher(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    teacher = s.head2(x).detach()
    return F.cross_entropy(s.head(x).view(-1, V), F.softmax(teacher, -1).view(-1, V))


def no_grad_teacher(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = F.softmax(s.head2(x), -1)
    return F.cross_entropy(s.head(x).view(-1, V), target.view(-1, V))


def two_autocast_states(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=False):
        logits = s.head(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return ce(logits[:, :-1], labels[:, 1:])


def accuracy_first(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == labels).float().mean()
    return ce(logits, labels) + 0 * accuracy


def two_heads(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ce(s.head(x), labels) + 0.5 * ce(s.head2(x), labels.flip(1))


def low_rank(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    a, b = s.head.weight[:4, :], s.head2.weight[:I, :4]
    wide = s.up(x) + 0.5 * F.linear(F.linear(x, a), b)
    act = F.silu(wide)
    return (s.down(act) + F.linear(F.linear(act, s.up.weight.T[:4, :]), s.head.weight[:H, :4])).square().mean()


def token_count(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return s.down(F.gelu(s.up(x)) / x.shape[1]).square().mean()


# name -> (function, frozen parts, MLPs chunked, losses chunked)
CASES: dict[str, tuple[Callable[..., torch.Tensor], tuple[str, ...], int, int]] = {
    "masked_vocabulary": (masked_vocabulary, (), 0, 1),
    "scaled_in_place": (scaled_in_place, (), 0, 1),
    "input_changed_after_the_head": (input_changed_after_the_head, ("head",), 0, 0),
    "statistics_under_no_grad": (statistics_under_no_grad, (), 1, 0),
    "loss_read_under_no_grad": (loss_read_under_no_grad, (), 0, 1),
    "weights_from_the_loss": (weights_from_the_loss, (), 0, 1),
    "positional_inplace": (positional_inplace, ("up",), 1, 0),
    "side_input_changed": (side_input_changed, (), 1, 0),
    "aten_in_place": (aten_in_place, (), 0, 0),
    "detached_teacher": (detached_teacher, (), 0, 1),
    "no_grad_teacher": (no_grad_teacher, (), 0, 1),
    "two_autocast_states": (two_autocast_states, (), 0, 1),
    "accuracy_first": (accuracy_first, (), 0, 1),
    "two_heads": (two_heads, (), 0, 2),
    "low_rank": (low_rank, (), 1, 0),
    "token_count": (token_count, (), 1, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    fn, frozen, mlps, losses = CASES[name]
    ours = check_exact(Parts(fn, frozen), token_inputs(), slack=1e-2 if "autocast" in name else None)
    assert (chunked(ours.report, "mlp"), chunked(ours.report, "loss")) == (mlps, losses), str(ours.report)


@pytest.mark.parametrize("name", CASES)
def test_exact_with_symbolic_sizes(name: str) -> None:
    fn, frozen, *_ = CASES[name]
    check_exact(Parts(fn, frozen), token_inputs(), slack=1e-2 if "autocast" in name else None, dynamic=True)


def two_labels(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    return 0.3 * ce(logits, labels) + 0.7 * ce(logits, labels.flip(1)) * (labels > 3).sum()


def test_weights_of_losses_are_formed_in_fp64_for_a_loss_in_fp64() -> None:
    model, inputs = Parts(two_labels).double(), token_inputs()
    plain, ours = (step(model, inputs, how, False) for how in (None, {"backend": "mst", "options": SMALL}))
    assert error(ours.loss, plain.loss) < 1e-14
    assert all(error(ours.grads[n], g) < 1e-13 for n, g in plain.grads.items())
    assert "in the forward" in str(ours.report)


def patches(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Places of an image as tokens: a convolution has its features in front of them."""
    image = x.transpose(1, 2)[..., None]
    y = F.conv2d(image, s.up.weight[:H, :, None, None]).flatten(2).transpose(1, 2)
    z = F.gelu(F.conv1d(x.transpose(1, 2), s.up.weight[:H, :, None])).transpose(1, 2)
    return s.down(F.gelu(s.up(y)) * F.silu(s.up(z))).square().mean()


def normed_in_groups(s: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A group norm, as a convolution, has its features in front of its places."""
    y = F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)
    return s.down(F.gelu(s.up(y))).square().mean()


@pytest.mark.parametrize("fn", [patches, normed_in_groups])
def test_tokens_behind_an_op_with_features_second_are_found(fn: Any) -> None:
    ours = check_exact(Parts(fn), token_inputs())
    assert chunked(ours.report, "mlp") == 1, str(ours.report)


@pytest.mark.parametrize("blocks", [1, 3])
def test_convolutions_of_the_models_own_input(blocks: int) -> None:
    """And of what a residual of such values is."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.Conv1d(H, I, 1) for _ in range(blocks))
            self.downs = nn.ModuleList(nn.Conv1d(I, H, 1) for _ in range(blocks))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for up, down in zip(self.ups, self.downs, strict=True):
                x = x + down(F.gelu(up(x)))
            return x.square().mean()

    ours = check_exact(Channels(), {"x": torch.randn(2, H, 23, requires_grad=True)})
    assert chunked(ours.report, "mlp") == blocks, str(ours.report)


def of_weights_alone(s: Any, h: torch.Tensor) -> torch.Tensor:
    return s.down(h) + torch.sigmoid(h @ s.down.weight[:1].T) * (h @ s.a.T @ s.b.T)


def low_rank(s: Any, h: torch.Tensor) -> torch.Tensor:
    return s.down(h).relu().mean(-1, keepdim=True) + F.linear(h, s.b @ s.a)


def mapped(s: Any, h: torch.Tensor) -> torch.Tensor:
    y = s.down(h).relu().mean(-1, keepdim=True)
    return y + F.linear(h, torch.vmap(torch.sin)(s.b) @ s.a)


def of_a_result(s: Any, h: torch.Tensor) -> torch.Tensor:
    y = s.down(h)
    return y + h @ (s.a * y.mean()).T @ s.b.T


@pytest.mark.parametrize(
    ("fn", "legal"), [(of_weights_alone, True), (low_rank, True), (mapped, False), (of_a_result, False)]
)
def test_weights_computed_behind_a_result(fn: Any, legal: bool) -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
            self.a, self.b = nn.Parameter(torch.randn(4, I)), nn.Parameter(torch.randn(H, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fn(self, F.gelu(self.up(x))).square().mean()

    ours = check_exact(Adapted(), {"x": torch.randn(2, 23, H, requires_grad=True)})
    assert chunked(ours.report, "mlp") == legal, str(ours.report)
    assert ("not convex" in reasons(ours.report)) != legal


def test_an_attention_with_dropout_stays_behind_the_dropout_before_it() -> None:
    up, down, gated = nn.Linear(H, I), nn.Linear(I, H), nn.Linear(I, H)
    weights = [p for m in (up, down, gated) for p in m.double().parameters()]

    def fn(x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(up(x))
        z = F.dropout(down(h).relu(), 0.3)
        gate = F.scaled_dot_product_attention(x, x, x, dropout_p=0.4).mean(-1, keepdim=True)
        return (z + gated(h * gate)).square().sum()

    x, found = torch.randn(2, 23, H, dtype=torch.float64, requires_grad=True), []
    for f in (torch.compile(fn, backend="aot_eager"), torch.compile(fn, backend="mst", options=SMALL)):
        torch.manual_seed(3)
        loss = f(x)
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, *weights])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_an_elementwise_op_in_front_fixes_no_length() -> None:
    up, down, bias = nn.Linear(H, I), nn.Linear(I, H), nn.Parameter(torch.randn(H))
    compiled = torch.compile(lambda x: down(F.gelu(up(x + bias))).square().mean(), backend="mst", options=SMALL)
    for length in (H, H + 8, 3 * H):
        x = torch.randn(length, H)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).backward()
    assert len(mst_fx.reports()) == 1


def test_flattened_logits_returned_under_dynamic_shapes() -> None:
    head = nn.Linear(H, V)

    def fn(x: torch.Tensor, labels: torch.Tensor):
        logits = head(x)
        return ce(logits, labels), logits.view(-1, V)

    compiled = torch.compile(fn, backend="mst", dynamic=True, options={"mst.chunk_tokens": 8, **EAGER})
    for length in (23, 31):
        x, labels = torch.randn(2, length, H), torch.randint(0, V, (2, length))
        loss, logits = compiled(x, labels)
        torch.testing.assert_close(loss, fn(x, labels)[0])
        torch.testing.assert_close(logits + 0, fn(x, labels)[1])
    assert chunked(mst_fx.reports()[-1], "loss") == 1


def test_module_compile_and_checkpointed_loss() -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    expected = model(**inputs)
    model.compile(backend="mst", options={"mst.chunk_tokens": 8, **EAGER})
    torch.testing.assert_close(model(**inputs), expected)

    class Checkpointed(Parts):
        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            run = torch.utils.checkpoint.checkpoint
            return run(lambda x: ce(self.head(x), labels), self.embed(ids), use_reentrant=False)

    ours = check_exact(Checkpointed(ce), inputs)
    assert chunked(ours.report, "loss") == 1
    assert "recomputed" in str(ours.report)


def test_dtensor_weights_are_left_alone_with_the_reason(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        mlp = SwiGLU()
        for layer in (mlp.gate, mlp.up, mlp.down):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Replicate()]))
        x = distribute_tensor(torch.randn(2, 23, 16), mesh, [Replicate()])
        y = torch.compile(mlp, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})(x)
        torch.testing.assert_close(y.to_local(), mlp(x).to_local())
        assert "DTensor" in str(mst_fx.reports()[-1])
    finally:
        dist.destroy_process_group()


def test_in_place_ops_beside_vmap() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = SwiGLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = torch.arange(23.0)
            near = torch.func.vmap(lambda p: (p - places).abs() < 3)(places)
            places.mul_(2.0)
            weights = torch.zeros(23)
            weights[3:7] = 1.0
            weights.add_(near.float().mean(0))
            return self.mlp(x) * (weights + places)[:, None]

    model, x = Masked(), torch.randn(2, 23, 16)
    expected = model(x)
    options = {"mst.chunk_tokens": 8, **EAGER}
    torch.testing.assert_close(torch.compile(model, backend="mst", options=options)(x), expected)
    report = mst_fx.reports()[-1]
    assert len(report.chunked) == 1


def test_chunks_of_as_many_tokens_as_there_are_features() -> None:
    """Torch 2.11 took the number of rows for the number of features: a shorter last chunk failed."""
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    loss = torch.compile(model, backend="mst", options={"mst.chunk_tokens": 16, **EAGER})(**inputs)
    torch.testing.assert_close(loss, model(**inputs))
    loss.backward()
    assert len(mst_fx.reports()[-1].chunked) == 2
