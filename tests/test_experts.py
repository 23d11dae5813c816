"""Mixtures of experts: chunked as a whole where sorting by expert is proved to cancel out, or left with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  registers the grouped product
from torch import nn

import mst_fx
from mst_fx.config import Config
from mst_fx.pipeline import run_passes
from tests.harness import EAGER, check_exact, chunked, reasons
from tests.models import hf, hf_inputs, token_inputs
from tests.versions import require, trains_experts

H, I, E, K = 16, 48, 4, 2  # noqa: E741


def grouped(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The product that Transformers registers for what torch's own does not compile in: fp32, and fp64."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)


class Sorted(nn.Module):
    """Experts by sorting. Each part may be replaced by another: a way to spell it, or a near-miss."""

    def __init__(self, k: int = K, **parts: Callable[..., Any]) -> None:
        super().__init__()
        self.k, self.router = k, nn.Linear(H, E)
        self.up = nn.Parameter(torch.randn(E, H, 2 * I) * 0.2)
        self.down = nn.Parameter(torch.randn(E, I, H) * 0.2)
        self.bias = nn.Parameter(torch.randn(E, 2 * I) * 0.2)
        self.register_buffer("load", torch.zeros(E))
        self.parts = {"ids": lambda s, i: i, "take": take, "sort": torch.sort, "offsets": offsets, "act": act,
                      "after": lambda s, y, v: y, "invert": invert, "join": join} | parts  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, H)
        top, index = self.router(flat).softmax(-1).topk(self.k, -1)
        index = self.parts["ids"](self, index)
        ids, share = index.reshape(-1), top.reshape(-1)
        ids_g, perm = self.parts["sort"](ids)
        x_g = self.parts["take"](self, flat, perm)
        offs = self.parts["offsets"](self, ids, ids_g)
        v = {"ids": ids, "ids_g": ids_g, "perm": perm, "offs": offs, "flat": flat}
        y = grouped(x_g, self.up, offs) + self.bias[ids_g]
        y = grouped(self.parts["act"](y), self.down, offs)
        y = self.parts["after"](self, y, v) * share[perm].unsqueeze(-1)
        if "back" in self.parts:
            return self.parts["back"](self, y, perm, v).view_as(x)
        return self.parts["join"](self, y[self.parts["invert"](self, perm)], v).view_as(x)


def put_back(s: Any, y: torch.Tensor, perm: torch.Tensor, how: str) -> torch.Tensor:
    """Sum the choices of each token in one of the ways beside the inverse permutation."""
    token, out = perm // s.k, torch.zeros(y.shape[0] // s.k, H, dtype=y.dtype)
    places = token[:, None].expand(-1, H)
    if how == "gather":
        return y.gather(0, perm.argsort()[:, None].repeat(1, H)).view(-1, s.k, H).sum(1)
    if how in ("setitem", "room"):
        whole = torch.zeros_like(y) if how == "setitem" else y.new_empty(y.shape[0], H)
        whole[perm] = y
        return whole.view(-1, s.k, H).sum(1)
    if how == "index_put":
        return out.index_put((token,), y, accumulate=True)
    if how == "index_add_":
        out.index_add_(0, token, y)
        return out
    return out.index_add(0, token, y) if how == "index_add" else out.scatter_add(0, places, y)


def take(s: Any, flat: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    return flat[perm // s.k]


def act(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def offsets(s: Any, ids: torch.Tensor, ids_g: torch.Tensor) -> torch.Tensor:
    return torch.histc(ids_g.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)


def invert(s: Any, perm: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0])
    return inverse


def join(s: Any, y: torch.Tensor, v: Any) -> torch.Tensor:
    return y.view(-1, s.k, H).sum(1)


def in_place(y: torch.Tensor) -> torch.Tensor:
    z = y * 2
    z.add_(1.0).clamp_(max=5.0)
    return act(z)


def balanced(s: Any, ids: torch.Tensor, ids_g: torch.Tensor) -> torch.Tensor:
    counts = torch.histc(ids_g.float(), bins=E, min=0, max=E - 1)
    with torch.no_grad():
        s.load += counts
    return counts.cumsum(0, dtype=torch.int32)


def dropped(s: Any, index: torch.Tensor) -> torch.Tensor:
    """A capacity: the late tokens of a full expert go nowhere, which is decided outside."""
    place = F.one_hot(index.flatten(), E).cumsum(0).gather(1, index.flatten()[:, None]).view_as(index)
    return torch.where(place <= 20, index, E)


LEGAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_expert_each": {"k": 1},
    "argsort_inverse": {"invert": lambda s, p: p.argsort()},
    "scattered_inverse": {"invert": lambda s, p: torch.zeros_like(p).scatter(0, p, torch.arange(p.shape[0]))},
    "repeated_tokens": {"take": lambda s, x, p: x.repeat_interleave(s.k, dim=0)[p]},
    "expanded_tokens": {"take": lambda s, x, p: x[:, None].expand(-1, s.k, -1).reshape(-1, H).index_select(0, p)},
    "stable": {"sort": lambda ids: torch.sort(ids, stable=True)},
    "argsort": {"sort": lambda ids: (ids[(p := ids.argsort())], p)},
    "counted_unsorted": {"offsets": lambda s, ids, g: offsets(s, g, ids)},
    "in_place": {"act": in_place},
    "norm_of_slots": {"act": lambda y: F.layer_norm(act(y), (I,))},
    "counted_to_their_number": {
        "offsets": lambda s, ids, g: torch.histc(g.float(), bins=E, min=0, max=E).cumsum(0, dtype=torch.int32)
    },
    "load_counted": {"offsets": balanced},
    "counted_one_hot": {"offsets": lambda s, ids, g: F.one_hot(ids, E).sum(0).cumsum(0).to(torch.int32)},
    "counted_by_comparison": {
        "offsets": lambda s, ids, g: (ids[:, None] == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
    },
    "counted_by_scatter": {
        "offsets": lambda s, ids, g: (
            torch.zeros(E, dtype=torch.int64).scatter_add(0, ids, torch.ones_like(ids)).cumsum(0, dtype=torch.int32)
        )
    },
    "searched": {"offsets": lambda s, ids, g: torch.searchsorted(g, torch.arange(E), right=True).to(torch.int32)},
    "capacity_outside": {"ids": dropped, "after": lambda s, y, v: y.masked_fill((v["ids_g"] >= E)[:, None], 0.0)},
    "dropout": {"act": lambda y: F.dropout(act(y), 0.0, True)},
    "gathered": {"take": lambda s, x, p: x.gather(0, (p // s.k)[:, None].expand(-1, H))},
    "gathered_back": {"invert": lambda s, p: p.argsort(), "back": lambda s, y, p, v: put_back(s, y, p, "gather")},
    "added_up": {"back": lambda s, y, p, v: put_back(s, y, p, "index_add")},
    "added_up_in_place": {"back": lambda s, y, p, v: put_back(s, y, p, "index_add_")},
    "added_up_by_scatter": {"back": lambda s, y, p, v: put_back(s, y, p, "scatter_add")},
    "added_up_by_index_put": {"back": lambda s, y, p, v: put_back(s, y, p, "index_put")},
    "added_to_another": {"back": lambda s, y, p, v: (v["flat"] * 2).index_add(0, p // s.k, y, alpha=0.5)},
    "one_added_up": {"k": 1, "back": lambda s, y, p, v: torch.zeros_like(v["flat"]).index_add(0, p, y)},
    "put_in_places": {"back": lambda s, y, p, v: put_back(s, y, p, "setitem")},
    "put_in_new_room": {"back": lambda s, y, p, v: put_back(s, y, p, "room")},
    "one_put_in_place": {"k": 1, "back": lambda s, y, p, v: torch.zeros(46, H, dtype=y.dtype).index_put((p,), y)},
    "put_over_others": {"back": lambda s, y, p, v: (y * 2).index_put((p,), y).view(-1, s.k, H).sum(1)},
}


class Model(nn.Module):
    """Embedding, experts, a loss that is not linear in them."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(61, H), Sorted(**parts)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.experts(self.embed(ids)).tanh().square().mean() + 0 * labels.sum()


