"""Every test starts from the same seed and a clean Dynamo; ``--device cuda`` runs them on a GPU."""

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers.utils.logging  # noqa: F401  as for a user, whose model exists before torch.compile loads the backend

import mst_fx.backend
from mst_fx import layers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the default device of tensors")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    mst_fx.backend._reports.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many layers each graph compiled from here on had replaced."""
    counts: list[int] = []
    real = layers.share_layers

    def count(module: Any) -> int:
        counts.append(real(module))
        return counts[-1]

    monkeypatch.setattr("mst_fx.backend.share_layers", count)
    return counts


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the graphs that torch traces from here on to see whether they write to an input."""
    names: list[str] = []
    real = layers.INVOKE.gen_schema

    def note(subgraph: Any, identifier: str, *operands: Any) -> Any:
        names.append(identifier)
        return real(subgraph, identifier, *operands)

    monkeypatch.setattr(layers.INVOKE, "gen_schema", note, raising=False)
    return names


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models on disk, made when they are first asked for: a function of the family."""
    folder = tmp_path_factory.mktemp("models")

    def make(family):
        from benchmarks.local_model import make_model_folder

        if not (folder / family).exists():
            make_model_folder(folder / family, family, vocab=384, positions=128)
        return folder / family

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Real text: a module of the standard library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pathlib.Path(json.__file__).read_text() * 2)
    return path
