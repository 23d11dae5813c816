"""Every test starts from the same seed and a clean Dynamo; ``--device cuda`` runs them on a GPU."""

import pytest
import torch
import transformers.utils.logging  # noqa: F401  as for a user, whose model exists before torch.compile loads the backend

import mst_fx.backend


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
