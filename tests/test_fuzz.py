"""Random models: the same loss and gradients as without the backend, never a crash, and traps are never chunked.

Everything runs in fp64, where a reordered sum moves a number by 1e-13 and a mistake by far more. A failure prints
the ``Program``; put it under ``FOUND`` with a name. ``MST_FUZZ=500`` tries that many in each test, at random.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, currently_in_test_context, example, given, note, settings
from hypothesis import strategies as st

import mst_fx
from tests.harness import EAGER, chunked
from tests.programs import LOSSES, STEPS, TRAPS, UPS, BlockSpec, Built, Program, inputs_of

TRIES = int(os.environ.get("MST_FUZZ", "0"))
fuzz = settings(
    max_examples=TRIES or 8, deadline=None, derandomize=not TRIES, database=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip

PARTS = ["up", "down", "up2", "vector", "scalar", "square"]
blocks = st.builds(
    BlockSpec,
    up=st.sampled_from(sorted(UPS)),
    down=st.sampled_from(sorted(UPS)),
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=0, max_size=4).map(tuple),
    bias=st.booleans(),
    adapter=st.sampled_from([False, False, True]),
    wide=st.sampled_from([48, 64, 20]),
    reader=st.sampled_from([None, None, None, "penalty", "metric"]),
    frozen=st.sets(st.sampled_from(PARTS), max_size=3).map(sorted).map(tuple),
    checkpointed=st.sampled_from([False, False, True]),
)  # fmt: skip
programs = st.builds(
    Program,
    blocks=st.lists(blocks, min_size=1, max_size=2).map(tuple),
    loss=st.sampled_from(sorted(LOSSES)),
    batch=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([1, 2, 7, 16, 20, 23, 48]),  # 16 is H, 20 and 48 are widths
    shared_blocks=st.booleans(),
    tied=st.booleans(),
    returns_logits=st.booleans(),
    ignored=st.sampled_from([0, 1, 3, 7]),
    input_grad=st.booleans(),
    frozen_head=st.booleans(),
    seed=st.integers(0, 1000),
)
option_sets = st.fixed_dictionaries(
    {
        "mst.chunk_tokens": st.sampled_from([1, 3, 8, 16, 1000]),
        "mst.logits": st.sampled_from(["lazy", "keep"]),
        "mst.loss_gradient": st.sampled_from(["auto", "forward", "recompute"]),
        "mst.accumulate": st.sampled_from(["float32", "parameter"]),
        "mst.disable": st.sampled_from([(), (), ("chunk_mlp",), ("chunk_loss",), ("normalize",)]),
    }
)


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    logits: torch.Tensor | None
    grads: dict[str, torch.Tensor | None]


def run(model: Built, fn: Any, data: dict[str, torch.Tensor]) -> Result:
    """One step; gradients of all parameters and of the hidden states."""
    data = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in data.items()}
    model.zero_grad(set_to_none=True)
    out = fn(**data)
    loss, logits = out if isinstance(out, tuple) else (out, None)
    if loss.requires_grad:
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {"hidden": data["hidden"].grad}
    return Result(loss.detach(), logits, {n: None if g is None else g.clone() for n, g in grads.items()})


def compare(ours: Result, truth: Result) -> None:
    """Assert equality up to the order of sums."""
    alike: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10, "equal_nan": True}
    torch.testing.assert_close(ours.loss, truth.loss, **alike, msg=lambda m: f"loss: {m}")
    if truth.logits is not None:
        assert ours.logits is not None
        torch.testing.assert_close(
            ours.logits.detach() + 0, truth.logits.detach(), **alike, msg=lambda m: f"logits: {m}"
        )
    for name, expected in truth.grads.items():
        found = ours.grads[name]
        assert (found is None) == (expected is None), (
            f"{name}: gradient {found is not None}, eager {expected is not None}"
        )
        if expected is not None:
            torch.testing.assert_close(found, expected, **alike, msg=lambda m, n=name: f"gradient of {n}: {m}")


def check(program: Program, options: dict[str, Any], dynamic: bool | None = None) -> mst_fx.Report:
    """Compare a program with and without the backend; under ``dynamic`` a second length too."""
    torch._dynamo.reset()
    model = Built(program).double()
    fn = torch.compile(model, backend="mst", options={**EAGER, **options}, dynamic=dynamic)
    before = len(mst_fx.reports())
    lengths = [program.length, program.length + 5] if dynamic else [program.length]
    for length in lengths:
        data = inputs_of(dataclasses.replace(program, length=length))
        truth = run(model, model, data)
        compare(run(model, fn, data), truth)
    report = mst_fx.report.join_reports(mst_fx.reports()[before:])
    if currently_in_test_context():
        note(str(report))
    return report


@fuzz
@given(programs, option_sets)
def test_any_program_is_exact(program: Program, options: dict[str, Any]) -> None:
    check(program, options)


@fuzz
@given(programs, st.sampled_from([3, 8]))
def test_any_program_is_exact_with_symbolic_sizes(program: Program, chunk_tokens: int) -> None:
    if program.length > 1:  # Dynamo makes no symbol of a length of 1
        check(program, {"mst.chunk_tokens": chunk_tokens}, dynamic=True)


@fuzz
@given(blocks, st.sampled_from(sorted(TRAPS)), st.integers(0, 4), st.sampled_from([16, 20, 23, 48]), st.integers(0, 99))
def test_traps_are_never_chunked(block: BlockSpec, trap: str, at: int, length: int, seed: int) -> None:
    trapped = dataclasses.replace(block, trap=trap, trap_at=at, reader=None)
    report = check(Program((trapped,), length=length, seed=seed), {"mst.chunk_tokens": 8})
    assert chunked(report, "mlp") == 0, f"{trap} was chunked:\n{report}"


PLAIN = {"mst.chunk_tokens": 8}
_legal = list(STEPS)


@pytest.mark.parametrize("steps", [tuple(_legal[i : i + 4]) for i in range(0, len(_legal), 4)], ids="-".join)
def test_the_programs_are_chunked(steps: tuple[str, ...]) -> None:
    """Else the suite would prove nothing."""
    report = check(Program((BlockSpec(steps=steps),)), PLAIN)
    assert (chunked(report, "mlp"), chunked(report, "loss")) == (1, 1), str(report)


INDUCTOR_IS_WRONG = Program(
    (BlockSpec(up="conv", down="linear", steps=("layer_norm", "layer_norm"), frozen=("down", "up", "vector")),),
    loss="sum", batch=1, length=48, tied=True, seed=865,
)  # fmt: skip
"""Two norms of a transposed value: torch 2.13's vectorised C++ gives its bias a gradient 1.4 times its size away."""


