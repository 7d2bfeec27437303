"""A store of token scores in the place of a reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.models.head import output_head
from tokenwise.models.reference import Reference, ReferenceModel
from tokenwise.scores.layout import is_store
from tokenwise.scores.store import ScoreStore, as_array, as_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_reference(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Reference:
    """The reference at `path`: a folder of token scores, or a model, which is loaded.

    Args:
        path: a folder of token scores, a model's local directory, or a hub id.
        model: the model in training.
        tokenizer: what tokenises the training data, where it is known; scores made with another one are refused.
    """
    return StoredReference(path, model, tokenizer) if is_store(path) else ReferenceModel(path, model)


class StoredReference:
    """Answers as `ReferenceModel` does, from scores computed beforehand: no second model in memory.

    Args:
        path: the folder of the store, with the statistic ``logp``.
        model: the model in training.
        tokenizer: what tokenises the training data; checked where it is known.

    Raises:
        InputError: when the store is not finished, has no ``logp``, or was made with another vocabulary or tokenizer.
    """

    def __init__(self, path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.store = ScoreStore(path, "reference")
        ours, theirs = output_head(model).vocabulary, self.store.manifest.vocabulary
        if ours != theirs:
            raise InputError(
                Problem(
                    "reference",
                    f"the scores in {path!r} are of a vocabulary of {theirs} tokens, the model in training has {ours}.",
                    "Token losses can be compared only between models with the same tokenizer.",
                )
            )
        if "nll" not in self.store.columns:
            message = f"the scores in {path!r} have no 'logp', only {', '.join(self.store.columns)}."
            raise InputError(Problem("reference", message, "Score the data with --statistics logp."))
        if tokenizer is not None:
            self.store.check_tokenizer(tokenizer, "reference")

    def nll(self, rows: Tensor, labels: Tensor, input_ids: Tensor | None = None, *args: Any, **inputs: Any) -> Tensor:
        """Negative log-likelihood of the labels at `rows` of the flattened batch, in nats: [tokens].

        Padding (by ``attention_mask``) may be on either side, and packed rows are told apart by ``position_ids``.

        Raises:
            InputError: when a row of the batch is not in the store, or a label has no stored prediction.
        """
        return self._predicted(("nll",), rows, labels, input_ids, args, inputs)[0]

    def likeliest(
        self, rows: Tensor, labels: Tensor, input_ids: Tensor | None = None, *args: Any, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens in the place of each label, int64, and their log-probabilities in nats: [tokens, top_k]
        each. As `nll` otherwise; the store has the statistic ``top_k``."""
        ids, logp = self._predicted(("top_ids", "top_logp"), rows, labels, input_ids, args, inputs)
        return ids, logp

    def _predicted(
        self,
        names: tuple[str, ...],
        rows: Tensor,
        labels: Tensor,
        input_ids: Tensor | None,
        args: tuple[Any, ...],
        inputs: dict[str, Any],
    ) -> list[Tensor]:
        """Columns of the store for the predictions at `rows`."""
        mask, positions = inputs.get("attention_mask", args[0] if args else None), inputs.get("position_ids")
        if input_ids is None:
            message = "is missing from the batch; stored scores are found by the token ids."
            raise InputError(Problem("input_ids", message, "Use a reference model for a batch of embeddings."))
        ids = as_array(input_ids)
        found, predicted = self.store.aligned(ids, as_batch(mask, ids), as_batch(positions, ids), names)
        # The label predicted at a position is the token after it.
        at = rows.cpu() + 1
        inside = at % ids.shape[1] != 0
        at = at.where(inside, 0)
        known = inside & torch.from_numpy(predicted).reshape(-1)[at]
        same = torch.from_numpy(ids).reshape(-1)[at] == labels.cpu()
        if not bool((known & same).all()):
            count = int((~(known & same)).sum())
            message = f"{count} of {labels.shape[0]} labels have no stored score, because the same row has no token"
            message += " before them (only padding or another packed row), or another token in their place."
            fix = "Mask the first label of every row with -100 or pad on the right; let labels equal input_ids."
            raise InputError(Problem("labels", message, fix))
        return [found[name].flatten(0, 1)[at].to(labels.device) for name in names]
