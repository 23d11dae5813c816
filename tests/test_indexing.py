"""What is written or picked by an index, and rows taken apart and joined again: chunked where that is proved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.harness import EAGER, check_exact, chunked, reasons
from tests.heads import B, Heads, S, V, ce, head_inputs, mean_of

Tensor = torch.Tensor
T = B * S


def vocabulary(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    logits[:, :, 50:] = float("-inf")
    logits[..., 3] = -1e4
    logits[..., torch.tensor([5, -20])] = -1e4
    logits[..., torch.arange(V) == 7] = -1e4
    return ce(logits, labels.clamp(max=1))


def vectors(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    logits[..., 10:20] = s.head2(x)[..., :10] * 2
    logits[..., ::7] = s.value(x)
    return ce(logits, labels)


def labels_masked(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """TRL's spelling of sequence log-probabilities."""
    logits, labels = s.head(x)[:, :-1], labels[:, 1:].clone()
    mask = labels != -100
    labels[labels == -100] = 0
    logp = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return -F.logsigmoid((logp * mask).sum(-1).diff())


def smoothed(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logp = F.log_softmax(s.head(x), -1)
    with torch.no_grad():
        target = torch.zeros_like(logp)
        target.fill_(0.1 / (V - 1))
        target.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), 0.9)
        target[labels == -100] = 0
    return -(target * logp).sum(-1).mean()


