"""The kinds of token reducers, and what they get to see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator

from tokenwise.errors import InputError, Problem
from tokenwise.method import Method
from tokenwise.policies.budget import Keep, kept_count, parse_flops
from tokenwise.reduction.plan import PLAN_RANGE, PlanFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.models.vision_language import EncodedImage, Signal
    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge, Mixture

Place = Literal["between", "after"]
"""Where tokens leave a block: between its attention and its feed-forward layer, or after both."""


class TokenReducer(Method):
    """Makes fewer tokens of many, so that the model computes less."""

    family: ClassVar[str] = "reduction"
    traits: ClassVar[tuple[str, ...]] = ("site", "reads", "merges")
    site: ClassVar[Literal["encoder", "input", "decoder"]]
    """Where: in the blocks of an encoder, at the input of a language model, or in its layers."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """What the method looks at: ``attention`` (queries, keys, values), ``class_token`` (there must be one),
    ``projector`` (one that reads each patch by itself)."""
    merges: ClassVar[bool] = False
    """Whether tokens that go leave something behind in those that stay."""

    keep: Keep = 0.5
    """What stays of the tokens."""


@dataclass
class LayerTokens:
    """The tokens of a batch at one place of one block.

    Args:
        hidden: [batch, tokens, channels].
        size: how many of the first tokens each one stands for, [batch, tokens], fp32.
        layer: index of the block, from 0.
        layers: how many blocks there are.
        prefix: how many of the tokens, at the beginning, are protected.
        has_class_token: whether the first token gathers the whole input.
        attention: the attention of this block; None unless the method reads it.
        positions: where each token stood at the beginning, [batch, tokens], int64.
        padding: tokens that are padding, [batch, tokens], bool; None where there is none. Those of size 0 fill up rows
            of which others kept more.
        memory: what the method keeps from block to block, each [batch, tokens, ...]; follows the tokens that stay.
    """

    hidden: Tensor
    size: Tensor
    layer: int
    layers: int
    prefix: int
    has_class_token: bool
    positions: Tensor
    attention: AttentionCall | None = None
    padding: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def keys(self) -> Tensor:
        """The keys as a mean over heads, [batch, tokens, head_dim]."""
        assert self.attention is not None
        return self.attention.key.mean(1)

    def class_row(self) -> Tensor:
        """The attention of the class token, as a mean over heads, [batch, tokens], fp32."""
        import torch

        assert self.attention is not None
        return self.attention.rows(torch.zeros(1, dtype=torch.long, device=self.hidden.device)).mean(1)[:, 0]

    def columns(self) -> Tensor:
        """The attention each token receives, as a mean over heads and queries, [batch, tokens], fp32."""
        assert self.attention is not None
        return self.attention.columns(None if self.padding is None else ~self.padding).mean(1)

    def protected(self) -> torch.Tensor:
        """Which tokens must not be merged with others, [batch, tokens], bool: the prefix and padding."""
        import torch

        first = torch.arange(self.hidden.shape[1], device=self.hidden.device) < self.prefix
        first = first.expand(self.hidden.shape[:2])
        return first if self.padding is None else first | self.padding

    def ranked(self, scores: Tensor) -> Tensor:
        """`scores` ([batch, tokens]) with the prefix above and padding below everything, so that it goes first."""
        import torch

        scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) < self.prefix, float("inf"))
        return scores if self.padding is None else scores.masked_fill(self.padding, float("-inf"))


def _keep_or_flops(value: Any, check: ValidatorFunctionWrapHandler) -> float | str:
    found: float | str = parse_flops(value) or check(value)
    return found


class EncoderReducer(TokenReducer):
    """Takes tokens out of the blocks of an encoder.

    A subclass says how many tokens there are after each block (`counts`), and which (`reduce`).
    """

    site: ClassVar[Literal["encoder", "input", "decoder"]] = "encoder"
    place: ClassVar[Place] = "between"
    proportional: ClassVar[bool] = False
    """Whether attention counts a merged token as often as the tokens it stands for."""
    ragged: ClassVar[bool] = False
    """Whether the images of a batch may be left with different numbers of tokens."""
    halving: ClassVar[bool] = False
    """Whether a block can take out half of its unprotected tokens at most."""
    sees_every_block: ClassVar[bool] = False
    """Whether `decide` is asked at every block, unless the plan takes nothing out of any."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """What the model's call brings for the method, by name, each [batch, tokens, ...]; it arrives in `memory`."""

    plan: Annotated[PlanFile | None, Field(json_schema_extra=PLAN_RANGE)] = None
    """How many tokens stay after each block, instead of `keep`: a `Plan`, or a path to its JSON."""

    @field_validator("keep", mode="wrap")
    @classmethod
    def _share_of_flops(cls, value: Any, check: ValidatorFunctionWrapHandler) -> float | str:
        """Here `keep` may also be a share of the operations."""
        return _keep_or_flops(value, check)

    def planned(self, shape: Shape) -> list[int]:
        """Tokens after each block: the plan's where there is one, else `counts`."""
        return self.counts(shape) if self.plan is None else self.plan.counts_for(shape, self.halving)

    @abstractmethod
    def counts(self, shape: Shape) -> list[int]:
        """Tokens after each block, protected ones included; never rising. Of a method that `sees_every_block` and
        decides by the input: the fewest there may be."""

    def decide(self, tokens: LayerTokens, counts: list[int]) -> int:
        """Tokens that stay after this block, when the method `sees_every_block`.

        The place to note something in ``tokens.memory``, and to keep more than the plan `counts` says.
        """
        return counts[tokens.layer]

    def score(self, tokens: LayerTokens) -> Tensor | None:
        """What `reduce` ranks the tokens of a block by, [batch, tokens], larger stays; None where it ranks none."""
        return None

    @abstractmethod
    def reduce(self, tokens: LayerTokens, count: int) -> Merge | Mixture | None:
        """What becomes of the tokens of one block so that `count` are left; None where all stay.

        A method whose number follows the input may leave more, and different numbers in the rows of a batch
        (`Merge.fills`).
        """