def found(parts: dict[str, Any]) -> mst_fx.Report:
    """What the passes say, without numbers."""
    reports = []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        reports.append(run_passes(gm, Config(chunk_tokens=8, compiler="aot_eager"))[1])
        return gm

    torch.compile(Model(**parts), backend=backend)(**token_inputs())
    return reports[0]


NUMBERS = ("plain", "one_expert_each", "expanded_tokens", "argsort", "in_place", "load_counted", "capacity_outside")
"""Spellings compared in numbers by default; the others are compared where slow tests run."""


@pytest.mark.parametrize("name", [n if n in NUMBERS else pytest.param(n, marks=pytest.mark.slow) for n in LEGAL])
def test_exact(name: str) -> None:
    require(trains_experts())
    net = Model(**LEGAL[name])
    if name == "capacity_outside":
        net.experts.bias = nn.Parameter(torch.cat([net.experts.bias.detach(), torch.zeros(1, 2 * I)]))
    ours = check_exact(net, token_inputs())
    assert chunked(ours.report, "mlp") == 1, str(ours.report)
    if name == "load_counted":
        assert net.experts.load.sum() == 2 * 46 * K  # once plain, once ours


@pytest.mark.parametrize("name", [n for n in LEGAL if n not in NUMBERS])
def test_spellings_are_found(name: str) -> None:
    require(trains_experts())
    report = found(LEGAL[name])
    assert chunked(report, "mlp") == 1, str(report)


