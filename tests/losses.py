"""Losses as libraries and people spell them: ``fn(s, x, labels)`` with the parts of ``Heads`` at hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.heads import Loss, S, Tensor, V, ce, logp, mean_of, per_token, teacher_logp

# -- per-token losses, reduced ------------------------------------------------------------------------


def where_mask(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(s.head(x).transpose(1, 2), labels, reduction="none")
    return torch.where(labels != -100, loss, torch.zeros_like(loss)).sum() / (labels != -100).sum()


def sum_over_named_dims(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return per_token(s.head(x), labels).sum(dim=(0, 1)) / labels.numel()


def mean_per_sequence(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ((per_token(s.head(x), labels) * s.mask).sum(-1) / s.mask.sum(-1).clamp(min=1)).mean()


def mean_per_sequence_kept(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    per_sequence = per_token(s.head(x), labels).sum(1, keepdim=True) / s.mask.sum(1, keepdim=True)
    return -(-per_sequence * s.advantages.abs()[:, None]).mean()


def mean_of_means(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return per_token(s.head(x), labels).mean(dim=1).mean(dim=0)


def picked_by_a_mask(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return per_token(s.head(x), labels)[labels != -100].mean()


def token_weights(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return mean_of(per_token(s.head(x), labels), s.mask * 2 + 0.1)


def focal(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    loss = per_token(s.head(x), labels)
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def hardest_tokens(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return per_token(s.head(x), labels).flatten().topk(10).values.mean()


def smoothed_by_hand(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    log_probs = F.log_softmax(s.head(x), -1).view(-1, V)
    nll = -log_probs.gather(1, labels.clamp(min=0).view(-1, 1)).squeeze(1)
    return mean_of(0.9 * nll - 0.1 * log_probs.mean(-1), (labels.view(-1) != -100))


def one_hot(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return -(F.one_hot(labels.clamp(min=0), V) * F.log_softmax(s.head(x), -1)).sum(-1).mean()


def double(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(F.linear(x.double(), s.head.weight.double()), labels)


def scaled_by_a_tensor(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x), labels) * s.advantages[0].abs()


def learned_weight(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x), labels) * torch.exp(-s.log_var[0]) + s.log_var[0]


def counted(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x), labels, reduction="sum") / (labels != -100).sum()


def aux_in_place(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    loss = ce(s.head(x), labels, reduction="sum")
    loss += 0.01 * s.proj(x).square().mean()
    loss /= 7
    return loss


def hidden_states_read_elsewhere(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    h = s.norm(x)
    pooled = F.normalize(h.mean(1), dim=-1)
    return ce(s.head(h), labels) + F.mse_loss(s.value(h)[..., 0], s.mask) + (pooled @ pooled.T).sum()


# -- sums over everything -----------------------------------------------------------------------------


def kl_batchmean(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    student = F.log_softmax(s.head(x) / 2, -1)
    return F.kl_div(student, teacher_logp(s, x).exp(), reduction="batchmean") * 4


def kl_module(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    student = F.log_softmax(s.head(x), -1).view(-1, V)
    return nn.KLDivLoss(reduction="batchmean", log_target=True)(student, teacher_logp(s, x).view(-1, V))


def kl_sum(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    student = F.log_softmax(s.head(x), -1)
    return F.kl_div(student, s.teacher(x).detach().softmax(-1), reduction="sum") / labels.numel()


def kl_masked(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    loss = F.kl_div(F.log_softmax(s.head(x), -1), teacher_logp(s, x), log_target=True, reduction="none")
    return (loss * s.mask.unsqueeze(-1)).sum() / s.mask.sum()


def distilled(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = s.teacher(x)
    logits = s.head(x)
    kl = F.kl_div(F.log_softmax(logits / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 4
    return 0.5 * ce(logits, labels) + 0.5 * kl


def jensen_shannon(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    student, teacher, beta = F.log_softmax(s.head(x), -1), teacher_logp(s, x), torch.tensor(0.3)
    mixture = torch.logsumexp(torch.stack([student + torch.log(1 - beta), teacher + torch.log(beta)]), dim=0)
    kl_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    kl_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return mean_of((0.3 * kl_teacher + 0.7 * kl_student).sum(-1), s.mask)


def soft_targets(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(s.head(x).view(-1, V), teacher_logp(s, x).exp().view(-1, V))


def mse_of_logits(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(s.head(x), s.teacher(x).detach()).sqrt()


def other_losses_per_element(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits, teacher = s.head(x), s.teacher(x).detach()
    return (
        F.smooth_l1_loss(logits, teacher) + F.l1_loss(logits, teacher, reduction="sum") + F.huber_loss(logits, teacher)
    )


def binary(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels.clamp(min=0), V).float()
    return F.binary_cross_entropy_with_logits(s.head(x), target, pos_weight=s.weights)


def wide_sum(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    log_probs = F.log_softmax(s.head(x), -1)
    return -(log_probs.exp() * log_probs).sum() / labels.numel()


# -- several losses of the same logits ----------------------------------------------------------------


def z_loss(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    loss, z = ce(logits, labels), logits.logsumexp(-1).pow(2).mean()
    return {"loss": loss + 1e-3 * z, "ce": loss.detach(), "z": z.detach(), "perplexity": loss.detach().exp()}


def z_loss_masked_in_place(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    loss = ce(logits, labels)
    loss += 0.1 * s.proj(x).square().mean()
    return loss * 2 + mean_of(logits.logsumexp(-1).pow(2), labels != -100) / 100


def changed_without_gradient(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    loss = ce(logits, labels)
    with torch.no_grad():
        loss *= 2
    return loss + 0.1 * logits.logsumexp(-1).mean()


def of_its_own_mean(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    loss = per_token(s.head(x), labels)
    mean = loss.mean()
    return (loss * torch.sigmoid(mean)).mean() + mean * mean


def entropy_bonus(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    entropy = torch.logsumexp(logits, -1) - (F.softmax(logits, -1) * logits).sum(-1)
    return ce(logits, labels) - 0.01 * entropy.mean()


def penalised_logits(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    return ce(logits, labels, label_smoothing=0.1, weight=s.weights) + 1e-3 * logits.square().mean()


def learned_weights(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    z = logits.logsumexp(-1).pow(2).mean()
    return ce(logits, labels) * torch.exp(-s.log_var[0]) + z * torch.exp(-s.log_var[1]) + s.log_var.sum()


def squared_beside(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    loss = ce(logits, labels)
    return loss * loss + logits.logsumexp(-1).mean()


def both_returned(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    loss, z = ce(logits, labels), logits.logsumexp(-1).pow(2).mean()
    return {"loss": loss + 1e-3 * z, "ce": loss}


# -- metrics beside the loss --------------------------------------------------------------------------


def accuracy(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    with torch.no_grad():
        valid = labels != -100
        correct = ((logits.argmax(-1) == labels) & valid).sum() / valid.sum()
    return {"loss": ce(logits, labels), "accuracy": correct, "logits": logits}


def accuracy_before_several_losses(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    correct = (logits.argmax(-1) == labels).float().mean()
    loss = ce(logits, labels) + 1e-3 * logits.logsumexp(-1).square().mean() + 0.1 * s.proj(x).square().mean()
    return {"loss": loss + logits.square().mean(), "accuracy": correct, "logits": logits}


def aux_between_accuracy_and_losses(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    correct = (logits.argmax(-1) == labels).float().mean()
    loss = 0.1 * s.proj(x).square().mean() + ce(logits, labels) + mean_of(logits.logsumexp(-1), s.mask)
    return {"loss": loss, "accuracy": correct}


def slice_of_a_slice(s: Any, x: Tensor, labels: Tensor) -> Any:
    """As TRL takes the logits of completions: shifted, then the last of them."""
    logits = s.head(s.norm(x))[:, :-1][:, -9:] / 0.7
    picked = logits.log_softmax(-1).gather(-1, labels[:, 1:][:, -9:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -picked.mean()


def accuracy_and_slice(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    shifted, target = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    with torch.no_grad():
        correct = mean_of((shifted.argmax(-1) == target).float(), s.mask[:, 1:])
    return {"loss": ce(shifted, target), "accuracy": correct, "logits": logits}


def accuracy_of_five(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    found = (logits.topk(5, -1).indices == labels.unsqueeze(-1)).any(-1)
    return {"loss": ce(logits, labels), "accuracy": found.float().mean()}


def entropy_logged(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x)
    log_probs = logits.detach().log_softmax(-1)
    loss = ce(logits, labels)
    return {"loss": loss, "entropy": -(log_probs.exp() * log_probs).sum(-1).mean(), "perplexity": loss.detach().exp()}


# -- preferences and policies -------------------------------------------------------------------------


def grpo(s: Any, x: Tensor, labels: Tensor) -> Any:
    logits = s.head(x) / 0.7
    lp, old, a = logp(logits, labels), s.old_logp, s.advantages.unsqueeze(1)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    ratio = torch.exp(lp - old)
    loss = -torch.min(ratio * a, torch.clamp(ratio, 0.8, 1.2) * a) + 0.04 * (torch.exp(old - lp) - (old - lp) - 1)
    clipped = ((ratio < 0.8) & (a < 0)).float()
    return {
        "loss": ((loss * s.mask).sum(-1) / s.mask.sum(-1).clamp(min=1.0)).mean(),
        "entropy": mean_of(entropy, s.mask),
        "clipped": mean_of(clipped, s.mask),
    }


def gspo(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    ratio = ((logp(s.head(x), labels) - s.old_logp) * s.mask).sum(-1) / s.mask.sum(-1)
    return -(ratio.clamp(max=2).exp() * s.advantages).mean()


def selected_minus_logsumexp(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    logits = s.head(x)
    selected = torch.gather(logits, -1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -((selected - torch.logsumexp(logits, -1)) * s.mask).sum(-1).mean()


def dpo_with_reference(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        reference = (logp(s.teacher(x), labels) * s.mask).sum(-1)
    margin = (logp(s.head(x), labels) * s.mask).sum(-1) - reference
    return -F.logsigmoid(0.1 * (margin[0] - margin[1]))


def orpo(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    lp = logp(s.head(x), labels) * s.mask
    chosen, rejected = (lp.sum(-1) / s.mask.sum(-1)).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -lp[:1].sum() / s.mask[:1].sum() - 0.1 * F.logsigmoid(odds).mean()


# -- several heads ------------------------------------------------------------------------------------


def next_tokens(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    losses = [ce(head(x)[:, : S - 1 - i], labels[:, 1 + i :]) for i, head in enumerate((s.head, s.head2, s.head))]
    return torch.stack(losses).mean()


def ensemble(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    probabilities = (F.softmax(s.head(x), -1) + F.softmax(s.head2(x), -1)) / 2
    return F.nll_loss(probabilities.log().view(-1, V), labels.view(-1))


# -- vocabularies -------------------------------------------------------------------------------------


def sliced_vocabulary(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x)[..., :50].float(), labels.clamp(max=49))


def masked_vocabulary(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(s.head(x).masked_fill(torch.arange(V) >= 50, float("-inf")), labels.clamp(max=49))


def learned_temperature(s: Any, x: Tensor, labels: Tensor) -> Tensor:
    return ce(torch.tanh(s.head(x) * s.log_var[0].exp() / 5) * 5, labels)


# name -> (loss, losses chunked, where their gradients are formed: "forward", "backward" or "both")
LOSSES: dict[str, tuple[Loss, int, str]] = {
    f.__name__: (f, count, where)
    for f, count, where in [
        (where_mask, 1, "forward"),
        (sum_over_named_dims, 1, "forward"),
        (mean_per_sequence, 1, "forward"),
        (mean_per_sequence_kept, 1, "forward"),
        (mean_of_means, 1, "forward"),
        (picked_by_a_mask, 1, "backward"),
        (token_weights, 1, "forward"),
        (focal, 1, "forward"),
        (hardest_tokens, 1, "backward"),
        (smoothed_by_hand, 1, "forward"),
        (one_hot, 1, "forward"),
        (double, 1, "forward"),
        (scaled_by_a_tensor, 1, "forward"),
        (learned_weight, 1, "forward"),
        (counted, 1, "forward"),
        (aux_in_place, 1, "forward"),
        (hidden_states_read_elsewhere, 1, "forward"),
        (kl_batchmean, 1, "forward"),
        (kl_module, 1, "forward"),
        (kl_sum, 1, "forward"),
        (kl_masked, 1, "forward"),
        (distilled, 1, "forward"),
        (jensen_shannon, 1, "forward"),
        (soft_targets, 1, "forward"),
        (mse_of_logits, 1, "forward"),
        (other_losses_per_element, 1, "forward"),
        (binary, 1, "forward"),
        (wide_sum, 1, "forward"),
        (z_loss, 1, "forward"),
        (z_loss_masked_in_place, 1, "forward"),
        (entropy_bonus, 1, "forward"),
        (penalised_logits, 1, "forward"),
        (learned_weights, 1, "backward"),
        (squared_beside, 1, "backward"),
        (both_returned, 1, "backward"),
        (changed_without_gradient, 1, "backward"),
        (of_its_own_mean, 1, "backward"),
        (accuracy, 1, "forward"),
        (accuracy_of_five, 1, "forward"),
        (accuracy_before_several_losses, 1, "backward"),
        (aux_between_accuracy_and_losses, 1, "backward"),
        (accuracy_and_slice, 1, "forward"),
        (slice_of_a_slice, 1, "forward"),
        (entropy_logged, 1, "forward"),
        (grpo, 1, "forward"),
        (gspo, 1, "backward"),
        (selected_minus_logsumexp, 1, "forward"),
        (dpo_with_reference, 2, "backward"),
        (orpo, 1, "backward"),
        (next_tokens, 3, "forward"),
        (ensemble, 1, "forward"),
        (sliced_vocabulary, 1, "forward"),
        (masked_vocabulary, 1, "forward"),
        (learned_temperature, 1, "forward"),
    ]
}
