"""What surrounds a region and joins it: norms and residuals; and what that saves."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.recipe import enable_checkpointing
from mst_fx.regions import chunking

from .harness import EAGER, check_exact, chunked, slow_but
from .models import H, I, S, V, hf, hf_inputs, token_inputs

OPTIONS = {**EAGER, "mst.chunk_tokens": 8}


class Layer(nn.Module):
    """A residual MLP; ``forward`` is given."""

    def __init__(self, run: Callable[["Layer", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.run = run
        self.up, self.down = nn.Linear(H, I), nn.Linear(I, H)
        self.first, self.second, self.third = (nn.LayerNorm(H) for _ in range(3))
        self.mix, self.scale = nn.Linear(S, S), nn.Parameter(torch.rand(H))
        self.batch = nn.BatchNorm1d(H)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))

    def mixed(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(x.mT).mT

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def pre_norm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return x + m.mlp(m.first(x))


def norm_behind(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return x + m.second(m.mlp(m.first(x)))


def post_norm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.first(m.mixed(x))
    return m.second(x + m.mlp(x))


def scaled(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return x + m.scale * m.mlp(rms(x, m.scale))


def unit_length(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return x + m.mlp(F.normalize(x, dim=-1) * H**0.5 * m.scale)


def two_moments(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return x + m.mlp((x - mean) * (var + 1e-6).rsqrt() * m.scale)


def scaled_residual(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return 0.5 * x + F.dropout(m.mlp(m.first(x)), 0.0) * 2


def in_a_row(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    x = x + m.mlp(m.first(x))
    return x + m.mlp(m.second(x))


def no_residual(m: Layer, x: torch.Tensor) -> torch.Tensor:
    return m.mlp(m.second(m.mlp(m.first(m.mixed(x)))))


FOLDED = {
    pre_norm: 2, norm_behind: 4, post_norm: 2, scaled: 1, unit_length: 1, two_moments: 1, scaled_residual: 2,
    in_a_row: 2, no_residual: 4,
}  # fmt: skip
"""How many parameters join those of the projections."""


class Model(nn.Module):
    """Embedding, two layers, maybe checkpointed, and a loss."""

    def __init__(self, run: Callable[[Layer, torch.Tensor], torch.Tensor], checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
        self.layers, self.norm = nn.ModuleList(Layer(run) for _ in range(2)), nn.LayerNorm(H)
        self.checkpointed = checkpointed

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)  # type: ignore[assignment]
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def folded(report: mst_fx.Report | None) -> list[tuple[int, int]]:
    """Return for every loop of the first graph, forward ones alone, its numbers of inputs."""
    assert report is not None
    graphs = [report.graphs[0].after]
    graphs += [m for m in graphs[0].children() if isinstance(m, torch.fx.GraphModule)]
    calls = [n for g in graphs for n in g.graph.nodes if str(n.target).startswith("mst_fx.")]
    return [(len(n.args[0]), len(n.args[1])) for n in calls]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("run", FOLDED)
def test_surroundings_are_folded_exactly(run: Any, checkpointed: bool) -> None:
    ours = check_exact(Model(run, checkpointed), token_inputs())
    assert chunked(ours.report, "mlp") == (4 if run in (in_a_row, no_residual) else 2)
    loops = folded(ours.report)
    more = FOLDED[run]
    # The last layer's output and labels; the norm's two weights, the head's, and what the mean divides by.
    assert [n for n in loops if n == (2, 4)]
    assert {n for n in loops if n != (2, 4)} <= {(1, 4 + more), (1, 4)}
    if checkpointed and run is post_norm:  # all that could join is what the block returns
        assert loops.count((1, 4)) == 2
    else:
        assert (1, 4 + more) in loops


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize("run", [norm_behind, post_norm])
def test_low_precision_and_autocast(run: Any, dtype: Any) -> None:
    model = Model(run) if dtype is None else Model(run).to(dtype)
    check_exact(model, token_inputs(), autocast=dtype is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entry_and_exit_have_the_dtype_of_the_residual(dtype: torch.dtype) -> None:
    """A norm of Llama's casts to fp32 first: its input is taken in, not the copy, which is larger."""
    report = mst_fx.explain(hf("llama").to(dtype), OPTIONS)(**hf_inputs("llama"))
    calls = [n for n in report.graphs[0].after.graph.nodes if n.target is torch.ops.mst_fx.map.default]
    for call in calls:
        assert [n.meta["example_value"].dtype for n in call.args[0]] == [dtype]
        assert len(call.args[1]) == 4
    (body,) = (b.forward for b in report.bodies if "cross" not in b.forward and "nll_loss" not in b.forward)
    last = body.strip().splitlines()[-2]
    assert "add(x0, " in last, "the residual is added inside"


