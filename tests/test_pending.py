"""A region is computed elsewhere than its nodes were: what it reads must be there still, and be the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import chunked, error, reasons
from tests.parts import LABELS, SMALL, H, I, Parts, T, V, by_name, same


def slice_under_no_grad(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    with torch.no_grad():
        part = logits[:-1]
    p = part.softmax(-1).gather(-1, LABELS[1:, None]).mean()
    return F.cross_entropy(logits, LABELS) + p * x.sum()


def pieces_under_no_grad(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    with torch.no_grad():
        first, _ = logits.split(T // 2)
    return F.cross_entropy(logits, LABELS) + first.logsumexp(-1).mean() * x.sum()


def view_under_no_grad(s: Any, x: torch.Tensor) -> torch.Tensor:
    """It says that it requires a gradient, and none gets through it."""
    h = F.linear(x, s.up.weight)
    with torch.no_grad():
        part = h[..., : I // 2]
    return s.down(torch.cat([part, F.gelu(h[..., I // 2 :])], -1))


def rows_under_no_grad(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        rows = x.unbind()
    return s.down(F.gelu(s.up(torch.stack([r * 2 for r in rows])))) + _mlp(x, s.up.weight, s)


def _mlp(x: torch.Tensor, up: torch.Tensor, s: Any) -> torch.Tensor:
    return s.down(F.gelu(F.linear(x, up)))


def scale_changes(s: Any, x: torch.Tensor) -> torch.Tensor:
    up = s.q.double() * s.scale
    s.scale.mul_(0.5)
    return _mlp(x, up, s)


def weight_changes_through_a_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    up = s.q.double() * s.scale
    up.view(-1)[3] = 100.0
    return _mlp(x, up, s)


def what_it_is_made_of_changes_through_a_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    up = s.q.double()
    up.view(-1).mul_(3.0)
    return _mlp(x, up * s.scale, s)


def losses_are_added_to_an_input(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits, total = s.head(x), s.three[0]
    total += F.cross_entropy(logits, LABELS)
    total += logits.logsumexp(-1).mean()
    return total * 1


@torch.no_grad()
def hidden_states_change_behind_returned_logits(s: Any, x: torch.Tensor) -> Any:
    h = x * 1
    logits = s.head(h)
    loss = F.cross_entropy(logits, LABELS)
    h.zero_()
    return loss, logits, h


def offset_changes(s: Any, x: torch.Tensor) -> torch.Tensor:
    aux, logits = s.three[0], s.head(x)
    loss = F.cross_entropy(logits, LABELS) - aux
    s.three.add_(1)
    return loss + logits.logsumexp(-1).mean()


def partial_sum_changes(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    loss = F.cross_entropy(logits, LABELS) * 2
    loss.detach().zero_()
    return loss + logits.logsumexp(-1).mean()


def sums_of_sequences_change(s: Any, x: torch.Tensor) -> torch.Tensor:
    sums = F.cross_entropy(s.head(x), LABELS, reduction="none").view(4, 8).sum(1) * 2
    sums.detach()[0].zero_()
    return (sums * 3).sum()


def last_tokens_by_narrow(s: Any, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(s.head(x).narrow(0, -20, 20), LABELS[-20:])


def features_by_int32(s: Any, x: torch.Tensor) -> torch.Tensor:
    logits = s.head(x)
    logits[:, torch.tensor([1, 3], dtype=torch.int32)] = -3.0
    return F.cross_entropy(logits, LABELS % 1)


CASES = by_name(
    (slice_under_no_grad, "loss"), (pieces_under_no_grad, "loss"), (scale_changes, "mlp"),
    (weight_changes_through_a_view, "mlp"), (what_it_is_made_of_changes_through_a_view, "mlp"),
    (losses_are_added_to_an_input, ""), (view_under_no_grad, "mlp"), (rows_under_no_grad, "mlp"),
    (hidden_states_change_behind_returned_logits, ""), (offset_changes, "loss"), (partial_sum_changes, ""),
    (sums_of_sequences_change, ""), (last_tokens_by_narrow, "loss"), (features_by_int32, "loss"),
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    same(*CASES[name])


def test_a_number_that_becomes_symbolic_weighs_a_loss_in_fp64() -> None:
    head = nn.Linear(H, V).double()
    x = torch.randn(T, H, dtype=torch.float64)

    def fn(k: float) -> torch.Tensor:
        logits = head(x)
        return F.cross_entropy(logits, LABELS) + k * logits.logsumexp(-1).mean()

    compiled = torch.compile(fn, backend="mst", options=SMALL)
    for k in (0.1, 0.2, 0.3):
        assert error(compiled(k).detach(), fn(k).detach()) < 1e-14


@pytest.mark.parametrize("frozen", ["TTFF", "TFTF", "TFFT"])
def test_equal_layers_of_two_kinds_side_by_side(frozen: str) -> None:
    class Layer(nn.Module):
        def __init__(self, frozen: bool) -> None:
            super().__init__()
            self.q, self.up, self.down = nn.Linear(H, H), nn.Linear(H, I), nn.Linear(I, H)
            self.q.requires_grad_(not frozen)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + torch.tanh(self.q(x))
            return x + self.down(F.gelu(self.up(x)))

    model = nn.Sequential(nn.Embedding(9, H), *(Layer(f == "T") for f in frozen)).double()
    ids = torch.arange(T) % 9
    model(ids).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, backend="mst", options=SMALL)(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            assert parameter.grad is not None
            assert error(parameter.grad, plain[name]) < 1e-12
    assert chunked(mst_fx.reports()[-1], "mlp") == 4


# -- switches right in front of the loss ---------------------------------------------------------------


def loss_behind_autocast(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        z = s.head(x)
    return F.cross_entropy(z, LABELS)


def loss_within_autocast(s: Any, x: torch.Tensor) -> torch.Tensor:
    z = s.head(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return F.cross_entropy(z, LABELS)


def mean_within_autocast(s: Any, x: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(s.head(x), LABELS, reduction="none")
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return losses.mean()


@pytest.mark.parametrize("fn", [loss_behind_autocast, loss_within_autocast, mean_within_autocast])
def test_a_loss_at_a_switch_of_autocast(fn: Callable[..., Any]) -> None:
    """Nodes of the graph that switch a mode are not to be run: later autocasts would keep casts of old weights."""
    same(fn, "loss")
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(linear(x))
        with torch.no_grad():
            linear.weight.mul_(3)
            linear.bias.mul_(3)
    torch.testing.assert_close(found[1], 3 * found[0], rtol=0.1, atol=0.1)


# -- logits with a metric, and a loss elsewhere --------------------------------------------------------


def test_logits_that_may_be_trained_on_elsewhere_stay() -> None:
    def metric_beside(s: Any, x: torch.Tensor) -> Any:
        z = s.head(x)
        with torch.no_grad():
            return z, (z.argmax(-1) == LABELS).double().mean()

    found = []
    for options in (None, SMALL):
        torch.manual_seed(0)
        model, x = Parts(metric_beside), torch.randn(T, H)
        z, accuracy = (torch.compile(model, backend="mst", options=options) if options else model)(x)
        F.cross_entropy(z, LABELS).backward()
        found.append((accuracy, model.head.weight.grad))
    torch.testing.assert_close(found[1], found[0])
    assert "compute the loss inside the compiled function" in reasons(mst_fx.reports()[-1])


# -- other ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_sums_over_ranks_keep_their_order(group: Any) -> None:
    """Ranks pair them by it, and each decides for itself what it chunks."""

    def logged_first(s: Any, x: torch.Tensor) -> Any:
        losses = F.cross_entropy(s.head(x), LABELS, reduction="none")
        logged = funcol.all_reduce(losses.detach().sum(), "sum", group)
        count = funcol.all_reduce((LABELS != -100).sum(), "sum", group)
        return (losses / count).sum(), logged / count

    report = same(logged_first, "loss")
    first, second = (n for n in report.graphs[0].after.graph.nodes if "all_reduce" in str(n.target))
    assert first.meta["example_value"].is_floating_point()
    assert not second.meta["example_value"].is_floating_point()


def test_frozen_weights_are_gathered_in_front_of_the_loop(group: Any) -> None:
    def gathered(s: Any, x: torch.Tensor) -> torch.Tensor:
        up, down = (funcol.all_gather_tensor(m.weight, 0, group).double() for m in (s.up, s.down))
        return F.linear(F.gelu(F.linear(x, up)), down)

    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    report = mst_fx.explain(Parts(gathered).requires_grad_(False), SMALL)(x)
    assert chunked(report, "mlp")
    assert all("gather" not in body.forward for body in report.bodies)
    assert sum("all_gather" in str(n.target) for n in report.graphs[0].after.graph.nodes) == 2
