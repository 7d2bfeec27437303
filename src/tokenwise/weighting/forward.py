"""The weighted forward pass of one model under one method: what the patched `model.forward` does while training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenwise.errors import InputError, Problem
from tokenwise.models.attention import attention_to
from tokenwise.models.head import output_head, run_backbone
from tokenwise.models.reference import Reference
from tokenwise.signals.head import IGNORED, STATISTICS, TokenStatistics, token_statistics
from tokenwise.weighting.base import Normalize, PointwiseWeighter, State, TokenBatch, TokenWeighter
from tokenwise.weighting.fused_output import fused_output, load_balancing_loss
from tokenwise.weighting.loss import Metrics, Pointwise, weighted_sum

COLUMNS = ("loss_weights", "reference_nll", "sample_id", "base_nll", "completion_mask", "forget", "difference")
"""What a batch may carry beside the model's own inputs: [batch, tokens], index t speaks of label t."""

_WHOLE_NUMBERS = ("sample_id", "completion_mask")


@dataclass
class Weighed:
    """The weighted loss of one micro-batch before the division.

    Args:
        total: sum of the weighted token losses, a scalar with gradient.
        denominator: what this micro-batch adds to the method's denominator, a detached scalar.
        labels: how many labels there are.
        weights: the factor of each label's gradient, [labels].
        nll: negative log-likelihood of each label in nats, [labels]; NaN where it was never computed.
        rows: position of each label's prediction in the flattened batch, [labels].
        gradient_weight: sum of the sizes of what the losses are multiplied by before the division; of uniform weights
            under the same reduction it would be `denominator`.
        values: what each label adds to `total`, [labels].
        entropy: entropy of each label's distribution in nats, [labels]; None unless metrics were wanted.
        is_top1: whether each label is the most likely token, [labels], bool; None unless metrics were wanted.
        counted: labels that the statistics are of, [labels], bool; None where they are of every label.
    """

    total: Tensor
    denominator: Tensor
    labels: int
    weights: Tensor
    nll: Tensor
    rows: Tensor
    gradient_weight: Tensor
    values: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    counted: Tensor | None = None


def owns_denominator(method: TokenWeighter, normalize: Normalize) -> bool:
    """Whether the loss is divided by something other than the number of labels, known once the step is over."""
    return normalize == "mean" or method.reduction != "token_mean"


