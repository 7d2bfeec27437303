"""How easily what a reduction keeps is changed: by noise, and by somebody who wants to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.encoders import find_encoder
from tokenwise.models.vision_language import vision_language_model
from tokenwise.policies.agreement import jaccard, kendall_tau
from tokenwise.reduction.base import EncoderReducer, InputReducer, LayerTokens, TokenReducer
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.inputs import prune
from tokenwise.signals.attention import with_gradient
from tokenwise.signals.head import IGNORED


@dataclass(frozen=True)
class RankStability:
    """What noise of one strength changes.

    Args:
        noise: standard deviation of the noise, in units of the pixel values.
        jaccard: of the tokens kept with and without noise, in [0, 1], as a mean over images and draws.
        tau: Kendall's tau of the scores with and without noise, in [-1, 1]; None for a method that ranks no tokens.
        by_image: the Jaccard index of each image, as a mean over draws.
    """

    noise: float
    jaccard: float
    tau: float | None
    by_image: tuple[float, ...]


@dataclass(frozen=True)
class AttackReport:
    """Shares of right answers, in [0, 1], without and with an attack on what the reduction keeps.

    Args:
        dense: of the model with all tokens.
        reduced: of the model with fewer.
        dense_noise: as `dense`, under random signs times epsilon: what a change of that size does by itself.
        reduced_noise: as `reduced`, under the same.
        dense_attacked: as `dense`, under attack; the attack tries to leave these answers as they are.
        reduced_attacked: as `reduced`, under attack.
        jaccard: of the tokens kept with and without attack, as a mean over images.
        pixel_values: what the attack made of the images.
    """

    dense: float
    reduced: float
    dense_noise: float
    reduced_noise: float
    dense_attacked: float
    reduced_attacked: float
    jaccard: float
    pixel_values: Tensor


@torch.no_grad()
def rank_stability(
    model: nn.Module,
    batch: Mapping[str, Any],
    method: TokenReducer,
    *,
    noise: Sequence[float] = (0.01, 0.03, 0.1),
    draws: int = 4,
    seed: int = 0,
) -> list[RankStability]:
    """How stable the kept tokens are when the pixels change a little.

    Gaussian noise is added to the images, and the tokens kept then are compared with those kept before. For methods
    that merge, the kept tokens are those whose places stay. Scores are those of the first block that takes tokens
    out.

    Args:
        model: an image classifier or vision tower for methods inside encoders, a vision-language model for methods
            at the input; in evaluation mode.
        batch: its inputs, with `pixel_values`.
        method: the method.
        noise: standard deviations, in units of the pixel values.
        draws: how often noise is drawn for each of them.
        seed: of the draws; all strengths share their directions.

    Returns:
        One entry for each of `noise`.

    Raises:
        InputError: when the batch has no images, the model is in training mode or does not suit the method.
    """
    subject = _Subject(model, batch, method)
    pixels = subject.pixels
    clean = subject.choose(pixels)
    found: list[list[list[float]]] = [[] for _ in noise]
    taus: list[list[float]] = [[] for _ in noise]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        direction = torch.randn(pixels.shape, generator=generator).to(pixels)
        for level, strength in enumerate(noise):
            noisy = subject.choose(pixels + strength * direction)
            found[level].append([jaccard(*pair) for pair in zip(clean.kept, noisy.kept, strict=True)])
            if clean.scores is not None and noisy.scores is not None:
                pairs = zip(clean.scores, noisy.scores, strict=True)
                taus[level] += [
                    kendall_tau(first[first.isfinite()], second[first.isfinite()]) for first, second in pairs
                ]
    made = []
    for strength, each, tau in zip(noise, found, taus, strict=True):
        by_image = torch.tensor(each, dtype=torch.float64).mean(0)
        mean_tau = sum(tau) / len(tau) if tau else None
        made.append(RankStability(strength, float(by_image.mean()), mean_tau, tuple(by_image.tolist())))
    return made


def compression_aware_attack(
    model: nn.Module,
    batch: Mapping[str, Any],
    method: TokenReducer,
    *,
    epsilon: float = 0.03,
    steps: int = 20,
    rank_weight: float = 1.0,
    dense_weight: float = 1.0,
    seed: int = 0,
) -> AttackReport:
    """Change the pixels by at most `epsilon` so that the reduced model fails where the dense one does not.

    Reconstructed after the idea of "Less Is More -- Until It Breaks" (arXiv 2601.12042), whose formulas we have not
    seen: the objective is ours. Projected gradient ascent by signs, from zero and with steps of
    ``2.5 * epsilon / steps``, on the loss of the reduced model, less `dense_weight` times that of the dense one, less
    `rank_weight` times how far the tokens that it kept at first are ranked above the others (`rank_gap`; nothing for
    methods that rank no tokens). Pixels stay within the range of the batch's.

    Args:
        model: an image classifier for methods inside encoders, a vision-language model for methods at the input; in
            evaluation mode. Its parameters get no gradients.
        batch: its inputs, with `pixel_values` and `labels`: a class for each image, or the answer's tokens, where an
            answer is right if the model finds each of its tokens likeliest.
        method: the method.
        epsilon: largest change of a pixel, in units of the pixel values.
        steps: how many steps.
        rank_weight: weight of the ranking.
        dense_weight: weight of the dense model's loss.
        seed: of the noise that the attack is compared with.

    Raises:
        InputError: when the batch has no images or labels, the model is in training mode or does not suit the method.
    """
    subject = _Subject(model, batch, method)
    if batch.get("labels") is None:
        raise InputError(Problem("batch.labels", "is missing.", "Give the answers that an attack is to change."))
    pixels = subject.pixels
    low, high = pixels.min(), pixels.max()
    signs = torch.randint(0, 2, pixels.shape, generator=torch.Generator().manual_seed(seed)).to(pixels) * 2 - 1
    with torch.no_grad():
        clean = subject.choose(pixels)
        noisy = (pixels + epsilon * signs).clamp(low, high)
        shares = [subject.share(images) for images in (pixels, noisy)]
    attacked = pixels.clone()
    for _ in range(steps):
        attacked.requires_grad_()
        with torch.enable_grad(), with_gradient():
            objective = (
                subject.loss(attacked, reduced=True)[0] - dense_weight * subject.loss(attacked, reduced=False)[0]
            )
            chosen = subject.last
            if chosen is not None and chosen.scores is not None:
                gaps = [rank_gap(*pair) for pair in zip(chosen.scores, clean.kept, strict=True)]
                objective = objective - rank_weight * torch.stack(gaps).sum()
            [gradient] = torch.autograd.grad(objective, attacked)
        moved = attacked.detach() + 2.5 * epsilon / steps * gradient.sign()
        attacked = torch.minimum(torch.maximum(moved, pixels - epsilon), pixels + epsilon).clamp(low, high)
    with torch.no_grad():
        shares.append(subject.share(attacked))
        kept = subject.choose(attacked).kept
    common = [jaccard(*pair) for pair in zip(clean.kept, kept, strict=True)]
    (dense, reduced), (dense_noise, reduced_noise), (dense_attacked, reduced_attacked) = shares
    return AttackReport(
        dense,
        reduced,
        dense_noise,
        reduced_noise,
        dense_attacked,
        reduced_attacked,
        sum(common) / len(common),
        attacked,
    )


def rank_gap(score: Tensor, kept: Tensor) -> Tensor:
    """How far the scores of some tokens are above those of the others, in standard deviations of all; differentiable.

    Args:
        score: [tokens]; those that are not finite do not count.
        kept: indices of some of them, [kept].

    Returns:
        The difference of the two means; 0 where one of them would be over nothing.
    """
    counted = score.isfinite()
    chosen = torch.zeros_like(counted).index_fill(0, kept, True)
    above, below = score[counted & chosen], score[counted & ~chosen]
    if not above.numel() or not below.numel():
        return score.new_zeros(())
    spread = score[counted].detach().std().clamp_min(torch.finfo(score.dtype).tiny)
    return (above.mean() - below.mean()) / spread


@dataclass
class _Choice:
    """What a method kept of each image, as indices of its tokens, and by which scores."""

    kept: list[Tensor]
    scores: list[Tensor] | None


class _Subject:
    """A model, its batch and a method: what all evaluations here ask of the three."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], method: TokenReducer):
        if not isinstance(method, EncoderReducer | InputReducer):
            raise InputError(
                Problem("method", f"{method!r} works at no site known here.", "Give one of the site encoder or input.")
            )
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, Tensor):
            raise InputError(Problem("batch.pixel_values", "is missing.", "Give images as the model reads them."))
        if model.training:
            raise InputError(Problem("model", "is in training mode, which draws by chance.", "Call model.eval()."))
        self.model, self.method = model, method
        self.pixels = pixels.detach()
        self.labels: Tensor | None = batch.get("labels")
        self.rest = {name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}
        self.last: _Choice | None = None
        self.layout = vision_language_model(model) if isinstance(method, InputReducer) else None
        if self.layout is None:
            find_encoder(model)

    def choose(self, pixels: Tensor) -> _Choice:
        """What is kept of these images."""
        self._reduced(pixels, None)
        assert self.last is not None
        return self.last

    def loss(self, pixels: Tensor, reduced: bool) -> tuple[Tensor, Tensor]:
        """The loss summed over the batch, and which of its answers are right, [batch], bool."""
        assert self.labels is not None
        if reduced:
            logits, labels = self._reduced(pixels, self.labels)
        else:
            logits, labels = self.model(**self.rest, pixel_values=pixels).logits, self.labels
        if labels.dim() == 1:
            return nn.functional.cross_entropy(logits, labels, reduction="sum"), logits.argmax(1) == labels
        logits, labels = logits[:, :-1], labels[:, 1:]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        counted = labels != IGNORED
        right = ((logits.argmax(2) == labels) | ~counted).all(1)
        return (each.sum(1) / counted.sum(1).clamp_min(1)).sum(), right

    def share(self, pixels: Tensor) -> tuple[float, float]:
        """The share of right answers of the dense and of the reduced model."""
        dense, reduced = (float(self.loss(pixels, each)[1].double().mean()) for each in (False, True))
        return dense, reduced

    def _reduced(self, pixels: Tensor, labels: Tensor | None) -> tuple[Any, Any]:
        """The reduced model's logits and the labels that belong to them; without labels, only the choice is made."""
        if self.layout is not None:
            assert isinstance(self.method, InputReducer)
            inputs = {**self.rest, "pixel_values": pixels} | ({} if labels is None else {"labels": labels})
            found = prune(self.layout, inputs, self.method)
            scores = [self.method.score(image) for image in found.images]
            known = [score for score in scores if score is not None]
            self.last = _Choice(found.kept, known if len(known) == len(scores) else None)
            if labels is None:
                return None, None
            made = dict(found.batch)
            labels = made.pop("labels")
            return self.model(**made).logits, labels
        assert isinstance(self.method, EncoderReducer)
        method = self.method
        seen: list[Tensor | None] = []

        def watch(tokens: LayerTokens) -> None:
            if not seen:
                seen.append(method.score(tokens))

        handle = EncoderReduction(find_encoder(self.model), method, model=self.model)
        handle.watch = watch
        with handle:
            output = self.model(**self.rest, pixel_values=pixels)
            prefix, passed = handle.encoder.prefix, handle.last
        assert passed is not None
        kept = [positions[positions >= prefix] for positions in passed.positions]
        self.last = _Choice(kept, list(seen[0]) if seen and seen[0] is not None else None)
        return getattr(output, "logits", None), labels
