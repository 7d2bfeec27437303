"""Image tokens by the attention of the words that speak of the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.reduction.staged import StagedReducer, mean_row, places_of

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.reduction.base import DecoderTokens, Stay
    from tokenwise.reduction.merge import Merge


class SparseVLM(StagedReducer):
    """Keeps, at three places in the language model, fewer image tokens each time: those that the words most akin to the
    image attend to; the best of the others are clustered, and each cluster leaves its mean."""

    card: ClassVar[Card] = Card(
        id="reduction/sparse_vlm",
        paper=Paper(
            title="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
            arxiv="2410.04417",
            venue="ICML 2025",
        ),
        needs=("a vision-language model",),
        status="VERIFIED",
        checked="clusters of the official code without its noise, the eager attention map, and the dense model with "
        "the dropped tokens masked; tokens keep their positions and a cluster stands at its centre's, where the "
        "official code numbers them anew",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    merges: ClassVar[bool] = True
    paper_ratios: ClassVar[tuple[float, ...]] = (300 / 576, 200 / 576, 110 / 576)

    places: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (3 / 32, 7 / 32, 16 / 32)
    """Where in the depth tokens are dropped, as shares of it: behind layers 2, 6 and 15 of 32, counted from 0."""
    recycle: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the dropped tokens that goes into clusters, of ten tokens each; the clusters count among what stays.
    0 for none."""

    def starts(self, layers: int) -> list[int]:
        return places_of(self.places, layers)

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        return {"attention": tuple(sorted({start - 1 for start in self.starts(layers)}))}

    def start(self, tokens: DecoderTokens) -> None:
        tokens.memory["raters"] = text_raters(tokens.hidden, tokens.candidates, tokens.following())

    def see_attention(self, tokens: DecoderTokens, call: AttentionCall) -> None:
        tokens.memory["rated"] = mean_row(call, tokens.memory["raters"])

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.memory["rated"]

    def choose(self, tokens: DecoderTokens, counts: Tensor) -> Stay:
        import torch

        from tokenwise.reduction.base import Stay

        if not self.recycle:
            return super().choose(tokens, counts)
        stays, hidden = torch.zeros_like(tokens.candidates), []
        for row, count in enumerate(counts.tolist()):
            places = tokens.candidates[row].nonzero()[:, 0]
            own = tokens.hidden[row]
            if count < len(places):
                values = own[places].unsqueeze(0)
                change = self.recycled(values[0], self.score(tokens)[row, places], count)
                places = places[change.kept[0]]
                size = torch.ones(values.shape[:2], device=values.device)
                own = own.index_copy(0, places, change.apply(values, size)[0])
            stays[row, places] = True
            hidden.append(own)
        return Stay(stays, torch.stack(hidden))

    def recycled(self, values: Tensor, score: Tensor, count: int) -> Merge:
        """What becomes of one row's image tokens ([tokens, channels], [tokens]) so that `count` are left."""
        import torch

        from tokenwise.policies.density_peaks import density_peaks
        from tokenwise.reduction.merge import Merge

        def clusters(kept: int) -> int:
            return int((int((len(score) - kept) * self.recycle) + 1) / 10) + 1

        # One kept token more is at most one cluster less, so that a sum of exactly `count` is always met.
        best = max((kept for kept in range(count) if kept + clusters(kept) <= count), default=0)
        order = score.argsort(descending=True, stable=True)
        again = order[best:][: max(int((len(score) - best) * self.recycle) + 1, count - best)]
        centres, cluster = density_peaks(values[again].detach(), count - best, count - best)
        kept, rank = torch.cat([order[:best], again[centres]]).sort()
        place = rank.argsort()
        target = torch.full_like(order, -1)
        target[order[:best]] = place[:best]
        target[again] = place[best:][cluster]
        return Merge(kept.unsqueeze(0), target.unsqueeze(0))


def text_raters(hidden: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """The words that an image's tokens are akin to more than to the mean word.

    Args:
        hidden: the embeddings, [batch, tokens, channels].
        image: which are the image's, [batch, tokens], bool.
        text: which are words to choose from, [batch, tokens], bool.

    Returns:
        [batch, tokens], bool; all words of a row without an image, or where none stands out.
    """
    import torch

    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    raters = text.clone()
    for row, states in enumerate(hidden):
        if not bool(image[row].any()):
            continue
        words = text[row].nonzero()[:, 0]
        akin = (states[image[row]] @ states[words].T).softmax(1).mean(0)
        chosen = akin > akin.mean()
        if bool(chosen.any()):
            raters[row, words] = chosen
    return raters
