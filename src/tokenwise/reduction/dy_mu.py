"""Merging whatever is similar enough: simple images keep few tokens, busy ones many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PrivateAttr, field_validator

from tokenwise.method import Card, Paper
from tokenwise.reduction.base import EncoderReducer, LayerTokens
from tokenwise.reduction.plan import PLAN_RANGE, Plan, PlanFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge


class _Merging(EncoderReducer):
    """Merges tokens at even places into those at odd places that are most like them; which ones, a subclass says."""

    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    proportional: ClassVar[bool] = True
    halving: ClassVar[bool] = True

    def counts(self, shape: Shape) -> list[int]:
        """The fewest that can be left."""
        from tokenwise.policies.plans import counts_after_merging

        return counts_after_merging(shape, [shape.tokens] * shape.layers)

    def planned(self, shape: Shape) -> list[int]:
        if self.plan is not None:
            self.plan.counts_for(shape)
        return self.counts(shape)

    def edges(self, similarity: Tensor, layer: int) -> Tensor:
        """Which of the edges, each with its similarity of at most 1 ([batch, even tokens]), are merged; bool."""
        raise NotImplementedError

    def reduce(self, tokens: LayerTokens, count: int) -> Merge | None:
        import torch

        from tokenwise.policies.matching import bipartite_edges, merge_marked
        from tokenwise.reduction.merge import Merge

        similarity, even_partner = bipartite_edges(tokens.keys(), tokens.protected())
        chosen = self.edges(similarity.clamp_max(1), tokens.layer)
        if not bool(chosen.any()):
            return None
        going = torch.zeros(tokens.hidden.shape[:2], dtype=torch.bool, device=chosen.device)
        going[:, ::2] = chosen
        partner = torch.zeros_like(going, dtype=torch.long)
        partner[:, ::2] = even_partner
        kept, target, empty = merge_marked(going, partner, tokens.size == 0)
        return Merge(kept, target, fills=bool(empty.any()))


class DyMU(_Merging):
    """Merges tokens that are more alike than a threshold of their block, so that simple images keep fewer.

    `calibrate_thresholds` finds the thresholds on samples. A batch's images keep different numbers: places that hold
    nothing are hidden from attention, come out of the last block as NaN, and are marked in ``handle.last.empty``. Where
    a head reads more than the class token, pass one image at a time.
    """

    card: ClassVar[Card] = Card(
        id="reduction/dy_mu",
        paper=Paper(
            title="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs", arxiv="2504.17040", venue=""
        ),
        needs=("a plan with thresholds, from calibrate_thresholds",),
        status="VERIFIED",
        checked="the official thresholds and merges on seeded numbers; its virtual unmerging is virtual_unmerge",
        control="reduction/random_drop",
    )

    plan: PlanFile = Field(json_schema_extra=PLAN_RANGE)
    """The thresholds, as `calibrate_thresholds` makes them: a `Plan`, or a path to its JSON. `keep` is not read."""

    @field_validator("plan")
    @classmethod
    def _calibrated(cls, plan: Plan) -> Plan:
        if plan.thresholds is None:
            raise ValueError("has no thresholds; make it with tokenwise.reduction.calibrate_thresholds")
        return plan

    def edges(self, similarity: Tensor, layer: int) -> Tensor:
        assert self.plan.thresholds is not None
        return similarity > self.plan.thresholds[layer]


class _Calibration(_Merging):
    """Merges the most similar edges of the whole batch, as many as a plan says, and writes down what was left."""

    _found: dict[int, list[float]] = PrivateAttr(default_factory=dict)

    def edges(self, similarity: Tensor, layer: int) -> Tensor:
        import torch

        assert self.plan is not None
        before = (self.plan.tokens, *self.plan.counts)
        flat = similarity.flatten()
        order = flat.argsort(descending=True, stable=True)
        merged = min((before[layer] - before[layer + 1]) * len(similarity), int((flat > float("-inf")).sum()))
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        if merged:
            chosen[order[:merged]] = True
            threshold = max(float(flat[order[min(merged, len(order) - 1)]]), 0.0)
            self._found.setdefault(layer, []).append(threshold)
        return chosen.view_as(similarity)


def calibrate_thresholds(model: nn.Module, batches: Iterable[Mapping[str, Any]], plan: Plan) -> Plan:
    """The thresholds that merge, on samples like these, as many tokens as a plan says.

    In each batch and block the most similar edges of all images together are merged; the threshold is the mean over
    the batches of the similarity of the first edge that was left, at least 0. Larger batches give better ones.

    Args:
        model: with an encoder of a known layout, in evaluation mode.
        batches: samples as the model takes them: ``model(**batch)``.
        plan: how many tokens to leave after each block on average, as `allocate` makes it.

    Returns:
        The same plan with thresholds, for `DyMU`; 1 in blocks where the plan merges nothing.

    Raises:
        InputError: when there is no batch, or the plan was made for another shape.
    """
    import torch

    from tokenwise.errors import InputError, Problem
    from tokenwise.models.encoders import find_encoder
    from tokenwise.reduction.encoder import EncoderReduction

    calibration = _Calibration(plan=plan)
    passes = 0
    # Hidden rather than taken out, so that images of different numbers need no class token.
    with EncoderReduction(find_encoder(model), calibration, masked=True), torch.no_grad():
        for batch in batches:
            model(**batch)
            passes += 1
    if not passes:
        raise InputError(Problem("batches", "are empty.", "Give a few samples."))
    found = calibration._found
    thresholds = [sum(found[layer]) / len(found[layer]) if layer in found else 1.0 for layer in range(len(plan.counts))]
    return Plan(**{**plan.model_dump(), "thresholds": thresholds})
