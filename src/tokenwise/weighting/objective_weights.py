"""What an objective does to each token of a text, in one signed number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenwise.models.head import last_hidden, output_head
from tokenwise.signals.head import IGNORED, OutputHead, row_tiles, tile_rows, token_statistics
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.logit_objective import Likeliest, LogitObjective, States
from tokenwise.weighting.objective import ObjectiveForward, StoredBatch, Term, distributions

Quantity = Literal["weight", "factor", "gradient"]
"""What the number of a token is. ``weight``: what its loss is multiplied by, at least 0. ``factor``: the signed factor
of its negative log-likelihood's gradient; below 0 the loss is raised. ``gradient``: the norm of the gradient at the
logits, with a minus where it lowers the label's logit. In plain training that norm is at most the root of 2, and close
to 0 for a token that the model knows."""


@dataclass
class Found:
    """The labelled tokens of a batch under an objective.

    Args:
        quantity: what `weights` are: ``factor`` where all terms that speak of these tokens are functions of their
            losses, or else ``gradient``.
        rows: position of each label's prediction in the flattened batch, [labels].
        weights: with the coefficient of the term, before the division by tokens or sequences; 0 where no term speaks
            of the token, [labels].
        nll: negative log-likelihood of each label in nats, [labels].
    """

    quantity: Quantity
    rows: Tensor
    weights: Tensor
    nll: Tensor


@dataclass
class _Part:
    """The tokens that a term speaks of: increasing places among the labels, and what it makes of their losses."""

    term: Term
    places: Tensor
    batch: TokenBatch
    slopes: Tensor | None = None


@torch.no_grad()
def objective_weights(
    forward: ObjectiveForward, targets: Tensor, columns: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> Found:
    """What the objective of `forward` does to each label.

    Args:
        forward: the objective on a model.
        targets: labels moved to the positions that predict them, [batch, tokens].
        columns: moved likewise.
        inputs: the backbone's.

    Raises:
        InputError: when a column is missing.
    """
    frozen = forward.frozen(**inputs)
    hidden = last_hidden(forward.model, **inputs)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    head = output_head(forward.model)
    flat = targets.reshape(-1)
    rows = flat.ne(IGNORED).nonzero().squeeze(1)
    nll = token_statistics(hidden, head, flat[rows], rows=rows).nll
    parts = []
    for term in forward.terms:
        own, batch = forward.tokens(term, targets, columns, inputs.get("position_ids"))
        if not own.numel():
            continue
        part = _Part(term, torch.searchsorted(rows, own), batch)
        if not isinstance(term.loss, LogitObjective):
            batch.nll = nll[part.places]
            if term.reference:
                batch.reference_nll = forward.reference_nll(columns, own, batch.labels, frozen)
            part.slopes = torch.ones_like(batch.nll) if term.loss is None else term.loss(batch)[1]
        parts.append(part)
    if any(part.slopes is None for part in parts):
        return Found(
            "gradient",
            rows,
            _signed_norms(parts, hidden, head, flat[rows], rows, frozen),
            nll,
        )
    weights = torch.zeros_like(nll)
    for part in parts:
        assert part.slopes is not None
        weights[part.places] += part.term.coefficient * part.slopes
    return Found("factor", rows, weights, nll)


def _signed_norms(
    parts: list[_Part],
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    rows: Tensor,
    frozen: States | StoredBatch | None,
) -> Tensor:
    """Norm of the gradient at the logits of each label, negative where the label's own logit is lowered: [labels]."""
    found = []
    for tile in row_tiles(rows.shape[0], tile_rows(head.vocabulary, low_memory=True)):
        logits = _logits((hidden, head), rows[tile])
        total = torch.zeros_like(logits)
        for part in parts:
            start, stop = torch.searchsorted(part.places, torch.tensor([tile.start, tile.stop]).to(rows)).tolist()
            places = part.places[start:stop]
            own, batch = logits[places - tile.start], part.batch
            if isinstance(part.term.loss, LogitObjective):
                seen = TokenBatch(
                    batch.labels[start:stop], batch.sequence[start:stop], batch.sequences, step=batch.step
                )
                before = None
                if part.term.reference and frozen is not None:
                    known = distributions(frozen, rows[places], seen.labels)
                    if isinstance(known, Likeliest):
                        before = known.complete(own, slice(None))
                    elif known is not None:
                        before = _logits(known, rows[places])
                gradient = part.term.loss.tile(own, seen, before)[1]
            else:
                assert part.slopes is not None
                gradient = own.softmax(1)
                gradient[torch.arange(places.shape[0]), batch.labels[start:stop]] -= 1
                gradient *= part.slopes[start:stop, None]
            total[places - tile.start] += part.term.coefficient * gradient
        of_label = total.gather(1, labels[tile].unsqueeze(1)).squeeze(1)
        # A step goes against the gradient: where that is positive, the logit falls.
        found.append(total.norm(dim=1) * torch.where(of_label > 0, -1.0, 1.0))
    return torch.cat(found)


def _logits(states: States, rows: Tensor) -> Tensor:
    hidden, head = states
    logits = head.logits(hidden[rows].to(head.weight.dtype))
    return logits if logits.dtype == torch.float64 else logits.float()
