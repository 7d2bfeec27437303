"""Losses that are functions of a row of logits, with their gradients in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy to a distribution: ``-sum_v target_v * log softmax(logits)_v``.

    Args:
        logits: [rows, vocabulary], fp32 or fp64.
        target: probabilities, [rows, vocabulary], no gradient is taken through them.

    Returns:
        The loss of each row [rows], in nats, and its gradient with respect to the logits [rows, vocabulary].
    """
    log_probabilities = logits.log_softmax(1)
    values = torch.bmm(target.unsqueeze(1), log_probabilities.unsqueeze(2)).view(-1).neg_()
    return values, log_probabilities.exp_().sub_(target)


def divergence_from(logits: Tensor, reference_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence KL(reference || current), zero where the two agree.

    Args:
        logits: of the current model, [rows, vocabulary].
        reference_logits: of the reference, [rows, vocabulary].

    Returns:
        The divergence of each row [rows], in nats, and its gradient with respect to `logits` [rows, vocabulary].
    """
    reference = reference_logits.log_softmax(1)
    current = logits.log_softmax(1)
    probabilities = reference.exp()
    values = (probabilities * reference.sub_(current)).sum(1)
    return values, current.exp_().sub_(probabilities)


def inverted_hinge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``1 + p_y - max over v other than y of p_v``: 2 where the label is certain, 0 where another token is.

    Args:
        logits: [rows, vocabulary], at least two columns.
        labels: [rows], int64. Of several strongest rivals the first counts.

    Returns:
        The loss of each row [rows], in [0, 2], and its gradient with respect to the logits [rows, vocabulary].
    """
    label = labels.unsqueeze(1)
    probabilities = logits.softmax(1)
    of_label = probabilities.gather(1, label)
    of_rival, rival = probabilities.scatter(1, label, -1.0).max(1, keepdim=True)
    gradient = probabilities * (of_rival - of_label)
    gradient.scatter_(1, label, of_label * (1 - of_label + of_rival))
    gradient.scatter_(1, rival, -of_rival * (1 + of_label - of_rival))
    return (1 + of_label - of_rival).squeeze(1), gradient
