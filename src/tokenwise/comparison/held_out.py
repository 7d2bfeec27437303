"""The held-out loss of a causal language model: always unweighted, per document."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import PreTrainedModel

from tokenwise.comparison.data import IGNORED, Windows
from tokenwise.comparison.quality import TextLoss

CURVE_TOKENS = 20_000
"""Evaluations on the way use the first windows up to this many labels; the last one uses all."""
_LOGITS_AT_ONCE = 2**24


class HeldOut:
    """Held-out documents and the loss of a model on them.

    Args:
        windows: the documents, cut.
        precision: ``fp32``, or ``bf16`` for the forward passes; losses are computed in fp32 and summed in fp64.
    """

    def __init__(self, windows: Windows, precision: str) -> None:
        self._windows = windows
        self._half = precision == "bf16"
        self._labels = (windows.labels != IGNORED).sum(1)
        enough = int(np.searchsorted(self._labels.cumsum(), CURVE_TOKENS)) + 1
        self._start = min(enough, len(self._labels))

    def measure(self, model: PreTrainedModel) -> tuple[TextLoss, float]:
        """The loss of every document, and what `on_the_way` gives."""
        losses = self.losses(model)
        return self.quality(losses), self.start_of(losses)

    def losses(self, model: PreTrainedModel) -> NDArray[np.float64]:
        """Summed negative log-likelihood of each window, in nats, shape [windows]."""
        return self._losses(model, len(self._labels))

    def on_the_way(self, model: PreTrainedModel) -> float:
        """Loss in nats per token over the first windows, the same ones every time."""
        return self.start_of(self._losses(model, self._start))

    def start_of(self, losses: NDArray[np.float64]) -> float:
        """What `on_the_way` gives, from losses that are known."""
        return float(losses[: self._start].sum() / self._labels[: self._start].sum())

    def quality(self, losses: NDArray[np.float64]) -> TextLoss:
        """The losses of the windows summed up for each document."""
        document = self._windows.document
        return TextLoss(
            nll=np.bincount(document, losses).tolist(),
            tokens=np.bincount(document, self._labels).astype(int).tolist(),
            bytes=self._windows.text_bytes.tolist(),
        )

    @torch.no_grad()
    def _losses(self, model: PreTrainedModel, count: int) -> NDArray[np.float64]:
        was_training = model.training
        model.train(False)
        # Windows of like length together. Padding on the right needs no mask: attention is causal.
        order = np.argsort(-self._windows.lengths[:count], kind="stable")
        losses = np.zeros(count)
        vocabulary = model.config.get_text_config().vocab_size
        while len(order):
            length = int(self._windows.lengths[order[0]])
            rows = max(1, _LOGITS_AT_ONCE // (length * vocabulary))
            batch, order = order[:rows], order[rows:]
            losses[batch] = self._batch(model, batch, length)
        model.train(was_training)
        return losses

    def _batch(self, model: PreTrainedModel, rows: NDArray[np.int64], length: int) -> NDArray[np.float64]:
        ids, labels = (
            torch.from_numpy(array[rows, :length]).to(model.device, torch.int64)
            for array in (self._windows.input_ids, self._windows.labels)
        )
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self._half):
            logits = model(input_ids=ids, use_cache=False).logits
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nll.view(len(rows), -1).double().sum(1).cpu().numpy()


def held_out_loss(model: PreTrainedModel, windows: Windows, precision: str = "fp32") -> TextLoss:
    """Unweighted loss of `model` on held-out windows, per document."""
    held_out = HeldOut(windows, precision)
    return held_out.quality(held_out.losses(model))
