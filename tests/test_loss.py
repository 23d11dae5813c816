"""Losses: every reduction and option, masks, degenerate batches, both places of gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mst_fx
from mst_fx import ops, simplify
from mst_fx.regions import chunking
from tests.harness import EAGER, check_exact, chunked, reasons

T, H, V = 46, 16, 61


class Head(nn.Module):
    """Any loss of the logits of some hidden states."""

    def __init__(self, loss: Callable[..., torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(H, V, bias)
        self.loss = loss
        self.register_buffer("weights", torch.rand(V) + 0.5)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.linear(hidden), labels, self)


def inputs(batch: int = 2, ignored: int = 7) -> dict[str, Any]:
    labels = torch.randint(0, V, (batch, T // batch))
    labels[:, ::ignored] = -100
    return {"hidden": torch.randn(batch, T // batch, H, requires_grad=True), "labels": labels}


def flat(fn: Callable[..., torch.Tensor] = F.cross_entropy, **options: Any) -> Callable[..., torch.Tensor]:
    return lambda logits, labels, _: fn(logits.flatten(0, -2), labels.flatten(), **options)


def masked(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    per_token = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    mask = (labels.flatten() != -100).float() * torch.linspace(0, 1, labels.numel())
    return (per_token * mask).sum() / mask.sum()


def dpo(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    logp = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    sequence = (logp * (labels != -100)).sum(-1)
    return -F.logsigmoid(sequence[0] - sequence[1])


def z_loss(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return loss + 1e-2 * torch.logsumexp(logits, -1).square().mean()


def capped(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    return F.cross_entropy((torch.tanh(logits / 5.0) * 5.0).float().flatten(0, -2), labels.flatten())


def sliced_logits(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, V), labels[..., 1:].contiguous().view(-1))


def class_dim_one(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def soft(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
    target = F.one_hot(labels.clamp(min=0), V).to(logits.dtype) * 0.9 + 0.1 / V
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(0, -2))


def soft_weights_smoothing(logits: torch.Tensor, labels: torch.Tensor, m: Any) -> torch.Tensor:
    target = F.one_hot(labels.clamp(min=0), V).to(logits.dtype) * 0.9 + 0.1 / V
    return F.cross_entropy(logits.mT, target.mT, weight=m.weights, label_smoothing=0.2)


# name -> (loss, whether its gradients are formed in the forward)
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "mean": (flat(), True),
    "sum": (flat(reduction="sum"), True),
    "none": (lambda x, y, m: flat(reduction="none")(x, y, m).square().sum(), True),
    "ignore_index": (flat(ignore_index=5), True),
    "smoothing": (flat(label_smoothing=0.1), True),
    "smoothing_sum": (flat(label_smoothing=0.1, reduction="sum"), True),
    "weights": (lambda x, y, m: F.cross_entropy(x.flatten(0, 1), y.flatten(), weight=m.weights), True),
    "weights_smoothing": (
        lambda x, y, m: F.cross_entropy(x.flatten(0, 1), y.flatten(), weight=m.weights, label_smoothing=0.1),
        True,
    ),
    "nll": (lambda x, y, _: F.nll_loss(F.log_softmax(x, -1).flatten(0, 1), y.flatten()), True),
    "module": (lambda x, y, _: nn.CrossEntropyLoss()(x.flatten(0, 1), y.flatten()), True),
    "num_items": (lambda x, y, m: flat(reduction="sum")(x, y, m) / torch.tensor(17.0), True),
    "scaled": (lambda x, y, m: flat()(x, y, m) * 65536.0 / 3, True),
    "masked": (masked, True),
    "dpo": (dpo, False),
    "z_loss": (z_loss, True),
    "capped": (capped, True),
    "sliced_logits": (sliced_logits, True),
    "class_dim_one": (class_dim_one, True),
    "soft": (soft, True),
    "soft_weights_smoothing": (soft_weights_smoothing, True),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gradient", ["auto", "recompute"])
def test_loss_is_chunked_and_exact(name: str, gradient: str) -> None:
    loss, forward = LOSSES[name]
    data = inputs()
    if name == "ignore_index":
        data["labels"] = data["labels"].clamp(min=0)
    ours = check_exact(Head(loss), data, options={"mst.loss_gradient": gradient})
    assert chunked(ours.report, "loss") == 1, str(ours.report)
    expected = "forward" if forward and gradient == "auto" else "backward"
    assert f"in the {expected}" in str(ours.report), str(ours.report)


def test_bias_and_frozen_weights() -> None:
    check_exact(Head(flat(), bias=True), inputs())
    model = Head(flat())
    model.linear.weight.requires_grad_(False)
    ours = check_exact(model, inputs())
    assert "input hidden" in ours.grads
    assert "linear.weight" not in ours.grads


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9, 16])
@pytest.mark.parametrize("gradient", ["auto", "recompute"])
def test_few_tokens(tokens: int, gradient: str) -> None:
    data = {"hidden": torch.randn(1, tokens, H, requires_grad=True), "labels": torch.randint(0, V, (1, tokens))}
    model = Head(flat())
    ours = {"mst.chunk_tokens": 8, "mst.loss_gradient": gradient, **EAGER}
    plain = run_once(model, data, None)
    chunky = run_once(model, data, ours)
    for a, b in zip(plain, chunky, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("gradient", ["auto", "recompute"])
def test_all_labels_ignored_gives_what_the_plain_model_gives(gradient: str) -> None:
    data = inputs()
    data["labels"] = torch.full_like(data["labels"], -100)
    for reduction in ("mean", "sum"):
        model = Head(flat(reduction=reduction))
        plain = run_once(model, data, None)
        ours = run_once(model, data, {"mst.chunk_tokens": 8, "mst.loss_gradient": gradient, **EAGER})
        for a, b in zip(plain, ours, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def run_once(model: nn.Module, data: dict[str, Any], options: dict[str, Any] | None) -> list[torch.Tensor]:
    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    data = {"hidden": data["hidden"].detach().clone().requires_grad_(), "labels": data["labels"]}
    fn = model if options is None else torch.compile(model, backend="mst", options=options)
    loss = fn(**data)
    loss.backward()
    return [loss.detach(), data["hidden"].grad, model.linear.weight.grad]


def test_gradient_accumulation_and_retain_graph() -> None:
    model, data = Head(flat()), inputs()
    fn = torch.compile(model, backend="mst", options={"mst.chunk_tokens": 8, **EAGER})
    for f in (model, fn):
        f.zero_grad(set_to_none=True)
        loss = f(**data)
        loss.backward(retain_graph=True)
        loss.backward()
        f(**data).div(2).backward()
        grad = model.linear.weight.grad.clone()
        if f is model:
            expected = grad
    torch.testing.assert_close(grad, expected)


def test_fp16_recomputes_by_default() -> None:
    model = Head(lambda x, y, m: F.cross_entropy(x.flatten(0, 1).float(), y.flatten())).half()
    data = inputs()
    data["hidden"] = data["hidden"].detach().half().requires_grad_()
    ours = check_exact(model, data)
    assert "recomputed" in str(ours.report)


def test_logits_mixed_over_tokens_before_the_loss_are_left_alone() -> None:
    def smoothed(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        return F.cross_entropy(logits.cumsum(1).flatten(0, 1), labels.flatten())

    ours = check_exact(Head(smoothed), inputs())
    assert chunked(ours.report, "loss") == 0
    assert "cumsum" in reasons(ours.report)


@pytest.mark.parametrize("accumulate", ["float32", "parameter"])
def test_bf16_weight_gradient_is_no_worse_than_unchunked(accumulate: str) -> None:
    def upcast(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    data = inputs()
    data["hidden"] = data["hidden"].detach().bfloat16().requires_grad_()
    slack = 4e-3 if accumulate == "float32" else 8e-3
    ours = check_exact(Head(upcast).bfloat16(), data, options={"mst.accumulate": accumulate}, slack=slack)
    assert chunked(ours.report, "loss") == 1


@pytest.mark.parametrize("gradient", ["auto", "recompute"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("ignored", [False, True])
def test_labels_whose_weights_are_all_zero(ignored: bool, scale: float, gradient: str) -> None:
    """The loss is 0 / 0 and so are its gradients, as in torch; where every label is ignored they are 0."""
    tokens, model, weights = 23, nn.Linear(H, V), torch.rand(V)
    weights[: V // 2] = 0
    labels = torch.full((tokens,), -100) if ignored else torch.arange(tokens) % (V // 2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), labels, weight=weights) * scale

    found = []
    for backend in ("aot_eager", "mst"):
        x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.zero_grad()
        options = {**EAGER, "mst.chunk_tokens": 8, "mst.loss_gradient": gradient} if backend == "mst" else None
        value = torch.compile(loss, backend=backend, options=options)(x)
        value.backward()
        found.append([value.detach(), x.grad, *(p.grad for p in model.parameters())])
    assert len(mst_fx.reports()[-1].chunked) == 1
    assert bool(found[0][1].isnan().all()) is not ignored  # type: ignore[union-attr]
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "ignored", "summed", "scaled", "impossible", "capped", "in bf16"])
def test_losses_picked_in_a_pass_over_the_logits_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where gradients are written over the logits then."""
    monkeypatch.setattr(ops, "BODIES", bodies := {})
    monkeypatch.setattr(chunking, "BODIES", bodies)
    picked: list[Any] = []
    whole = simplify._pick
    monkeypatch.setattr(simplify, "PICKED_APART", set())
    monkeypatch.setattr(simplify, "_pick", lambda *given: picked.append(given) or whole(*given))

    def impossible(logits: torch.Tensor, labels: torch.Tensor, _: Any) -> torch.Tensor:
        """A label among classes that are switched off, of a token that does not count."""
        off = torch.arange(V, device=logits.device) % 5 == 0
        logits = logits.masked_fill(off, float("-inf"))
        return F.cross_entropy(logits.flatten(0, -2), torch.where(labels % 5 == 0, -100, labels).flatten())

    loss: Callable[..., torch.Tensor] = {
        "summed": flat(reduction="sum"),
        "scaled": lambda logits, labels, _: 3 * flat()(logits, labels, _) + 1,
        "impossible": impossible,
        "capped": capped,
    }.get(name, flat())
    model, given = Head(loss), inputs(ignored=1 if name == "ignored" else 7)
    if name == "ignored":
        given["labels"][0, :5] = 3
    if name == "in bf16":
        model, given["hidden"] = model.bfloat16(), given["hidden"].detach().bfloat16().requires_grad_()
    for compiler in ("aot_eager", "inductor"):
        ours = check_exact(model, given, compiler=compiler, options={"mst.loss_gradient": "forward"})
        assert chunked(ours.report, "loss") == 1
    assert picked


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("label", [V, -1])
def test_a_label_that_is_no_class_is_an_error_where_losses_are_picked(
    compiler: str, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "PICKED_APART", set())
    monkeypatch.setattr(ops, "BODIES", bodies := {})
    monkeypatch.setattr(chunking, "BODIES", bodies)
    given = inputs()
    given["labels"][0, 3] = label
    options = {"mst.chunk_tokens": 8, "mst.compiler": compiler}
    with pytest.raises(RuntimeError, match="out of range"):
        torch.compile(Head(flat()), backend="mst", options=options)(**given)


@pytest.mark.parametrize(("length", "where"), [(60, "in the forward"), (15, "in the backward")])
def test_several_losses_of_one_head_keep_no_more_than_their_logits(length: int, where: str) -> None:
    """Each would keep a gradient of the weight until the backward; one that is larger than the logits is not formed."""

    class Ahead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixes, self.head = nn.ModuleList(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 96, bias=False)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            heads = [self.head(mix(x)).flatten(0, 1) for mix in self.mixes]
            return torch.stack([F.cross_entropy(logits, labels.flatten()) for logits in heads]).sum()

    given = {"x": torch.randn(1, length, 32, requires_grad=True), "labels": torch.randint(0, 96, (1, length))}
    ours = check_exact(Ahead(), given)
    assert chunked(ours.report, "loss") == 3, str(ours.report)
    assert all(where in r.reason for r in ours.report.chunked), str(ours.report)
