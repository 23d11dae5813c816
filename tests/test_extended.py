"""Sums in bf16 with eight bits more: one pass that Inductor makes does what a dozen eager ops do."""

import math

import pytest
import torch
import torch.nn.functional as F

from mst_fx import extended, kernels, ops
from mst_fx.extended import PIECE, add, adder, finish
from mst_fx.inductor import cpu_multiplies
from mst_fx.regions import chunking
from tests.harness import error


def test_one_pass_gives_the_bits_of_many() -> None:
    """Compiled and eager, of numbers of all kinds; the parts of a block and an odd number of them."""
    generator = torch.Generator().manual_seed(0)
    with kernels.at_once():
        compiled = adder("inductor", {})
    assert adder("inductor", {}) is compiled
    kinds = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, 1e-39, -1e-40, 1.0])
    for size in (PIECE + 13, 3 * PIECE):
        given = [torch.randn(size, generator=generator).bfloat16() for _ in range(4)]
        for part in given:
            part[torch.randint(0, size, (300,), generator=generator)] = kinds.bfloat16().repeat(34)[:300]
        ends = []
        for adds in (add, compiled):
            upper, lower = given[0].clone(), torch.zeros(size, dtype=torch.uint8)
            for part in given[1:]:
                adds(upper, lower, part if cpu_multiplies(torch.bfloat16) else part.float())
            ends.append((upper.clone(), lower.clone(), upper))
            finish(upper, lower, torch.tensor(0.7))
        for ours, theirs in zip(*ends, strict=True):
            assert torch.equal(*(v.view(torch.int16) if v.dtype is torch.bfloat16 else v for v in (ours, theirs)))
        assert ends[0][0].isnan().any()
        assert ends[0][0].isinf().any()


def train_head(scale: float = 1.0) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Take a step of a head in bf16 whose gradient is summed over three chunks in bf16."""
    head = torch.nn.Linear(64, 8192, bias=False).bfloat16()
    x, labels = torch.randn(48, 64).bfloat16(), torch.randint(0, 8192, (48,))
    options = {"mst.chunk_tokens": 16, "mst.accumulate": "parameter"}
    torch.compile(lambda x: F.cross_entropy(head(x) * scale, labels), backend="mst", options=options)(x).backward()
    return head, x, labels


def test_a_weight_summed_in_bf16_is_added_to_by_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    bodies: dict[str, ops.CompiledBody] = {}
    with kernels.at_once():
        ours = adder("inductor", {})
    monkeypatch.setattr(chunking, "adder", lambda *_: lambda *given: added.append(len(given[0])) or ours(*given))
    for module in (chunking, ops):
        monkeypatch.setattr(module, "BODIES", bodies)
    head, x, labels = train_head()
    assert sum(added) == 2 * 64 * 8192
    assert head.weight.grad is not None
    weight = head.weight.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ weight.t(), labels).backward()
    assert weight.grad is not None
    assert error(head.weight.grad, weight.grad) < 4e-3


def test_an_adder_whose_kernel_failed_in_the_background_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def wait(self, scope: object) -> None:
            raise RuntimeError("the C++ compiler was killed")

    wait, compile_adder = kernels.finish, extended._compile
    made: list[str] = []

    def fail_once() -> None:
        if len(made) == 1:
            kernels._waiting[-1] = (Killed(), kernels._waiting[-1][1])  # pyright: ignore
        wait()

    monkeypatch.setattr(kernels, "finish", fail_once)
    monkeypatch.setattr(extended, "_compiled", {})
    monkeypatch.setattr(extended, "_compile", lambda *given: made.append(given[0]) or compile_adder(*given))
    head, _, _ = train_head(scale=1.5)
    assert made == ["inductor", "inductor"]
    assert head.weight.grad is not None
