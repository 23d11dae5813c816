"""Values that a loss reads but that are made of something smaller are computed in the loop, never kept in full."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx.diff.liveness import Timeline
from tests.harness import Run, check_exact, chunked

T, H, V = 24, 8, 64
LOGITS = T * V * 4
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Headed(nn.Module):
    """A head and a loss of its logits, labels and what a teacher gave."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = nn.Linear(H, V), loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(x), labels, teacher)


def given() -> dict[str, Any]:
    torch.manual_seed(1)
    x, labels = torch.randn(T, H, requires_grad=True), torch.randint(0, V, (T,))
    return {"x": x, "labels": labels, "teacher": torch.randn(T, V)}


def soft_labels(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, F.one_hot(labels, V).to(logits.dtype))


def other_dimensions(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    hot = F.one_hot(labels.view(4, T // 4), V).to(logits.dtype)
    return F.cross_entropy(logits.view(4, T // 4, V).flatten(0, 1), hot.flatten(0, 1))


def smoothing_by_hand(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    soft = F.one_hot(labels, V) * 0.9 + 0.1 / V
    return -(soft * logits.log_softmax(-1)).sum() / T


def binary(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, V).to(logits.dtype))


def brier(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) - F.one_hot(labels, V)).pow(2).sum(-1).mean()


def margin(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(16 * logits - 3.2 * F.one_hot(labels, V), labels)


def compared(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (logits.sigmoid() * (labels[:, None] == torch.arange(V))).sum() / T


def kl(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div((logits / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")


def kl_per_token(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    each = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return (each * (labels > 3)).sum() / T


def kl_by_hand(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p = teacher.softmax(-1)
    return (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()


def counts(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.poisson_nll_loss(logits, teacher.abs() * 3, full=True)


LOSSES = [soft_labels, other_dimensions, smoothing_by_hand, binary, brier, margin, compared, kl, kl_per_token,
          kl_by_hand, counts]  # fmt: skip


def largest(run: Run) -> tuple[Timeline, Timeline]:
    """Return the accounts of the only graph, before and after; assert that its loss was chunked."""
    assert chunked(run.report, "loss") == 1
    assert run.report is not None
    (timelines,) = run.report.timelines()
    assert timelines[0].largest_bytes >= LOGITS
    return timelines


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_made_in_the_loop(loss: Loss) -> None:
    _, after = largest(check_exact(Headed(loss), given()))
    assert after.largest_bytes < LOGITS, after.largest


@pytest.mark.parametrize("loss", [other_dimensions, smoothing_by_hand, kl], ids=lambda f: f.__name__)
def test_made_in_the_loop_with_symbolic_sizes(loss: Loss) -> None:
    run = check_exact(Headed(loss), given(), dynamic=True)
    _, after = largest(run)
    assert f", {V}]" not in after.largest


def test_made_in_the_loop_by_inductor() -> None:
    check_exact(Headed(smoothing_by_hand), given(), compiler="inductor")


class Returning(Headed):
    """Returns its logits beside the loss, as Transformers' models do."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> Any:
        logits = self.head(x)
        return self.loss(logits, labels, teacher), logits


@pytest.mark.parametrize("loss", [soft_labels, kl], ids=lambda f: f.__name__)
def test_made_in_the_loop_beside_returned_logits(loss: Loss) -> None:
    """Nothing of what made them stays in the graph, though the logits are lifted apart."""
    run = check_exact(Returning(loss), given())
    _, after = largest(run)
    assert after.largest_bytes < LOGITS, after.largest
    assert run.report is not None
    assert re.search(r"- \w+: .* = (one_hot|softmax)\(", str(run.report.diff()))


# -- labels that are made of the logits ------------------------------------------------------------------------------


def pseudo_labels(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, logits.argmax(-1))


def confident_labels(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        best = logits.softmax(-1).max(-1)
        chosen = torch.where(best.values > 0.03, best.indices, -100)
    return F.cross_entropy(logits, chosen) + (chosen != -100).to(logits.dtype).mean()


def nothing_counts(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        chosen = torch.where(logits.amax(-1) > 1e6, labels, -100)
    return F.cross_entropy(logits, chosen).nan_to_num(3.0) + logits.mean()


@pytest.mark.parametrize("loss", [pseudo_labels, confident_labels, nothing_counts], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_mean_over_labels_made_of_the_logits(loss: Loss, dynamic: bool | None) -> None:
    """What it is divided by is counted behind the loop; counted outside it would keep a head in full."""
    run = check_exact(Headed(loss), given(), dynamic=dynamic)
    _, after = largest(run)
    assert f", {V}]" not in after.largest


# -- what stays outside ----------------------------------------------------------------------------------------------


def test_a_value_with_other_readers_stays() -> None:
    """It is there anyway: made in the loop too, it would be made twice."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        soft = teacher.softmax(-1)
        return F.kl_div(logits.log_softmax(-1), soft, reduction="sum") + soft.cumsum(0).mean().detach()

    run = check_exact(Headed(loss), given())
    _, after = largest(run)
    assert after.largest_bytes >= LOGITS


def test_random_values_are_drawn_once() -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return (logits.log_softmax(-1) * (torch.rand_like(teacher) > 0.5)).sum() / T

    def step(fn: Any) -> list[torch.Tensor]:
        inputs = given()
        model = Headed(loss)
        (fn(model) if fn else model)(**inputs).backward()
        return [inputs["x"].grad, model.head.weight.grad]

    compiled = step(lambda m: torch.compile(m, backend="aot_eager"))
    options: Any = {"mst.compiler": "aot_eager", "mst.chunk_tokens": 8}
    ours = step(lambda m: torch.compile(m, backend="mst", options=options))
    for a, b in zip(compiled, ours, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_is_made_of_changes_later() -> None:
    """In the loop's recomputation it would be made of what is there by then."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        soft = F.one_hot(labels, V) * 0.9 + 0.1 / V
        each = -(soft * logits.log_softmax(-1)).sum(-1)
        labels.add_(1).remainder_(V)
        return each.square().mean()

    options: Any = {"mst.compiler": "aot_eager", "mst.chunk_tokens": 8, "mst.loss_gradient": "recompute"}
    found = []
    for compiled in (lambda m: m, lambda m: torch.compile(m, backend="mst", options=options)):
        model, inputs = Headed(loss), given()
        compiled(model)(**inputs).backward()
        found.append([inputs["x"].grad, model.head.weight.grad, inputs["labels"]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert chunked(mst_fx.reports()[-1], "loss") == 1


def test_what_is_made_without_gradients_gets_none() -> None:
    """A parameter that labels are made of under no_grad must not be trained by them in the loop."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head, self.scale = nn.Linear(H, V), nn.Parameter(torch.tensor([0.7]))
            self.shift = nn.Parameter(torch.rand(V))

        def forward(self, x: torch.Tensor, labels: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                soft = F.one_hot(labels, V) * self.scale + self.shift + free[:, :1]
            logits = self.head(x) * self.scale + free.sum(-1, keepdim=True)
            return -(soft * logits.log_softmax(-1)).sum() / T

    inputs = {"x": given()["x"], "labels": given()["labels"], "free": torch.randn(T, 4, requires_grad=True)}
    run = check_exact(Made(), inputs)
    assert chunked(run.report, "loss") == 1
    run = check_exact(Made(), inputs, options={"mst.loss_gradient": "recompute"})
    assert chunked(run.report, "loss") == 1