class InputReducer(TokenReducer):
    """Chooses among the features of an image before the language model reads them.

    A subclass names the `signals` of the vision tower it reads, and makes `count` rows of an image's (`select`).
    """

    site: ClassVar[Literal["encoder", "input", "decoder"]] = "input"
    conditioned: ClassVar[bool] = False
    """Whether the choice depends on the text beside the image."""
    before_projector: ClassVar[bool] = False
    """Whether it mixes what the projector reads, where the model has a projector that reads each row by itself;
    elsewhere, and otherwise, it mixes the features."""

    @field_validator("keep", mode="wrap")
    @classmethod
    def _share_of_flops(cls, value: Any, check: ValidatorFunctionWrapHandler) -> float | str:
        """Here `keep` may also be a share of the operations of the language model's layers, the text's included."""
        return _keep_or_flops(value, check)

    def signals(self) -> tuple[Signal, ...]:
        """What is recorded of the vision tower; nothing unless given."""
        return ()

    def counts_of(self, images: list[EncodedImage]) -> list[int]:
        """Rows of each image that stay: the same share, or amount, of each unless given."""
        return [kept_count(self.keep, image.features.shape[0]) for image in images]

    def score(self, image: EncodedImage) -> Tensor | None:
        """What `select` ranks the rows of an image by, [tokens], larger stays; not finite where a row is no patch.
        None where it ranks none."""
        return None

    @abstractmethod
    def select(self, image: EncodedImage, count: int) -> Merge | Mixture:
        """What becomes of one image's rows, as a batch of 1, so that `count` are left, or the next fewer possible."""


@dataclass
class DecoderTokens:
    """The tokens of a batch at one layer of a decoder, while it reads a prompt.

    Args:
        hidden: [batch, tokens, channels].
        layer: index of the layer, from 0.
        layers: how many layers there are.
        positions: where each token stood in the prompt, [batch, tokens], int64.
        real: which are tokens; the others are padding, [batch, tokens], bool.
        candidates: which may go, [batch, tokens], bool.
        next_attention: gives the attention that the layer about to run would compute on these tokens.
        memory: what the method keeps from layer to layer, each [batch, tokens, ...]; follows the tokens that stay.
    """

    hidden: Tensor
    layer: int
    layers: int
    positions: Tensor
    real: Tensor
    candidates: Tensor
    next_attention: Callable[[], AttentionCall]
    memory: dict[str, Tensor] = field(default_factory=dict)

    def last(self) -> Tensor:
        """The place of each row's last token, [batch, 1], int64."""
        return self.real.shape[1] - 1 - self.real.flip(1).long().argmax(1, keepdim=True)

    def following(self) -> Tensor:
        """Which tokens are no candidates and stand behind all of them, [batch, tokens], bool; where none do, all that
        are no candidates."""
        rest = self.real & ~self.candidates
        behind = rest & (self.candidates.flip(1).long().cumsum(1).flip(1) == 0)
        return behind.where(behind.any(1, keepdim=True), rest)


