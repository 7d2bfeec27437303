"""What the weights do to a training, in numbers that cost next to nothing, and their way into the Trainer's logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from tokenwise.models.patch import replace_attribute

if TYPE_CHECKING:
    from tokenwise.weighting.forward import Weighed
    from tokenwise.weighting.weighing import Weighing

DECILES = 10
LOGGED = {
    "weights/mean": "mean_weight",
    "weights/kept_share": "kept_share",
    "weights/effective_sample_size": "effective_sample_size",
    "weights/effective_learning_rate": "effective_learning_rate",
    "weights/gradient_share_top_decile": f"gradient_share_decile_{DECILES}",
}
"""What the Trainer's logs say of the steps since the last log, by the name it has in `Weighing.stats`."""

_SUMS = ("labels_trained", "weight", "weight_squared", "nll", "nll_labels", "gradient_weight", "denominator")


class WeightSums:
    """Sums over micro-batches, and what follows from them."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("labels", *_SUMS, *range(DECILES)), 0.0)

    def add(self, labels: int, measured: list[float]) -> None:
        """Add a micro-batch of so many labels with what `measure` found."""
        for name, value in zip(self._sums, (labels, *measured), strict=True):
            self._sums[name] += value

    def summary(self) -> dict[str, float]:
        """The numbers that `Weighing.stats` describes; empty before the first label."""
        sums = self._sums
        if not sums["labels"]:
            return {}
        count = sums["labels"]
        gradient = sum(sums[decile] for decile in range(DECILES))
        return {
            "labels": count,
            "labels_trained": sums["labels_trained"],
            "mean_weight": sums["weight"] / count,
            "kept_share": sums["labels_trained"] / count,
            "effective_sample_size": sums["weight"] ** 2 / max(sums["weight_squared"], 1e-30) / count,
            "effective_learning_rate": sums["gradient_weight"] / (sums["denominator"] or 1.0),
            "nll": sums["nll"] / max(sums["nll_labels"], 1),
            "nll_labels": sums["nll_labels"],
            **{
                f"gradient_share_decile_{DECILES - decile}": sums[decile] / (gradient or 1.0)
                for decile in range(DECILES)
            },
        }


def measure(weighed: Weighed) -> Tensor:
    """What `WeightSums` adds up of one micro-batch, fp64, on the device; waits for nothing."""
    weights, known = weighed.weights.double(), ~weighed.nll.isnan()
    found = [
        weights.count_nonzero(),
        weights.sum(),
        weights.square().sum(),
        weighed.nll.double().where(known, 0.0).sum(),
        known.sum(),
        weighed.gradient_weight,
        weighed.denominator,
    ]
    return torch.cat([torch.stack([value.double() for value in found]), gradient_by_decile(weights, weighed.nll)])


def gradient_by_decile(weights: Tensor, nll: Tensor) -> Tensor:
    """How much of the gradient at the logits the tokens hold, from the tenth of largest weight to that of smallest.

    A token's gradient at the logits is its weight times ``softmax - one_hot``, whose absolute values sum to twice the
    probability that the label does not get: its size is taken as ``|weight| * (1 - exp(-nll))``. Tokens of equal
    weight share theirs equally, and one that lies across two tenths is cut.

    Args:
        weights: [tokens].
        nll: loss of each token in nats, [tokens]; not read where the weight is zero.

    Returns:
        Sums over tokens, [10]; all of them together are the sum of the sizes.
    """
    count = weights.shape[0]
    if not count:
        return weights.new_zeros(DECILES)
    size = torch.where(weights == 0, 0.0, weights.abs() * -torch.expm1(-nll.to(weights.dtype)))
    ordered, order = weights.sort(descending=True)
    # Everything has a size that is known without looking at the values, so that nothing waits for the device.
    group = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (1, 0)).cumsum(0)
    shared = _mean_of_groups(size[order], group)
    running = torch.nn.functional.pad(shared.cumsum(0), (1, 0))
    place = torch.arange(DECILES + 1, dtype=weights.dtype, device=weights.device) * count / DECILES
    before = place.floor().long().clamp_max(count - 1)
    return torch.lerp(running[before], running[before + 1], place - before).diff()


def _mean_of_groups(values: Tensor, group: Tensor) -> Tensor:
    """Each value replaced by the mean of its group; groups are numbered from 0, fewer than there are values."""
    count = values.shape[0]
    sums = values.new_zeros(count).index_add_(0, group, values)
    sizes = values.new_zeros(count).index_add_(0, group, torch.ones_like(values))
    return (sums / sizes.clamp_min(1))[group]


def log_weights(trainer: Trainer, handle: Weighing) -> None:
    """Add the numbers of `LOGGED` to what the Trainer logs beside the training loss; undone with the handle.

    They speak of the micro-batches since the last log; in a distributed run of those of the process that logs.
    """
    plain_log = trainer.log

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            since_last = handle.take_interval()
            logs.update({key: since_last[name] for key, name in LOGGED.items() if name in since_last})
        plain_log(logs, *args, **kwargs)

    handle.on_undo(replace_attribute(trainer, "log", log))