def test_exact_with_symbolic_sizes() -> None:
    require(trains_experts())
    assert chunked(check_exact(Model(), token_inputs(), dynamic=True).report, "mlp") == 1


def test_dropout_among_the_experts_is_seeded() -> None:
    require(trains_experts())
    experts = Sorted(act=lambda y: F.dropout(y[:, :I], 0.5, True)).double()
    fn = torch.compile(experts, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})
    y = fn(torch.randn(2, 23, H, dtype=torch.float64))
    assert chunked(mst_fx.reports()[-1], "mlp") == 1
    y.backward(tangent := torch.randn_like(y))
    # Linear in the last weight for a fixed mask, so <y, t> = <W, dy/dW^T t> if the backward sees the forward's.
    torch.testing.assert_close((experts.down * experts.down.grad).sum(), (y * tangent).sum())


def test_forward_only() -> None:
    net, inputs = Model(), token_inputs()
    with torch.no_grad():
        found = torch.compile(net, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})(**inputs)
        torch.testing.assert_close(found, net(**inputs))
    assert chunked(mst_fx.reports()[-1], "mlp") == 1


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "descending": ({"sort": lambda ids: torch.sort(ids, descending=True)}, "other numbers"),
    "other_ids_counted": ({"offsets": lambda s, ids, g: offsets(s, ids, ids.flip(0))}, "groups of rows"),
    "sorted_by_position": ({"sort": lambda ids: (ids, (ids * 0 + torch.arange(len(ids))).argsort())}, "groups|orders"),
    "sorted_by_other_numbers": ({"sort": lambda ids: (ids[(p := (-ids).argsort())], p)}, "groups of rows"),
    "counts_stretched": (
        {"offsets": lambda s, ids, g: torch.histc(g.float(), bins=E, min=0, max=E + 1).cumsum(0, dtype=torch.int32)},
        "counts something else",
    ),
    "counted_by_two": (
        {"offsets": lambda s, ids, g: (
            torch.zeros(E, dtype=torch.int64).scatter_add(0, ids, ids * 0 + 1).cumsum(0, dtype=torch.int32))},
        "not known to be the experts'",
    ),
    "compared_to_others": (
        {"offsets": lambda s, ids, g: (ids[:, None] == torch.arange(E).flip(0)).sum(0).cumsum(0).to(torch.int32)},
        "not known to be the experts'",
    ),
    "compared_to_changed": (
        {"offsets": lambda s, ids, g: (
            (ids[:, None] == torch.arange(E).index_fill_(0, ids[:1], 7)).sum(0).cumsum(0).to(torch.int32))},
        "not known to be the experts'",
    ),
    "searched_left": (
        {"offsets": lambda s, ids, g: torch.searchsorted(g, torch.arange(E)).to(torch.int32)},
        "not known to be the experts'",
    ),
    "searched_for_others": (
        {"offsets": lambda s, ids, g: torch.searchsorted(g, torch.arange(1, E + 1), right=True).to(torch.int32)},
        "not known to be the experts'",
    ),
    "offsets_from_all_tokens": (
        {"offsets": lambda s, ids, g: torch.full((E,), ids.shape[0], dtype=torch.int32) * (ids[0] >= 0)},
        "not known to be the experts'",
    ),
    "not_put_back": ({"invert": lambda s, p: p}, "another permutation"),
    "put_back_elsewhere": ({"invert": lambda s, p: p.flip(0).argsort()}, "flip"),
    "wrong_tokens": ({"take": lambda s, x, p: x[p // (s.k + 1)]}, "divides positions by 3"),
    "next_token": ({"take": lambda s, x, p: x[(p // s.k + 1) % 46]}, "positions"),
    "capacity": ({"after": lambda s, y, v: y * (torch.arange(len(y)) < 80)[:, None]}, "positions|every slot"),
    "place_in_order": ({"after": lambda s, y, v: y * v["perm"][:, None].to(y.dtype)}, "positions"),
    "mixed_slots": ({"after": lambda s, y, v: y - y.mean(0)}, "mean works along the tokens"),
    "summed_slots": ({"after": lambda s, y, v: y.cumsum(0)}, "cumsum works along the tokens"),
    "mask_from_outside": (
        {"after": lambda s, y, v: y * (F.one_hot(v["ids"], E).cumsum(0).amax(1) < 30)[:, None]}, "cumsum|every slot"
    ),
    "other_order_added": ({"after": lambda s, y, v: y + v["flat"].repeat_interleave(s.k, 0)}, "different orders"),
    "neighbours_summed": ({"join": lambda s, y, v: y.view(s.k, -1, H).sum(0)}, "views"),
    "added_by_place": (
        {"back": lambda s, y, p, v: torch.zeros(46 * s.k, H).index_add(0, p, y)[:46]}, "known to belong"
    ),
    "added_in_other_order": (
        {"back": lambda s, y, p, v: torch.zeros(46, H).index_add(0, p // s.k, y[p.argsort()])}, "order|positions"
    ),
    "added_to_next_token": (
        {"back": lambda s, y, p, v: torch.zeros(46, H).index_add(0, (p // s.k + 1) % 46, y)}, "positions"
    ),
    "some_features_added": (
        {"back": lambda s, y, p, v: torch.zeros(46, H).scatter_add(0, (p // s.k)[:, None].expand(-1, H - 1), y)},
        "whole rows",
    ),
    "added_along_features": (
        {"back": lambda s, y, p, v: torch.zeros(H, 46).index_add(1, p // s.k, y.T).T}, "order|positions"
    ),
    "some_features_gathered": (
        {"take": lambda s, x, p: F.pad(x.gather(0, (p // s.k)[:, None].expand(-1, H - 1)), (0, 1))}, "whole rows"
    ),
    "put_by_token": ({"back": lambda s, y, p, v: torch.zeros(92, H).index_put((p // s.k,), y)[:46]}, "known to belong"),
    "slots_returned": ({"after": lambda s, y, v: y + 0 * y.sum()}, "works over all tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    parts, reason = NEAR_MISSES[name]
    report = found(parts)
    assert chunked(report, "mlp") == 0, str(report)
    assert re.search(reason, reasons(report)), str(report)
    assert re.search(r"test_experts.py:\d+", reasons(report)), str(report)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mixtral", "grouped_mm"),
        pytest.param("mixtral", "batched_mm", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "grouped_mm", marks=pytest.mark.slow),
    ],
)
def test_transformers(name: str, experts: str) -> None:
    if experts == "grouped_mm":
        require(trains_experts())
    net = hf(name, num_hidden_layers=1, experts_implementation=experts, output_router_logits=True)
    ours = check_exact(net, hf_inputs(name, batch=4, length=60))
    assert (chunked(ours.report, "mlp"), chunked(ours.report, "loss")) == (1, 1), str(ours.report)
    assert ours.output.aux_loss is not None
    region = next(r for r in ours.report.chunked if r.kind == "mlp")
    assert region.bytes_after < region.bytes_before


def test_bytes_of_matrices_per_token_are_told_alike_chunked_or_not() -> None:
    net, inputs = hf("mixtral", num_hidden_layers=1, experts_implementation="batched_mm"), hf_inputs("mixtral")
    told = [
        next(r for r in mst_fx.explain(net, {"mst.chunk_tokens": size})(**inputs).regions if r.kind == "mlp")
        for size in ("auto", 8)
    ]
    assert [r.status for r in told] == ["skipped", "chunked"]
    assert told[0].bytes_before == told[1].bytes_before


@pytest.mark.parametrize("k", [1, 2])
def test_counts_for_a_buffer_shares_by_gather_and_sums_onto_the_shared_expert(k: int) -> None:
    """As torchtitan has it: counts of one view of the ids, the sort of another, all added to what is there."""
    require(trains_experts())

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Embedding(61, H), nn.Linear(H, E, bias=False)
            self.up, self.down = nn.Parameter(torch.randn(E, H, I) * 0.2), nn.Parameter(torch.randn(E, I, H) * 0.2)
            self.shared = nn.Sequential(nn.Linear(H, H), nn.Tanh())
            self.register_buffer("tokens_per_expert", torch.zeros(E))

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids).view(-1, H)
            top, chosen = torch.topk(self.gate(x).sigmoid(), k, dim=1, sorted=False)
            counts = torch.histc(chosen.view(-1).float(), bins=E, min=0, max=E)
            with torch.no_grad():
                self.tokens_per_expert.add_(counts)
            order = torch.argsort(chosen.view(-1), stable=True)
            places = (order // k).reshape(-1, 1).expand(-1, H)
            rows = x.gather(0, places) * top.view(-1)[order].reshape(-1, 1)
            offs = counts.cumsum(0, dtype=torch.int32)
            y = grouped(F.silu(grouped(rows, self.up, offs)), self.down, offs)
            return self.shared(x).scatter_add(0, places, y).tanh().square().mean() + 0 * labels.sum()

    net = Mixture()
    ours = check_exact(net, token_inputs())
    assert chunked(ours.report, "mlp") == 1, str(ours.report)
    assert net.tokens_per_expert.sum() == 2 * 46 * k  # pyright: ignore  once plain, once ours
