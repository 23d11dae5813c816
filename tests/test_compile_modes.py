"""Ways to compile: modes, whole steps, submodules, several models, threads, caches."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx import inductor
from mst_fx.ops import BODIES
from tests.harness import EAGER, chunked
from tests.models import LanguageModel, SwiGLU, token_inputs
from tests.test_inductor import run_script

OPTIONS = {"mst.chunk_tokens": 8, **EAGER}


def trains_alike(model: nn.Module, step: Callable[[Callable[..., Any]], Any], **compile_with: Any) -> None:
    """Run a step with the plain and the compiled model; results and gradients must agree."""
    found = []
    for fn in (model, torch.compile(model, backend="mst", **compile_with)):
        model.zero_grad(set_to_none=True)
        found.append((step(fn), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0])


def one_step(inputs: dict[str, Any]) -> Callable[[Callable[..., Any]], Any]:
    def step(fn: Callable[..., Any]) -> Any:
        loss = fn(**inputs)
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    """``torch.compile`` takes mode or options, not both: sizes must do without ``mst.chunk_tokens``."""
    model = nn.Sequential(nn.Linear(32, 2048), nn.GELU(), nn.Linear(2048, 32))
    x = torch.randn(1, 4096, 32)
    trains_alike(model, lambda fn: fn(x).square().mean().backward(), mode=mode)
    assert chunked(mst_fx.reports()[-1], "mlp") == 1, str(mst_fx.reports()[-1])


def test_bodies_have_no_cuda_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(*args: Any, config_patches: dict[str, Any], **kwargs: Any) -> Any:
        seen.append(config_patches)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(inductor, "compile_fx", stop)
    with pytest.raises(Exception, match="seen enough"), pytest.warns(UserWarning, match="seen enough"):
        torch.compile(SwiGLU(), backend="mst", options={"mst.chunk_tokens": 8, "triton.cudagraphs": True})(
            torch.randn(2, 23, 16)
        )
    body, outer = seen[0], seen[-1]
    assert body["triton.cudagraphs"] is False
    assert outer["triton.cudagraphs"] is True
    for op in ("map", "map_backward", "sum"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.mst_fx, op).default.tags


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_fullgraph(dynamic: bool | None) -> None:
    trains_alike(LanguageModel(SwiGLU()), one_step(token_inputs()), fullgraph=True, dynamic=dynamic, options=OPTIONS)
    assert len(mst_fx.reports()[-1].chunked) == 2


def test_static_shapes_compile_once_per_length() -> None:
    model = LanguageModel(SwiGLU())
    fn = torch.compile(model, backend="mst", dynamic=False, options=OPTIONS)
    for length in (23, 31, 23):
        assert fn(**token_inputs(2, length)).isfinite()
    assert [r.regions[0].tokens for r in mst_fx.reports()] == [46, 62]


def test_compiled_autograd() -> None:
    model, inputs = LanguageModel(SwiGLU()), token_inputs()
    BODIES.clear()  # so that bodies are traced in that setting
    with torch._dynamo.config.patch(compiled_autograd=True):
        trains_alike(model, one_step(inputs), options=OPTIONS)
    assert len(mst_fx.reports()[0].chunked) == 2


def train(compile_step: Callable[[Any], Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Three steps of a whole step function: forward, backward, optimizer."""
    torch.manual_seed(3)
    model = LanguageModel(SwiGLU())
    batches = [token_inputs() for _ in range(3)]
    opt = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(batch: dict[str, Any]) -> torch.Tensor:
        loss = model(**batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    run = compile_step(step)
    losses = [run(batch) for batch in batches]
    return losses, dict(model.named_parameters())


def test_a_whole_step_in_one_function() -> None:
    expected = train(lambda f: f)
    found = train(lambda f: torch.compile(f, backend="mst", options=OPTIONS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sum(len(r.chunked) for r in mst_fx.reports()) == 2, [str(r) for r in mst_fx.reports()]


def test_a_submodule() -> None:
    model, inputs = LanguageModel(SwiGLU(), SwiGLU()), token_inputs()
    model(**inputs).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="mst", options=OPTIONS)
    model(**inputs).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    assert sum(chunked(r, "mlp") for r in mst_fx.reports()) >= 1


def test_two_models_and_a_reset_between_steps() -> None:
    """Bodies are found by content: another model of the same shapes, or the same one compiled again, shares them."""
    one, two, inputs = LanguageModel(SwiGLU()), LanguageModel(SwiGLU()), token_inputs()
    fns = [torch.compile(m, backend="mst", options=OPTIONS) for m in (one, two)]
    losses = [fn(**inputs) for fn in fns]
    torch._dynamo.reset()
    losses += [fn(**inputs) for fn in fns]
    for loss, model in zip(losses, (one, two, one, two), strict=True):
        model.zero_grad(set_to_none=True)
        loss.backward()
        ours = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        model(**inputs).backward()
        torch.testing.assert_close(ours, [p.grad for p in model.parameters()])
    names = {b.name for r in mst_fx.reports() for b in r.bodies}
    assert len(names) == 2
    assert len(mst_fx.reports()) >= 2


def test_another_setting_of_torch_is_another_body() -> None:
    """A body compiled under one setting must not serve under another: nothing in its content tells them apart."""
    names = []
    for settings in ({}, {"emulate_precision_casts": True}, {}):
        torch._dynamo.reset()
        with torch._inductor.config.patch(settings):
            torch.compile(SwiGLU(), backend="mst", options=OPTIONS)(torch.randn(2, 23, 16))
        names.append(mst_fx.reports()[-1].bodies[0].name)
    assert names[0] == names[2] != names[1]


def test_threads() -> None:
    models = [LanguageModel(SwiGLU()) for _ in range(3)]
    inputs, errors = token_inputs(), []

    def work(model: nn.Module) -> None:
        try:
            fn = torch.compile(model, backend="mst", options=OPTIONS)
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                fn(**inputs).backward()
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for model in models:
        ours = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        model(**inputs).backward()
        torch.testing.assert_close(ours, [p.grad for p in model.parameters()])


@torch.compiler.nested_compile_region
def marked_mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down)


def test_regions_in_graphs_of_their_own() -> None:
    """Code marked for compilation once is a graph of its own, which is left alone: the report says so."""
    x, up, down = torch.randn(2, 23, 16), torch.randn(48, 16), torch.randn(16, 48)

    def two_layers(x: torch.Tensor) -> torch.Tensor:
        return marked_mlp(marked_mlp(x, up, down), up, down)

    torch.testing.assert_close(torch.compile(two_layers, backend="mst", options=OPTIONS)(x), two_layers(x))
    report = mst_fx.reports()[-1]
    assert not report.chunked
    assert any("invoke_subgraph" in note and "test_compile_modes.py" in note for note in report.notes), report.notes


@pytest.mark.slow
def test_saved_cache_artifacts_serve_another_process(tmp_path: Any) -> None:
    script = """
        import json, pathlib, sys, torch
        from torch._dynamo.utils import counters
        torch.manual_seed(0)
        from tests.models import LanguageModel, SwiGLU, token_inputs
        store = pathlib.Path({store!r})
        if store.exists():
            torch.compiler.load_cache_artifacts(store.read_bytes())
        model, inputs = LanguageModel(SwiGLU()), token_inputs()
        fn = torch.compile(model, backend="mst", options={{"mst.chunk_tokens": 8}})
        loss = fn(**inputs)
        loss.backward()
        ours = model.head.weight.grad.clone()
        model.zero_grad()
        model(**inputs).backward()
        error = (ours - model.head.weight.grad).abs().max().item()
        if not store.exists():
            store.write_bytes(torch.compiler.save_cache_artifacts()[0])
        print(json.dumps([error, dict(counters["aot_autograd"]), dict(counters["inductor"])]))
    """.format(store=str(tmp_path / "artifacts"))
    first = run_script(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "one"))
    second = run_script(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "two"))
    assert max(first[0], second[0]) < 1e-6
    assert second[1]["autograd_cache_hit"] >= 1
    assert second[1].get("autograd_cache_miss", 0) == 0
