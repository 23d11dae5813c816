"""What was one value stays one: its memory and strides, its draws, its gradient; computed twice it would be two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from tests.harness import chunked, error, reasons
from tests.parts import LABELS, SMALL, H, I, Parts, T, by_name, same


def mlp(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.down(F.gelu(s.up(x)))


def seq_first(s: Any, x: torch.Tensor) -> torch.Tensor:
    """A residual stream [S, B, H] made of one [B, S, H], as in fairseq and CLIP."""
    x = x.view(4, 8, H).transpose(0, 1)
    return x + mlp(s, x)


# -- memory ------------------------------------------------------------------------------------------


def narrow_value_and_its_alias(s: Any, x: torch.Tensor) -> Any:
    h = s.up(x)
    m = h.mean(-1, keepdim=True)
    d = m.detach()
    y = s.down(F.relu(h - m))
    d.mul_(0)
    return y, m


def narrow_value_and_a_view_of_it(s: Any, x: torch.Tensor) -> Any:
    h = s.up(x)
    m = h.mean(-1, keepdim=True)
    y = s.down(F.relu(h - m)).detach()
    d = m.detach().squeeze(-1)
    d += 1
    return y, m.detach(), d


def wide_value_returned_as_two(s: Any, x: torch.Tensor) -> Any:
    h = s.up(x)
    g = F.gelu(h)
    return s.down(torch.cat([g * h, h.tanh() - h, g.exp(), h.sin()], -1)[..., :I]), g, g.view(T, 4, -1)


def residual_on_a_transposed_stream(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = seq_first(s, x)
    y.transpose(0, 1).reshape(-1, H).mul_(2)
    return y


def view_of_a_transposed_stream(s: Any, x: torch.Tensor) -> torch.Tensor:
    return seq_first(s, x).transpose(0, 1).view(-1, H)


def like_a_transposed_stream(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = seq_first(s, x)
    ones = torch.ones_like(y)
    ones.transpose(0, 1).reshape(-1)[:5] = 0
    return y * ones


@torch.no_grad()
def gate_on_a_transposed_value(s: Any, x: torch.Tensor) -> torch.Tensor:
    t = x.view(4, 8, H).transpose(0, 1)
    y = t * torch.sigmoid(mlp(s, t))
    y.transpose(0, 1).reshape(-1).mul_(3)
    return y


def strides_are_read(s: Any, x: torch.Tensor) -> torch.Tensor:
    return seq_first(s, x).as_strided((4, 8 * H), (8 * H, 1)) * 1


def experts_outputs_in_their_order(s: Any, x: torch.Tensor) -> torch.Tensor:
    up, down = (torch.stack([w.T, w.T * 2]) for w in (s.up.weight, s.down.weight))
    y = torch.einsum("besi,eih->bseh", F.gelu(torch.einsum("bsh,ehi->besi", x.view(4, 8, H), up)), down)
    return y.permute(2, 0, 1, 3).view(-1, H)


def labels_prepared_twice(s: Any, x: torch.Tensor) -> torch.Tensor:
    labels, logits = LABELS.clone(), s.head(x.detach()).detach()
    labels[:5] = -100
    first = F.cross_entropy(logits, labels)
    labels.view(4, 8)[1] = -100
    return first + F.cross_entropy(logits, labels)


@torch.no_grad()
def a_view_of_what_changed_before(s: Any, x: torch.Tensor) -> Any:
    y = x * 1
    y.relu_()
    h = s.up(y)
    y.view(-1).mul_(2)
    return s.down(F.gelu(h)), y


def behind_frozen_weights(s: Any, x: torch.Tensor) -> Any:
    y = x * 1
    y.mul_(2)
    h = F.linear(y, s.up.weight.detach())
    y.view(-1).mul_(3)
    return s.down(F.gelu(h)), y


def part_of_a_value_in_place(s: Any, x: torch.Tensor) -> Any:
    z = (x * 2)[:, :4]
    z.mul_(2)
    w = z.reshape(-1)
    w.view(2, -1)[0].mul_(3)
    return mlp(s, x), z, w


@torch.no_grad()
def transposed_value_filled_in_place(s: Any, x: torch.Tensor) -> Any:
    y = (x.view(4, 8, H) * 1).transpose(0, 1)
    y.masked_fill_(torch.arange(8)[:, None, None] > 3, 1.0)
    w = y.contiguous()
    w.view(2, -1)[0].mul_(3)
    return mlp(s, x), y * 1, w * 1


def copied_slice_in_place(s: Any, x: torch.Tensor) -> Any:
    u = s.up(x.view(4, 8, H))
    a = u[:, :-1]
    b = a.detach().reshape(-1, I)
    b.view(2, -1)[0].mul_(3)
    return mlp(s, x), a.mean(-1).mean(1) * 1, b.sum(0), u.sum((0, 1))


def stacked_rows_of_a_transposed_value(s: Any, x: torch.Tensor) -> Any:
    u = x.view(4, 8, H).transpose(0, 1)
    z = torch.stack([u[i].exp() for i in range(8)])
    return mlp(s, x), z.view(-1)


def part_of_a_narrow_value(s: Any, x: torch.Tensor) -> Any:
    h = s.up(x)
    a = h.view(T, 4, -1).amax(-1)[:, :2]
    y = s.down(h * a[:, :1])
    b = a.detach().reshape(-1)
    b.view(2, -1)[0].mul_(3)
    return y, a * 1, b * 1


# -- gradients ---------------------------------------------------------------------------------------


def metric_behind_a_cast_to_its_dtype(s: Any, x: torch.Tensor) -> Any:
    logits = s.head(x)
    with torch.no_grad():
        accuracy = (logits.double().argmax(-1) == LABELS).double().mean()
    return F.cross_entropy(logits, LABELS), accuracy


def wide_value_laid_out_as_it_is(s: Any, x: torch.Tensor) -> Any:
    u = s.up(x)
    with torch.no_grad():
        largest = u.contiguous().abs().amax(-1)
    return s.down(F.gelu(u)), largest


def normed_value_laid_out_as_it_is(s: Any, x: torch.Tensor) -> Any:
    h = F.layer_norm(x, (H,))
    with torch.no_grad():
        g = h.contiguous()
    return F.cross_entropy(s.head(g), LABELS)


def view_under_no_grad_comes_last(s: Any, x: torch.Tensor) -> Any:
    logits = s.head(x)
    loss = F.cross_entropy(logits, LABELS)
    with torch.no_grad():
        confidence = logits[..., :10].amax(-1)
    return loss, confidence


def view_of_a_wide_value_comes_last(s: Any, x: torch.Tensor) -> Any:
    u = s.up(x)
    y = s.down(F.gelu(u))
    with torch.no_grad():
        peak = u[..., :5].amax(-1)
    return y, peak


def statistic_of_a_detached_part(s: Any, x: torch.Tensor) -> Any:
    """Its weight gets no gradient: not one of zeros, which an optimizer would decay it by."""
    h = s.up(x)
    return s.down(F.gelu(h.detach())), h.mean(-1).detach()


# -- forms -------------------------------------------------------------------------------------------


def soft_labels_of_one_sequence(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        p = torch.einsum("bsh,vh->bsv", x[None], s.head.weight).softmax(-1)
    return F.cross_entropy(s.head(x[None] * 2).transpose(1, 2), p.transpose(1, 2))


def product_with_one_number_of_a_wider_dtype(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.up(x)
    g = h.float().abs().amax(-1) * (s.scale / 3)  # fp64: a tensor with a dimension counts in full
    return s.down(h * g.unsqueeze(-1))


def kth_value_without_its_dimension(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.up(x)
    return s.down(h * (h >= h.kthvalue(I - 4, dim=-1).values.unsqueeze(-1)))


def joined_with_nothing(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.gelu(s.up(x))
    return s.down(torch.cat([h, torch.zeros(0, dtype=h.dtype)], -1))


def joined_with_nothing_of_a_wider_dtype(s: Any, x: torch.Tensor) -> Any:
    h = s.up(x).bfloat16()
    c = torch.cat([torch.tensor([]), h], -1)
    c = (c + 1e-3) * 1.001 - 1
    return s.down(c.to(torch.bfloat16).double()), c.amax(-1)


CASES = by_name(
    (narrow_value_and_its_alias, "mlp"), (narrow_value_and_a_view_of_it, "mlp"), (wide_value_returned_as_two, ""),
    (residual_on_a_transposed_stream, "mlp"), (view_of_a_transposed_stream, "mlp"),
    (like_a_transposed_stream, "mlp"), (gate_on_a_transposed_value, "mlp"), (strides_are_read, "mlp"),
    (experts_outputs_in_their_order, "mlp"), (labels_prepared_twice, ""), (a_view_of_what_changed_before, ""),
    (behind_frozen_weights, ""), (metric_behind_a_cast_to_its_dtype, "loss"), (wide_value_laid_out_as_it_is, "mlp"),
    (normed_value_laid_out_as_it_is, "loss"), (view_under_no_grad_comes_last, "loss"),
    (view_of_a_wide_value_comes_last, "mlp"), (soft_labels_of_one_sequence, "loss"),
    (product_with_one_number_of_a_wider_dtype, "mlp"), (kth_value_without_its_dimension, "mlp"),
    (joined_with_nothing, "mlp"), (joined_with_nothing_of_a_wider_dtype, "mlp"), (part_of_a_value_in_place, "mlp"),
    (transposed_value_filled_in_place, "mlp"), (copied_slice_in_place, "mlp"), (part_of_a_narrow_value, ""),
    (stacked_rows_of_a_transposed_value, "mlp"), (statistic_of_a_detached_part, "mlp"),
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    same(*CASES[name])


def test_two_names_of_a_value_that_leaves_are_a_reason() -> None:
    assert "share memory" in reasons(same(wide_value_returned_as_two))


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    model = Parts(fn)
    return torch.compile(model, backend="mst", options=SMALL)(*args), model


def test_a_draw_that_is_read_inside_and_outside_is_one() -> None:
    def gate(s: Any, x: torch.Tensor) -> Any:
        h = F.silu(s.up(x))
        g = F.dropout(h.mean(-1, keepdim=True), 0.5)
        return s.down(h * g), g

    (y, g), _ = compiled(gate, torch.randn(T, H))
    assert torch.equal((y == 0).all(-1), g[:, 0] == 0)
    assert 0 < (g == 0).sum() < T
    assert chunked(mst_fx.reports()[-1], "mlp")


def test_a_narrow_value_read_outside_leaves_nothing_wide() -> None:
    def scaled(s: Any, x: torch.Tensor) -> Any:
        h = s.up(x)
        m = h.amax(-1, keepdim=True)
        return s.down(F.gelu(h / m)), m

    compiled(scaled, torch.randn(T, H))
    nodes = mst_fx.reports()[-1].graphs[0].after.graph.nodes
    made = [v for n in nodes if n.op == "call_function" and isinstance(v := n.meta["example_value"], torch.Tensor)]
    assert made
    assert max(v.numel() for v in made) < T * I


def test_no_gradient_where_every_label_is_ignored_and_none_counts() -> None:
    def divided(s: Any, x: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(s.head(x), torch.full((T,), -100), reduction="sum")
        return total / s.total.mul(0)

    x = torch.randn(T, H, requires_grad=True)
    loss, model = compiled(divided, x)
    loss.backward()
    assert chunked(mst_fx.reports()[-1], "loss")
    assert loss.isnan()
    assert x.grad is not None
    assert not x.grad.any()
    assert not model.head.weight.grad.any()


def test_a_weight_of_nothing_is_no_label_left_out() -> None:
    """Where no token counts, eager's gradients are NaN: 0 times infinity."""

    def weighed(s: Any, x: torch.Tensor) -> torch.Tensor:
        m = torch.zeros(T)
        return (F.cross_entropy(s.head(x), LABELS, reduction="none") * m).sum() / m.sum()

    x = torch.randn(T, H, requires_grad=True)
    loss, _ = compiled(weighed, x)
    loss.backward()
    assert chunked(mst_fx.reports()[-1], "loss")
    assert x.grad is not None
    assert x.grad.isnan().all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.m(x)
        return y, y.view(-1, H)


class Given(Twice):
    def forward(self, x: torch.Tensor) -> Any:
        return x, self.m(x)


class Strided(Twice):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.m(x).transpose(0, 1).contiguous().transpose(0, 1)
        return y, y + 1


@pytest.mark.parametrize("module", [Twice, Given, Strided])
def test_outputs_of_a_promised_module(module: type[Twice]) -> None:
    torch.manual_seed(0)
    promised = mst_fx.tokenwise(module())

    def fn(x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        a, b = promised(x)
        b.transpose(0, -2).reshape(-1).mul_(2)
        return a.transpose(0, 1).reshape(-1, H) * 3 + x.sum() + b.sum()

    x = torch.randn(4, 8, H)
    ours = torch.compile(fn, backend="mst", options=SMALL)(x)
    assert error(ours.detach(), fn(x).detach().double()) < 1e-6
    report = mst_fx.reports()[-1]
    assert chunked(report, "mlp") == (module is Strided), str(report)


# -- returned logits ---------------------------------------------------------------------------------