# -- near-misses: what must not be folded -------------------------------------------------------------


def read_twice(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    n = m.first(x)
    return m.mixed(n) + m.mlp(n)


def norm_over_tokens(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    y = m.mlp(x - x.mean(1, keepdim=True))
    return x + y / (1 + y.var(1, keepdim=True))


def batch_norm(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return m.mixed(x) + m.batch(m.mlp(x).mT).mT


def dropped(m: Layer, x: torch.Tensor) -> torch.Tensor:
    x = m.mixed(x)
    return m.mixed(x) + m.first(F.dropout(m.mlp(x), 1.0))


def narrow_read_twice(m: Layer, x: torch.Tensor) -> torch.Tensor:
    y = m.mlp(m.mixed(x))
    return m.first(y) + m.mixed(y)


@pytest.mark.parametrize("run", [read_twice, norm_over_tokens, batch_norm, dropped, narrow_read_twice])
def test_not_folded(run: Any) -> None:
    ours = check_exact(Model(run), token_inputs())
    assert chunked(ours.report, "mlp") == 2
    assert folded(ours.report).count((1, 4)) == 2


def test_entry_that_changes_in_place() -> None:
    """The backward of a centering needs no input, so its input may change while the loop is yet to run."""

    def run(m: Layer, x: torch.Tensor) -> torch.Tensor:
        x = m.mixed(x)
        y = m.mlp(x - x.mean(-1, keepdim=True))
        x.add_(1.0)
        return m.mixed(x) + y

    assert chunked(check_exact(Model(run), token_inputs()).report, "mlp") == 2


# -- what it saves ------------------------------------------------------------------------------------


def executions(fn: Callable[[], Any]) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
    return Counter(e.name for e in profile.events())


@pytest.mark.parametrize("name", slow_but(["llama"], ["llama", "gemma2", "gpt2", "qwen2"]))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_of_each_mlp(name: str, checkpointing: bool) -> None:
    """A step runs every MLP once forward and once again in the backward; checkpointing makes that no third time."""
    model, inputs = hf(name), hf_inputs(name)
    if checkpointing:
        enable_checkpointing(model)
    fn = torch.compile(model, backend="mst", options=OPTIONS)
    fn(**inputs).loss.backward()
    count = executions(lambda: fn(**inputs).loss.backward())
    chunks = -(-inputs["input_ids"].numel() // 8)
    activation = {"gemma2": "aten::gelu", "gpt2": "aten::tanh"}.get(name, "aten::silu")
    assert count[activation] == 2 * 2 * chunks
    assert (count["mst_fx::map"], count["mst_fx::map_backward"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inductor_saves_what_checkpointed_blocks_return(name: str) -> None:
    """Its partitioner can't save a loop's result between two blocks, and would run all of them again, MLPs too."""
    model = hf(name)
    enable_checkpointing(model)
    ((_, after),) = mst_fx.explain(model, OPTIONS)(**hf_inputs(name)).timelines()
    loops = Counter((m.phase, m.text.split(" = ")[-1].split("(")[0]) for m in after.moments if "mst_fx.map" in m.text)
    assert loops == {("forward", "mst_fx.map"): 2, ("backward", "mst_fx.map_backward"): 2}


def test_less_is_kept_behind_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a norm behind the MLP and the one in front of the head were given is not kept."""
    kept = []
    for folds in (chunking.folds, lambda *_: ()):
        monkeypatch.setattr(chunking, "folds", folds)
        torch.compiler.reset()
        report = mst_fx.explain(Model(norm_behind), OPTIONS)(**token_inputs())
        kept.append(report.timelines()[0][1].saved_bytes)
    rows = 2 * S * H * 4
    assert kept[0] <= kept[1] - 3 * rows
