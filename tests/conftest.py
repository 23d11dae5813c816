"""Every test starts from the same seed and a clean Dynamo."""

import pytest
import torch
import transformers.utils.logging  # noqa: F401  as for a user, whose model exists before torch.compile loads the backend

import mst_fx.backend


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    mst_fx.backend._reports.clear()
    yield
    torch._dynamo.reset()
