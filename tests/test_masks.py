"""Masks proved from how they are computed, and the near-misses that must stay."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.harness import check_exact, reasons, slow_but
from tests.models import hf

S = 24


PROVED = {
    "k <= q": lambda q, k, x: k <= q,
    "q >= k": lambda q, k, x: q >= k,
    "k < q + 1": lambda q, k, x: k < q + 1,
    "not negative": lambda q, k, x: (q - k).ge(0),
    "one length": lambda q, k, x: (k <= q) & (q - k < S),
    "or nothing": lambda q, k, x: torch.logical_or(k <= q, q - k > S),
    "by methods": lambda q, k, x: k.__le__(q).__and__((q - q).__eq__(0)),  # as torch 2.11 traces `==`
    "batch": lambda q, k, x: (k <= q).expand(x.shape[0], 1, S, S),
}
STAYS = {
    "strictly before, but for itself": lambda q, k, x: (k < q) | (k == q),
    "one ahead": lambda q, k, x: k <= q + 1,
    "not itself, but the first": lambda q, k, x: (k < q) | (q < 1),
    "window": lambda q, k, x: (k <= q) & (q - k < S - 1),
    "backwards": lambda q, k, x: k >= q,
    "every second": lambda q, k, x: 2 * k <= q,
    "of the values": lambda q, k, x: (k <= q) & (x[0, :1, :1] < 100),
    "counted from the end": lambda q, k, x: k <= torch.arange(S)[q - S],
    "added": lambda q, k, x: torch.where(k <= q, 0.0, -1e9),
}


class Attention(nn.Module):
    """One attention under a mask made in the graph, then a wide MLP and a loss."""

    def __init__(self, mask, change=False):
        super().__init__()
        self.mask, self.change = mask, change
        self.inside, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        index = torch.arange(S)
        mask = self.mask(index[:, None], index[None, :], x)
        if self.change:
            mask[0, 3] = True
        q, k, v = self.inside(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return (y + self.down(F.gelu(self.up(y)))).square().sum()


def run(model):
    torch.manual_seed(0)
    return check_exact(model, {"x": torch.randn(2, S, 16, requires_grad=True)})


@pytest.mark.parametrize("name", PROVED)
def test_a_causal_mask_is_proved(name):
    assert "1 attention: the S x S mask is proved" in reasons(run(Attention(PROVED[name])).report)


@pytest.mark.parametrize("name", STAYS)
def test_another_mask_stays(name):
    assert "is proved" not in reasons(run(Attention(STAYS[name])).report)


def test_a_mask_changed_in_place_stays():
    assert "is proved" not in reasons(run(Attention(PROVED["k <= q"], change=True)).report)


@pytest.mark.parametrize(
    ("checkpointing", "dynamic"),
    slow_but([(True, None)], itertools.product([False, True], [None, True])),
)
def test_masks_of_transformers(checkpointing, dynamic):
    """Llama's masks are proved, those of a window shorter than the sequence and of a padded batch are not."""
    ids = torch.randint(1, 128, (2, S))
    model = hf("llama")
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = check_exact(model, {"input_ids": ids, "labels": ids}, dynamic=dynamic)
    assert "2 attentions: the S x S mask is proved" in reasons(found.report)
    torch._dynamo.reset()
    seen = torch.ones_like(ids)
    seen[1, :5] = 0
    padded = check_exact(model, {"input_ids": ids, "labels": ids, "attention_mask": seen}, dynamic=dynamic)
    assert "is proved" not in reasons(padded.report)


@pytest.mark.slow
def test_a_window_of_transformers_stays():
    ids = torch.randint(1, 128, (2, S))
    found = check_exact(hf("mistral", sliding_window=8), {"input_ids": ids, "labels": ids})
    assert "is proved" not in reasons(found.report)
    torch._dynamo.reset()
    found = check_exact(hf("mistral", sliding_window=S), {"input_ids": ids, "labels": ids})
    assert "is proved" in reasons(found.report)


def test_the_pass_is_switched_off_by_name():
    torch.manual_seed(0)
    found = check_exact(
        Attention(PROVED["k <= q"]), {"x": torch.randn(2, S, 16)}, options={"mst.disable": ["causal_masks"]}
    )
    assert "is proved" not in reasons(found.report)
