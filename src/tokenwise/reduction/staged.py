"""What the methods share that take tokens out of a decoder at a few of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.errors import InputError, Problem
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import DecoderReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.policies.plans import Shape

Share = Annotated[float, Field(gt=0, le=1)]


class StagedReducer(DecoderReducer):
    """Keeps a smaller share of the candidates from each of a few layers on."""

    paper_ratios: ClassVar[tuple[float, ...]] = ()
    """The shares that the paper has."""

    keep: Keep = 0.5
    """What stays: share of image token x layer; or ``"N tokens"``, a mean over the layers; or ``"X flops"``, a share of
    the operations of all layers. The shares of the paper are raised to one power to meet it."""
    ratios: tuple[Share, ...] | None = None
    """Share of the image tokens that stay from each of the places on, of their first number; instead of `keep`."""

    def starts(self, layers: int) -> list[int]:
        """The layer before which each stage begins, from 1."""
        raise NotImplementedError

    def shares(self, layers: int) -> tuple[float, ...]:
        """The shares that the paper has from there on."""
        return self.paper_ratios

    def planned(self, candidates: int, shape: Shape) -> list[int]:
        return self.counts(candidates, shape.layers) if self.ratios is not None else super().planned(candidates, shape)

    def counts(self, candidates: int, layers: int) -> list[int]:
        from tokenwise.policies.plans import fit_stages, tokens_in_stages

        starts, name = self.starts(layers), type(self).__name__
        ratios = self.shares(layers) if self.ratios is None else self.ratios
        if len(ratios) != len(starts):
            raise InputError(
                Problem(f"{name}.ratios", f"has {len(ratios)} shares for {len(starts)} places.", "Give one for each.")
            )
        if self.ratios is not None:
            return tokens_in_stages(candidates, layers, starts, ratios)
        found = fit_stages(candidates, layers, starts, ratios, self.keep)
        if found is None:
            first = min(starts)
            message = f"{self.keep!r} is less than what the layers take in which all stay, {first} of {layers}."
            earlier = {"layer": "a smaller layer", "places": "smaller places"}
            places = next((words for each, words in earlier.items() if each in type(self).model_fields), None)
            fix = f"Keep more than {first / layers:.2f} of the tokens"
            fix += "." if places is None else f", or let them go earlier, with {places}."
            raise InputError(Problem(f"{name}.keep", message, fix))
        return found


def places_of(places: tuple[float, ...], layers: int) -> list[int]:
    """Layers at shares of the depth, from 1."""
    return [min(max(int(place * layers + 0.5), 1), layers - 1) for place in places]


def mean_row(call: AttentionCall, queries: Tensor) -> Tensor:
    """The attention of some queries, as a mean over heads and over them.

    Args:
        call: of an attention of as many queries as keys.
        queries: [batch, tokens], bool, in each row at least one.

    Returns:
        [batch, tokens], fp32.
    """
    places = queries.long().argsort(dim=1, descending=True, stable=True)[:, : int(queries.sum(1).max())]
    rows = call.rows(places).mean(1)
    counted = queries.gather(1, places).to(rows.dtype).unsqueeze(2)
    made: Tensor = (rows * counted).sum(1) / counted.sum(1)
    return made
