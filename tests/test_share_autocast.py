"""Equal layers under an autocast: compiled once, computed in the dtypes of each."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import DEVICE, EAGER, check_exact, slow_but
from tests.models import hf, hf_inputs
from tests.sharing import LAYERS, OPTIONS, H, Layers, together_and_apart, tokens

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="layers share a graph on torch >= 2.13")


@pytest.mark.slow
def test_under_autocast(shared: list[int]) -> None:
    torch.manual_seed(0)
    check_exact(hf("llama", num_hidden_layers=LAYERS), hf_inputs("llama"), options={**OPTIONS, **EAGER}, autocast=True)
    assert shared == [LAYERS]


@pytest.mark.slow
def test_under_an_autocast_within(shared: list[int]) -> None:
    """As Transformers' Trainer has it."""

    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = hf("llama", num_hidden_layers=LAYERS)

        def forward(self, **inputs: torch.Tensor) -> Any:
            with torch.autocast(DEVICE, torch.bfloat16):
                return self.model(**inputs)

    torch.manual_seed(0)
    together_and_apart(Within(), hf_inputs("llama"))
    assert shared == [LAYERS]


@pytest.mark.parametrize("within", [False, True])
def test_autocast_to_another_dtype_than_the_default(within: bool, shared: list[int]) -> None:
    """A shared backward is traced outside of it, where it would be the default's: 1.8 times the error here."""

    class Cast(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.float16):
                return super().forward(x)

    torch.manual_seed(0)
    before = torch.get_autocast_dtype(DEVICE)
    model = Cast(torch.tanh)
    together_and_apart(
        model,
        tokens(requires_grad=True),
        fn=model if within else super(Cast, model).forward,
        around=lambda: torch.autocast(DEVICE, torch.float16, enabled=not within),
    )
    assert shared == [LAYERS]
    assert torch.get_autocast_dtype(DEVICE) == before


def test_autocasts_to_two_dtypes(shared: list[int]) -> None:
    """Torch has one default: layers under another share only where nothing else would change with it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layers(torch.tanh), Layers(torch.tanh)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.float16):
                first = self.first(x)
            x = (x + first.tanh()).roll(1, 1)  # or both would be one sequence of layers, with a switch among them
            with torch.autocast(DEVICE, torch.bfloat16):
                return self.second(x)

    torch.manual_seed(0)
    together_and_apart(Twice(), tokens(requires_grad=True))
    assert shared == [LAYERS]


HALF = torch.float16
AROUND: dict[str, tuple[Any, tuple[Any, ...], Any, int]] = {
    "within one without a dtype": (None, ((HALF, True), (None, True)), (HALF, False), 0),
    "another without a dtype": (None, ((HALF, True),), (None, True), 0),
    "in another around the function": (torch.bfloat16, ((HALF, True),), (HALF, False), 0),
    "switched off in one around the function": (torch.bfloat16, ((HALF, False),), (HALF, False), 0),
    "one that torch switches off": (torch.bfloat16, ((torch.float32, True),), (HALF, False), 0),
    "switched off": (None, ((HALF, False),), (None, True), LAYERS),
    "others switched off": (None, ((HALF, True),), (torch.bfloat16, False), LAYERS),
}
"""Name -> autocast around the function, those around layers (dtype, enabled), that around the head, layers shared."""


@pytest.mark.parametrize("name", slow_but([n for n in AROUND if "without" not in n], AROUND))
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_autocasts_around_and_beside(name: str, shared: list[int]) -> None:
    """Whatever else is under an autocast computes what it does without sharing."""
    around, within, beside, expected = AROUND[name]

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype is torch.float32 else x.float()

    class Beside(Layers):
        def __init__(self) -> None:
            super().__init__(torch.tanh)
            self.first, self.head = nn.Linear(H, H), nn.Linear(H, H)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = wide(self.first(x))
            with torch.autocast(DEVICE, *within[0]), torch.autocast(DEVICE, *within[-1]):
                for layer in self.layers:
                    x = layer(x)
            with torch.autocast(DEVICE, *beside):
                x = self.head(wide(x).roll(1, 1))
            return wide(x).cumsum(1).square().mean()

    torch.manual_seed(0)
    together_and_apart(
        Beside(),
        tokens(requires_grad=True),
        around=lambda: torch.autocast(DEVICE, around) if around else contextlib.nullcontext(),
    )
    assert sum(shared) == expected
