"""Clusters of patches as rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import InputReducer

if TYPE_CHECKING:
    from tokenwise.models.vision_language import EncodedImage
    from tokenwise.reduction.merge import Merge


class VQToken(InputReducer):
    """Clusters patches by direction and keeps the mean of each cluster, in the place of the patch nearest to it."""

    card: ClassVar[Card] = Card(
        id="reduction/vq_token",
        paper=Paper(
            title="VQToken: Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large "
            "Language Models",
            arxiv="2503.16980",
            venue="NeurIPS 2025",
        ),
        status="RECONSTRUCTION",
        checked="a short reference of k-means; means of the features instead of the features' directions, for the "
        "paper's trained attention over where clusters lie is left out, as is its choice of their number",
        control="reduction/random",
    )
    merges: ClassVar[bool] = True

    keep: Keep = 0.1
    """What stays of each image's rows."""
    iterations: Annotated[int, Field(ge=1)] = 50
    """Rounds of k-means, at most."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first centres; the same for every image."""

    def select(self, image: EncodedImage, count: int) -> Merge:
        import torch

        from tokenwise.policies.clustering import cluster_directions
        from tokenwise.reduction.merge import Merge
        from tokenwise.reduction.patches import patches, room, together

        rows = patches(image)
        features = image.features[rows].detach()
        cluster, nearest = cluster_directions(features, room(image, count), self.seed, self.iterations)
        place = rows[nearest][cluster]
        kept = together(image, rows[nearest])
        target = torch.arange(len(image.patch), device=rows.device).index_copy(0, rows, place)
        return Merge(kept, torch.searchsorted(kept[0], target).unsqueeze(0))