@pytest.mark.slow
@settings(fuzz, max_examples=max(TRIES // 10, 8))
@example(INDUCTOR_IS_WRONG, {"mst.chunk_tokens": 1, "mst.disable": ("chunk_mlp",)})
@given(programs, option_sets)
def test_any_program_is_exact_with_inductor(program: Program, options: dict[str, Any]) -> None:
    """Or as wrong as without the backend: Inductor has wrong gradients of its own, see ``INDUCTOR_IS_WRONG``."""
    torch._dynamo.reset()
    model, data = Built(program).double(), inputs_of(program)
    truth = run(model, model, data)
    fn = torch.compile(model, backend="mst", options={**options, "mst.compiler": "inductor"})
    ours = run(model, fn, data)
    try:
        compare(ours, truth)
    except AssertionError:
        torch._dynamo.reset()
        plain = run(model, torch.compile(model, backend="inductor"), data)
        with pytest.raises(AssertionError):
            compare(plain, truth)
        compare(ours, plain)


FOUND: dict[str, tuple[Program, dict[str, Any], bool | None]] = {
    "everything_shared": (
        Program(
            (BlockSpec(checkpointed=True, adapter=True, frozen=("up",)), BlockSpec(reader="metric")),
            shared_blocks=True, tied=True, returns_logits=True,
        ),
        PLAIN,
        None,
    ),
    "sizes_alike": (
        Program((BlockSpec(steps=("swapped", "folded", "second"), wide=48),), batch=3, length=16, loss="shifted"),
        PLAIN,
        True,
    ),
}  # fmt: skip
"""Programs tried at every run, those that once failed among them: name -> (program, options, dynamic)."""


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    check(*FOUND[name])
