"""Golden rewrites: the graph after the passes, small enough to read. ``EXPECTTEST_ACCEPT=1`` refreshes them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import fx

from mst_fx.config import Config
from mst_fx.pipeline import PASSES, run_passes
from mst_fx.printing import readable
from mst_fx.verify import VerifyError, snapshot, verify
from tests.models import SwiGLU

CONFIG = Config(chunk_tokens=8, compiler="aot_eager")


def rewritten(fn: Callable[..., Any], *args: Any, config: Config = CONFIG) -> str:
    """Trace, run the passes, and return the graph as text with names shortened."""
    texts = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        module, report, _ = run_passes(gm, config)
        texts.append(readable(report.graphs[0].after))
        return module

    torch.compile(fn, backend=backend)(*args)
    short = re.sub(r"l_(?:self_|fn_)?(?:modules_)?", "", texts[0].replace("_parameters_", "_"))
    short = re.sub(r"\bbody=[0-9a-f]{8}", "BODY", short)
    return "\n".join(line for line in short.splitlines() if "placeholder" not in line)


def test_swiglu() -> None:
    assert_expected_inline(
        rewritten(SwiGLU(), torch.randn(2, 23, 16)),
        """\
flatten: float32[46, 16] = flatten(x_, 0, 1)
map_default: (float32[46, 16],) = mst_fx.map([flatten], [gate_weight_, up_weight_, down_weight_], BODY, chunk_tokens=8)
getitem: float32[46, 16] = getitem(map_default, 0)
unflatten: float32[2, 23, 16] = unflatten(getitem, 0, (2, 23))
return (unflatten,)""",
    )


def test_head_and_mean_loss() -> None:
    weight = torch.randn(61, 16, requires_grad=True)

    def fn(h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).view(-1, 61).float(), labels.view(-1))

    assert_expected_inline(
        rewritten(fn, torch.randn(2, 23, 16), torch.randint(0, 61, (2, 23))),
        """\
view_1: int64[46] = view(labels_, -1)
ne: bool[46] = ne(view_1, -100)
sum_1: int64[] = sum(ne)
eq: bool[] = eq(sum_1, 0)
add: int64[] = add(sum_1, eq)
reciprocal: float32[] = reciprocal(add)
where: float32[] = where(eq, nan, 0.0)
flatten: float32[46, 16] = flatten(h_, 0, 1)
sum_default: (float32[], bool[46], float32[61, 16]) = mst_fx.sum([flatten, view_1], [weight_, reciprocal], BODY, chunk_tokens=8)
getitem: float32[] = getitem(sum_default, 0)
add_1: float32[] = add(getitem, where)
to: float32[] = to(add_1, torch.float32)
return (to,)""",  # noqa: E501
    )


def test_token_slice_is_hoisted() -> None:
    weight = torch.randn(61, 16, requires_grad=True)

    def fn(h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight)[:, :-1].contiguous()
        return F.cross_entropy(logits.view(-1, 61), labels[:, 1:].reshape(-1), reduction="sum")

    assert_expected_inline(
        rewritten(fn, torch.randn(2, 23, 16), torch.randint(0, 61, (2, 23))),
        """\
getitem_2: float32[2, 22, 16] = getitem(h_, (slice(None, None, None), slice(None, -1, None)))
getitem_1: int64[2, 22] = getitem(labels_, (slice(None, None, None), slice(1, None, None)))
reshape: int64[44] = reshape(getitem_1, -1)
flatten: float32[44, 16] = flatten(getitem_2, 0, 1)
sum_default: (float32[], bool[44], float32[61, 16]) = mst_fx.sum([flatten, reshape], [weight_], BODY, chunk_tokens=8)
getitem_3: float32[] = getitem(sum_default, 0)
return (getitem_3,)""",
    )


def test_second_run_changes_nothing() -> None:
    seen = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        once, first, _ = run_passes(gm, CONFIG)
        _, second, _ = run_passes(once, CONFIG)
        seen.append(
            (
                len(first.chunked),
                len(second.chunked),
                readable(second.graphs[0].before) == readable(first.graphs[0].after),
            )
        )
        return once

    torch.compile(SwiGLU(), backend=backend)(torch.randn(2, 23, 16))
    assert seen == [(1, 0, True)]


def test_given_graph_is_left_as_it_was() -> None:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        before = gm.code
        run_passes(gm, CONFIG)
        assert gm.code == before
        return gm

    torch.compile(SwiGLU(), backend=backend)(torch.randn(2, 23, 16))


def test_verifier_names_pass_and_node() -> None:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        mode = next(n.meta["example_value"].fake_mode for n in gm.graph.nodes if n.op == "placeholder")
        before = snapshot(gm)
        node = next(n for n in gm.graph.nodes if "silu" in str(n.target))
        with gm.graph.inserting_after(node):
            half = gm.graph.call_method("half", (node,))
        half.meta["mst_new"], half.meta["mst_replaces"] = True, node.meta["example_value"]
        with pytest.raises(VerifyError, match=rf"my_pass: node {half.name} .*float16.* in place of .*float32"):
            verify(gm, before, "my_pass", mode)
        gm.graph.erase_node(half)
        gm.recompile()
        return gm

    torch.compile(SwiGLU(), backend=backend)(torch.randn(2, 23, 16))


def test_passes_are_listed_by_the_names_that_disable_takes() -> None:
    from mst_fx.config import PASS_NAMES

    assert tuple(name for name, _ in PASSES) == PASS_NAMES