def margin(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    cosines = F.linear(F.normalize(x, dim=-1), F.normalize(s.head.weight, dim=-1)).view(-1, V)
    labels, rows = labels.flatten().clamp(min=0), torch.arange(T)
    cosines[rows, labels] -= 0.3
    cosines[rows, (labels + 1) % V] = 0.5
    return F.cross_entropy(16 * cosines, labels)


def picked(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """Ignored labels pick from the end, and count for nothing."""
    labels = labels.masked_fill(labels == -100, -1)
    logp = F.log_softmax(s.head(x).view(-1, V), -1)
    return -mean_of(logp[torch.arange(len(logp)), labels.flatten()], labels.flatten() != -1)


def picked_in_three_dimensions(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logp = F.log_softmax(s.head(x), -1)
    return -logp[torch.arange(B)[:, None], torch.arange(S), labels.clamp(min=0)].mean()


def taken(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return -torch.take_along_dim(F.log_softmax(s.head(x), -1), labels.clamp(min=0)[..., None], -1).mean()


def narrowed(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x).float().narrow(1, 0, S - 1), labels.narrow(1, 1, S - 1))


def halves(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """Chosen and rejected, taken apart before the loss."""
    chosen, rejected = s.head(x).chunk(2)
    a, b = labels.clamp(min=0).split(1)
    logp = [v.log_softmax(-1).gather(-1, y[..., None]).sum() for v, y in ((chosen, a), (rejected, b))]
    return -F.logsigmoid(0.1 * (logp[0] - logp[1])) + 0.1 * ce(chosen, labels[:1])


def last_token(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(s.head(x.transpose(0, 1))[:, -1], labels[-1])


def rows_logsumexp(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """TRL's selective_log_softmax."""
    logits = s.head(x)
    chosen = torch.gather(logits, -1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return mean_of(torch.stack([torch.logsumexp(row, dim=-1) for row in logits]) - chosen, s.mask)


def rows_log_softmax(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    rows = zip(s.head(x) / 0.7, labels.clamp(min=0), strict=True)
    logp = [F.log_softmax(row, dim=1).gather(1, y.unsqueeze(1)).squeeze(1) for row, y in rows]
    return -mean_of(torch.stack(logp), s.mask)


def given_negatives(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """A sampled softmax: rows of the head for numbers that are an input, shared by all tokens."""
    table = s.head.weight[labels[0].clamp(min=0)]
    return (F.linear(x, table).logsumexp(-1) - (x * s.head.weight[labels.clamp(min=0)]).sum(-1)).mean()


def negatives_of_the_batch(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE: as many rows as tokens."""
    table = F.embedding(labels.clamp(min=0).flatten(), s.head.weight)
    return F.cross_entropy(x.flatten(0, 1) @ table.t() / 0.3, torch.arange(T))


# name -> (loss, losses chunked)
LEGAL: dict[str, tuple[Callable[..., Tensor], int]] = {
    f.__name__: (f, count)
    for f, count in [
        (vocabulary, 1), (vectors, 1), (labels_masked, 1), (smoothed, 1), (margin, 1), (picked, 1),
        (picked_in_three_dimensions, 1), (taken, 1), (narrowed, 1), (halves, 2), (last_token, 1), (rows_logsumexp, 1),
        (rows_log_softmax, 1), (given_negatives, 1), (negatives_of_the_batch, 1),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_chunked_and_exact(name: str) -> None:
    loss, count = LEGAL[name]
    ours = check_exact(Heads(loss), head_inputs())
    assert chunked(ours.report, "loss") == count == len(ours.report.regions), str(ours.report)


@pytest.mark.parametrize("name", ["vocabulary", "smoothed", "picked", "labels_masked", "halves", "rows_logsumexp"])
def test_exact_with_symbolic_sizes(name: str) -> None:
    check_exact(Heads(LEGAL[name][0]), head_inputs(), dynamic=True)


# -- near-misses --------------------------------------------------------------------------------------


def logits_of(write: Callable[[Any, Tensor, Tensor], Any]) -> Callable[..., Tensor]:
    def loss(s: Any, x: Tensor, labels: Tensor) -> Tensor:
        logits = s.head(x) * 1.0
        found = write(s, logits, labels)
        return ce(logits if found is None else found, labels)

    return loss


def first_tokens(s: Any, logits: Tensor, labels: Tensor) -> None:
    logits[:, :3] = 0


def first_tokens_then_sliced(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    logits[:, :3] = 0
    return F.pad(logits[:, 2:], (0, 0, 2, 0))


def own_first_token(s: Any, logits: Tensor, labels: Tensor) -> None:
    logits[..., :5] = logits[:, :1, 5:10]


def seen_by_a_view(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    view = logits[..., :5]
    logits[..., 2] = 1.0
    return torch.cat([view, logits], -1)


def many_indices(s: Any, logits: Tensor, labels: Tensor) -> None:
    logits[torch.arange(B)[:, None], torch.arange(S).flip(0), labels.clamp(min=0)] = 1.0


def counting_changed(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    rows = torch.arange(T)
    same = rows[:]
    same.clamp_(max=5)
    return logits + logits.view(-1, V)[rows, labels.flatten().clamp(min=0)].view(B, S, 1)


def other_rows(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([logits[1].softmax(-1), logits[0].softmax(-1)])


def different_rows(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([logits[0].softmax(-1), logits[1].softmax(-2)])


def scaled_rows(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row * factor for row, factor in zip(logits, s.advantages, strict=True)])


def along_tokens(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row.log_softmax(0) for row in logits])


def changed_rows(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    rows = [row * 2 for row in logits]
    rows[1][:, :4].mul_(0.5)
    return torch.stack(rows)


def taken_along_tokens(s: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.take_along_dim(logits, labels.clamp(min=0, max=S - 1)[..., None], 1)


MISSES = [first_tokens, first_tokens_then_sliced, own_first_token, seen_by_a_view, many_indices, counting_changed,
          other_rows, different_rows, scaled_rows, along_tokens, changed_rows, taken_along_tokens]  # fmt: skip


@pytest.mark.parametrize("write", MISSES, ids=lambda f: f.__name__)
def test_near_misses_are_left_alone_with_the_reason(write: Callable[..., Any]) -> None:
    ours = check_exact(Heads(logits_of(write)), head_inputs())
    assert chunked(ours.report, "loss") == 0, str(ours.report)
    assert reasons(ours.report)


def test_a_label_out_of_range_is_an_error_still() -> None:
    model, inputs = Heads(picked_in_three_dimensions), head_inputs()
    inputs["labels"][0, 0] = V
    with pytest.raises((IndexError, RuntimeError)):
        torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})(**inputs)
