"""What a classifier's outputs say of each example: overlap with its label, confidence, doubt."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenwise.signals.losses import probability_power, probability_power_slope

DiceDenominator = Literal["paper", "square", "batch"]
"""What the overlap of an example and a class is divided by: ``paper`` p' + y, ``square`` p'^2 + y^2, each of the
example alone; ``batch`` the sums of p' and of y over all examples given."""


def dice_loss(
    probabilities: Tensor, targets: Tensor, alpha: float, smoothing: float, denominator: DiceDenominator
) -> Tensor:
    """``1 - (2 p' y + smoothing) / (denominator + smoothing)`` with ``p' = (1 - p) ** alpha * p``, of each entry.

    The gradient flows through the factor ``(1 - p) ** alpha``, too.

    Args:
        probabilities: p, [examples, classes], in [0, 1].
        targets: y, 0 or 1, shaped alike.
        alpha: how much an example that is known already loses; 0 is the plain Dice coefficient.
        smoothing: at least 0; above 0 a class without positives is finite.
        denominator: see `DiceDenominator`.

    Returns:
        [examples, classes].
    """
    damped = probabilities
    if alpha:
        # At p = 1 the slope of (1 - p) ** alpha is unbounded for alpha below 1; rounding must not get there.
        rest = (1 - probabilities).clamp_min(torch.finfo(probabilities.dtype).eps)
        damped = rest.pow(alpha) * probabilities
    overlap = 2 * damped * targets
    if denominator == "paper":
        size = damped + targets
    elif denominator == "square":
        size = damped.square() + targets.square()
    else:
        size = (damped.sum(0) + targets.sum(0)).expand_as(overlap)
    return 1 - (overlap + smoothing) / (size + smoothing)


def label_statistics(logits: Tensor, labels: Tensor, spread: Tensor) -> Tensor:
    """What a rescaler may read of each example: loss, probability, margin, entropy and spread.

    Args:
        logits: [examples, classes].
        labels: [examples], int64.
        spread: standard deviation of the label's probability over draws of dropout, [examples].

    Returns:
        [examples, 5]: the label's negative log-likelihood in nats, its probability, that probability minus the largest
        of another class, the entropy as a share of its maximum, and `spread`.
    """
    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    nll = F.nll_loss(log_probabilities, labels, reduction="none")
    own = torch.exp(-nll)
    others = probabilities.scatter(1, labels.unsqueeze(1), -1.0).amax(1)
    entropy = torch.special.entr(probabilities).sum(1) / torch.log(torch.tensor(float(logits.shape[1])))
    return torch.stack([nll, own, own - others, entropy, spread], 1)


def focal_info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.05,
    gamma: float = 0.5,
    detach: bool = True,
) -> Tensor:
    """InfoNCE whose hard queries count more: the mean of ``(1 - p) ** gamma * -log p`` over the queries.

    p is the probability of a query's own positive among all positives of the batch and all `negatives`, by cosine
    similarity over `temperature`.

    Args:
        query: embeddings of the queries, [queries, dimensions].
        positive: the text that belongs to each, [queries, dimensions].
        negatives: hard negatives of the batch, [negatives, dimensions] or [queries, negatives, dimensions]; each is a
            negative to every query.
        temperature: above 0.
        gamma: at least 0; 0 is plain InfoNCE.
        detach: whether the weight is a constant to the gradient.

    Returns:
        A scalar with gradient.

    Raises:
        ValueError: when shapes do not fit together, there is no query, or a number is out of range.
    """
    if query.dim() != 2 or query.shape != positive.shape or query.shape[0] == 0:
        raise ValueError(
            f"query {tuple(query.shape)} and positive {tuple(positive.shape)} must be [queries, dimensions] alike"
        )
    if not temperature > 0 or not gamma >= 0:
        raise ValueError(f"temperature {temperature} must be above 0 and gamma {gamma} at least 0")
    candidates = positive
    if negatives is not None:
        if negatives.shape[-1] != query.shape[1]:
            raise ValueError(f"negatives have {negatives.shape[-1]} dimensions, query has {query.shape[1]}")
        candidates = torch.cat([positive, negatives.reshape(-1, query.shape[1])])
    similarity = F.normalize(query, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    nll = F.cross_entropy(similarity, torch.arange(query.shape[0], device=query.device), reduction="none")
    return focal(nll, gamma, detach).mean()


def focal(nll: Tensor, gamma: float, detach: bool = False) -> Tensor:
    """``(1 - p) ** gamma * nll`` with p = exp(-nll), stable in value and first derivative where p is close to 1.

    Args:
        nll: negative log-likelihoods in nats, any shape, at least 0.
        gamma: at least 0; 0 gives `nll`.
        detach: whether the weight is a constant to the gradient.
    """
    known = nll.detach()
    slope = probability_power(known, 0.0, gamma)
    value = slope * known
    if not detach:
        slope = slope + known * probability_power_slope(known, 0.0, gamma)
    # A term of value zero carries the derivative, so that no 0 * inf arises at p = 1.
    return value + slope * (nll - known)