def shifted(values: Tensor, fill: float) -> Tensor:
    """Values [batch, tokens] that speak of label t, moved to the position t - 1 that predicts it."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=fill)


class WeightedForward:
    """Computes the loss of `model` under `method`.

    Attributes:
        step: optimizer steps finished.
        whole_step: whether each micro-batch is a whole optimizer step by itself, so that its denominator is final.
        pending: the method's own denominator gathered since the step began; losses were divided by the number of
            labels meanwhile, and the gradients are corrected before the optimizer step. None when there is nothing
            to correct.
        scored: filled instead of training while it is a list: the tokens of each micro-batch of a step.
        items: labels of the whole optimizer step over all processes, for a trainer that divides by them itself
            instead of passing them to the model.
        observe: called with every `Weighed` that trains.
        normalize: ``mean`` divides by the sum of the weights, whatever the method's reduction divides by.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: TokenWeighter,
        state: State | None,
        reference: Reference | None = None,
        low_memory: bool = False,
        normalize: Normalize = "none",
    ):
        self.model = model
        self.method = method
        self.state = state
        self.reference = reference
        self.low_memory = low_memory
        self.normalize = normalize
        self.owns_denominator = owns_denominator(method, normalize)
        self.step = 0
        self.whole_step = False
        self.items: Tensor | int | None = None
        self.pending: Tensor | None = None
        self.scored: list[TokenBatch] | None = None
        self.observe: Callable[[Weighed], None] | None = None

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        token_weights: Tensor | None = None,
        fused_lm_head: bool = False,
        **inputs: Any,
    ) -> Any:
        """The model's output with the weighted loss and no logits.

        Args:
            labels: [batch, tokens]; or `shift_labels`, moved already.
            num_items_in_batch: labels of the whole optimizer step over all processes; of this batch unless given.
            token_weights: weights decided beforehand for the labels of this batch, [labels].
            fused_lm_head: whether TRL calls, which makes its loss from the log-probabilities in a
                FusedCausalLMOutput and divides it by the number of labels itself.
            inputs: the backbone's inputs, and any of `COLUMNS`.
        """
        columns = {name: shifted(inputs.pop(name), 0) for name in COLUMNS if name in inputs}
        targets = shift_labels if labels is None else shifted(labels, IGNORED)
        assert targets is not None
        if "prompt_attention" in self.method.reads and token_weights is None:
            unlabelled = None if labels is None else labels.eq(IGNORED)
            outputs, columns["prompt_attention"] = self.run_with_prompt_attention(targets, unlabelled, args, inputs)
        else:
            outputs = run_backbone(self.model, *args, **inputs)
        hidden = outputs.last_hidden_state
        if self.scored is not None:
            batch, rows = self._batch(targets, columns, args, inputs)
            self._score(hidden, batch, rows)
            self.scored.append(batch)
            return CausalLMOutputWithPast(loss=hidden.new_zeros(()))
        result = self.weigh(hidden, targets, columns, args, inputs, token_weights, metrics=fused_lm_head)
        if self.observe is not None:
            self.observe(result)
        divisor = result.denominator
        if fused_lm_head:
            num_items_in_batch = self.items
        if num_items_in_batch is not None and not (self.whole_step and self.owns_denominator):
            divisor = torch.as_tensor(num_items_in_batch).to(result.total)
            if self.owns_denominator:
                self.pending = result.denominator + (0 if self.pending is None else self.pending)
        divisor = divisor.where(divisor != 0, 1.0)
        if fused_lm_head:
            count = result.labels if num_items_in_batch is None else num_items_in_batch
            aux_loss = load_balancing_loss(self.model, outputs, inputs)
            return fused_output(result, targets, count / divisor, labels is None, aux_loss)
        return CausalLMOutputWithPast(loss=cast(Any, result.total / divisor))

    def run_with_prompt_attention(
        self, targets: Tensor, unlabelled: Tensor | None, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """The backbone's outputs, and how much each label's own position attends to unlabelled ones, shifted too.

        Args:
            unlabelled: tokens that have no label of their own, [batch, tokens]; made from `targets` where None, which
                counts the first token of a row as unlabelled.
        """
        labelled = targets.ne(IGNORED)
        if labelled[:, -1].any():
            raise InputError(
                Problem(
                    "shift_labels",
                    "has labels in its last column, whose tokens the model does not read.",
                    "Give labels that are not shifted; attention needs each label's own position.",
                )
            )
        at_label = labelled.roll(1, dims=1)
        counted = ~at_label if unlabelled is None else unlabelled
        sequences = sequence_ids(targets, inputs.get("position_ids"))
        with attention_to(self.model, at_label, counted, sequences, inputs.get("attention_mask")) as mass:
            outputs = run_backbone(self.model, *args, **inputs)
        return outputs, shifted(mass, 0)

    def weigh(
        self,
        hidden: Tensor,
        targets: Tensor,
        columns: dict[str, Tensor],
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        token_weights: Tensor | None = None,
        metrics: bool = False,
    ) -> Weighed:
        """The weighted sum and the denominator of one micro-batch; targets and columns are shifted already.

        With `metrics` also the entropy of each label's distribution and whether the label is the most likely token:
        of every label where the weights are made from what the model predicts, of those whose weight is not zero
        where the data alone decides, since the others cost nothing then.
        """
        # Weights decided beforehand have had the reference run for them already.
        batch, rows = self._batch(targets, columns, args, inputs, filled=token_weights is None)
        method = self.method
        weights: Tensor | Pointwise
        scored = None
        wanted: Metrics = "all" if metrics else "none"
        if token_weights is not None:
            weights = token_weights.to(hidden.device)
        elif isinstance(method, PointwiseWeighter):
            weights = method.pointwise
        else:
            scored = self._score(hidden, batch, rows, metrics)
            weights = self.decide(batch)
            if metrics:
                wanted = "trained" if scored is None else "none"
        per_sequence = None
        if method.reduction == "sequence_mean":
            per_sequence = 1 / torch.bincount(batch.sequence, minlength=batch.sequences).float()
            if isinstance(weights, Tensor):
                weights = weights * per_sequence[batch.sequence]
            else:
                weights = _scaled(weights, per_sequence)
        summed = weighted_sum(
            hidden.reshape(-1, hidden.shape[-1]),
            output_head(self.model),
            rows,
            batch,
            weights,
            reads=method.reads,
            metrics=wanted,
            low_memory=self.low_memory,
        )
        count = rows.shape[0]
        gradient_weight = summed.weights.abs().sum()
        if self.normalize == "mean":
            denominator = gradient_weight
        elif method.reduction == "weight_mean":
            denominator = summed.weights.sum()
        elif method.reduction == "nonzero_mean":
            denominator = summed.weights.count_nonzero()
        else:
            denominator = torch.tensor(count if method.reduction == "token_mean" else batch.sequences)
        factors = summed.weights if per_sequence is None else summed.weights / per_sequence[batch.sequence]
        nll = summed.nll if batch.nll is None else batch.nll
        seen = summed if scored is None else scored
        return Weighed(
            summed.total,
            denominator.to(summed.total),
            count,
            factors,
            nll,
            rows,
            gradient_weight,
            summed.values,
            seen.entropy,
            seen.is_top1,
            counted=summed.weights != 0 if wanted == "trained" else None,
        )

    def decide(self, batch: TokenBatch) -> Tensor:
        """The method's weights of these tokens, checked for their shape: [tokens]."""
        weights = self.method.weights(batch, self.state)
        if weights.shape != batch.labels.shape:
            name = type(self.method).__name__
            raise InputError(
                Problem(
                    f"{name}.weights",
                    f"gave shape {tuple(weights.shape)} for {batch.labels.shape[0]} tokens.",
                    "Return one weight for each token of the batch.",
                )
            )
        return weights.detach()

    def _batch(
        self,
        targets: Tensor,
        columns: dict[str, Tensor],
        args: tuple[Any, ...],
        inputs: dict[str, Any],
        filled: bool = True,
    ) -> tuple[TokenBatch, Tensor]:
        """The labelled tokens and their rows; `filled` with the columns and reference losses the method reads."""
        labels = targets.reshape(-1)
        rows = labels.ne(IGNORED).nonzero().squeeze(1)
        ids = sequence_ids(targets, inputs.get("position_ids")).reshape(-1)[rows]
        names, sequence = torch.unique(ids, return_inverse=True)
        batch = TokenBatch(labels[rows], sequence, names.shape[0], self.step)
        for name in self.method.reads & {*COLUMNS, "prompt_attention"} if filled else ():
            if name in columns:
                values = columns[name].reshape(-1)[rows]
                setattr(batch, name, values.long() if name in _WHOLE_NUMBERS else values.float())
            elif name == "reference_nll" and self.reference is not None:
                batch.reference_nll = self.reference.nll(rows, batch.labels, *args, **inputs)
            else:
                raise InputError(
                    Problem(
                        name,
                        f"{type(self.method).__name__} reads the column {name!r}, which the batch does not have.",
                        "Give it with the batch, shaped and aligned like labels.",
                    )
                )
        return batch, rows

    def _score(self, hidden: Tensor, batch: TokenBatch, rows: Tensor, metrics: bool = False) -> TokenStatistics | None:
        """One pass over the head, none over the backbone, for the statistics that the weights are made from.

        None where the weights need no such pass.
        """
        if not STATISTICS & self.method.reads:
            return None
        found = token_statistics(
            hidden.detach().reshape(-1, hidden.shape[-1]),
            output_head(self.model),
            batch.labels,
            rows=rows,
            reads=self.method.reads | {"entropy", "is_top1"} if metrics else self.method.reads,
            low_memory=self.low_memory,
        )
        batch.nll, batch.top_entropy = found.nll, found.top_entropy
        batch.entropy = found.entropy if "entropy" in self.method.reads else None
        return found


def _scaled(pointwise: Pointwise, per_sequence: Tensor) -> Pointwise:
    def scaled(batch: TokenBatch) -> tuple[Tensor, Tensor]:
        value, slope = pointwise(batch)
        factor = per_sequence[batch.sequence]
        return value * factor, slope * factor

    return scaled


def sequence_ids(targets: Tensor, position_ids: Tensor | None) -> Tensor:
    """A different number for each sequence, rising along the flattened batch: [batch, tokens].

    A row is one sequence, unless positions say that several were packed into it: each time they do not count up.
    """
    rows, length = targets.shape
    row = torch.arange(rows, device=targets.device).unsqueeze(1) * length
    if position_ids is None or position_ids.dim() != 2:
        return row.expand(rows, length)
    starts = torch.nn.functional.pad(position_ids.diff(dim=1) <= 0, (1, 0)).expand(rows, length)
    return row + starts.cumsum(1)