@dataclass
class Stay:
    """Which tokens stay.

    Args:
        candidates: which of the candidates stay, [batch, tokens], bool; what is no candidate stays anyway.
        hidden: what the tokens become, [batch, tokens, channels]; unchanged where None.
    """

    candidates: Tensor
    hidden: Tensor | None = None


class DecoderReducer(TokenReducer):
    """Takes tokens out between the layers of a decoder, while it reads a prompt; they are in no later layer's cache.

    Candidates are the tokens that stand for images; in a model of text alone, all tokens but the first and the last. A
    subclass says how many there are in each layer (`counts`), and how much each matters (`score`) or which stay
    (`choose`). What it looks at on the way comes by `start`, `see_attention`, `see_branch` and `see_neurons`.
    """

    site: ClassVar[Literal["encoder", "input", "decoder"]] = "decoder"
    of_text: ClassVar[bool] = False
    """Whether it also serves models of text alone."""

    @field_validator("keep", mode="wrap")
    @classmethod
    def _share_of_flops(cls, value: Any, check: ValidatorFunctionWrapHandler) -> float | str:
        """Here `keep` may also be a share of the operations of the layers, the text's included."""
        return _keep_or_flops(value, check)

    def planned(self, candidates: int, shape: Shape) -> list[int]:
        """Candidates in each layer when there are so many in a prompt of as many tokens as `shape` says: `counts`;
        where `keep` is a share of the operations, those of the largest share of candidate x layer within it.

        Raises:
            InputError: when the text and the layers in which all tokens are needed take more than that share.
        """
        if not (candidates and isinstance(self.keep, str) and self.keep.endswith("flops")):
            return self.counts(candidates, shape.layers)
        from tokenwise.policies.plans import fit_macs

        def plan(total: int) -> list[int] | None:
            try:
                return self.replace(keep=total / (candidates * shape.layers)).counts(candidates, shape.layers)
            except InputError:
                return None

        found, least = fit_macs(plan, float(self.keep.split()[0]), shape, candidates)
        if found is None:
            field, message = f"{type(self).__name__}.keep", f"{self.keep!r} is less than the share of {least:.3f} that "
            message += f"the text and the layers with all {candidates} candidates take."
            raise InputError(Problem(field, message, "Keep more, or drop in earlier layers."))
        return found

    @abstractmethod
    def counts(self, candidates: int, layers: int) -> list[int]:
        """Candidates in each layer when there are so many at the beginning; never rising."""

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        """The layers whose ``attention``, ``branch`` (attention and feed-forward layer each) or ``neurons`` are
        looked at."""
        return {}

    def start(self, tokens: DecoderTokens) -> None:
        """Look at the embeddings, before the first layer."""

    def see_attention(self, tokens: DecoderTokens, call: AttentionCall) -> None:
        """Look at the attention of a layer."""

    def see_branch(self, tokens: DecoderTokens, before: Tensor, after: Tensor) -> None:
        """Look at what goes into attention or the feed-forward layer and what comes out of it, each [batch, tokens,
        channels]."""

    def see_neurons(self, tokens: DecoderTokens, activation: Tensor) -> None:
        """Look at the neurons of a feed-forward layer, [batch, tokens, neurons]."""

    def score(self, tokens: DecoderTokens) -> Tensor:
        """How much each token matters, [batch, tokens]; only the candidates' are read."""
        raise NotImplementedError

    def choose(self, tokens: DecoderTokens, counts: Tensor) -> Stay:
        """Which candidates stay before a layer: of each row as many as `counts` ([batch], int64) says, those with the
        largest score; of equal ones the first."""
        score = self.score(tokens).masked_fill(~tokens.candidates, float("-inf"))
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        return Stay((rank < counts.unsqueeze(1)) & tokens.candidates)
