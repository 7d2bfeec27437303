"""Objectives: losses that are sums of terms, each over its own tokens and with its own denominator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenwise.errors import InputError, Problem
from tokenwise.method import Method
from tokenwise.models.frozen import FrozenStates
from tokenwise.models.head import last_hidden, output_head
from tokenwise.signals.head import IGNORED, token_statistics
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.forward import COLUMNS, sequence_ids, shifted
from tokenwise.weighting.logit_objective import Likeliest, LogitObjective, States, logit_sum
from tokenwise.weighting.loss import Pointwise, weighted_sum
from tokenwise.weighting.weighing import Weighing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenwise.scores import StoredReference


@dataclass
class StoredBatch:
    """What a store of token scores has of one batch.

    Args:
        reference: the store.
        args, inputs: the backbone's inputs.
    """

    reference: StoredReference
    args: tuple[Any, ...]
    inputs: dict[str, Any]

    def losses(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Losses of the labels at `rows` of the flattened batch, in nats: [labels]."""
        return self.reference.nll(rows, labels, *self.args, **self.inputs)

    def likeliest(self, rows: Tensor, labels: Tensor) -> Likeliest:
        """The likeliest tokens in the place of the labels at `rows`."""
        return Likeliest(*self.reference.likeliest(rows, labels, *self.args, **self.inputs))


REFERENCE_COLUMN = "reference_nll"
"""As the name of a reference: its losses come with the data, in the column of this name."""


@dataclass(frozen=True)
class Term:
    """One term of an objective: ``coefficient * sum of losses / number of units``, over a whole optimizer step.

    Args:
        name: what it is called in the handle's stats.
        tokens: which labels it is about: those that the column ``forget`` marks, the others, or all of them.
        coefficient: its factor in the total.
        loss: a function from a TokenBatch with `nll` to (losses, d sum of losses / d nll); an objective of the logits;
            or None for the negative log-likelihood.
        unit: what the sum is divided by: the number of tokens, or of sequences.
        skip: how many labels at the beginning of each sequence are left out.
        whole: the function needs all tokens of a sequence at once, so their losses are computed beforehand.
        reference: whether the loss reads a reference model.
    """

    name: str
    tokens: Literal["forget", "retain", "all"]
    coefficient: float = 1.0
    loss: Pointwise | LogitObjective | None = None
    unit: Literal["token", "sequence"] = "token"
    skip: int = 0
    whole: bool = False
    reference: bool = False


class Objective(Method):
    """A loss of its own, the sum of `terms`; the loss and its gradient do not depend on how a step is split.

    The denominators are known from the labels, so they are those of the whole optimizer step, over all micro-batches
    and processes. A method that reads the column ``forget`` needs it in every batch: [batch, tokens], 1 where label t
    is to be forgotten, 0 where it is to be kept.
    """

    family: ClassVar[str] = "weighting"
    traits: ClassVar[tuple[str, ...]] = ("reads", "kind")
    kind: ClassVar[str] = "objective"
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which columns of the data it reads."""
    negative: ClassVar[bool] = False
    """Whether a column of weights may hold negative ones."""

    @abstractmethod
    def terms(self) -> list[Term]:
        """Its terms."""

    def needs_reference(self) -> bool:
        """Whether a term reads a reference model, and its losses do not come with the data."""
        return any(term.reference for term in self.terms()) and getattr(self, "reference", None) != REFERENCE_COLUMN

    def check_stored(self, columns: Collection[str], field: str = "reference") -> None:
        """Refuse a folder of token scores as the reference of a term that compares distributions where the scores are
        of the labels alone.

        Args:
            columns: what the scores hold.
            field: the field to name in an error.

        Raises:
            InputError: naming `field` and the term.
        """
        for term in self.terms():
            if term.reference and isinstance(term.loss, LogitObjective) and "top_ids" not in columns:
                message = f"the {term.name} term of {type(self).__name__} compares the distributions over all tokens, "
                message += "and these token scores have the probabilities of the labels alone."
                fix = "Score with --statistics logp,top_k, or name a model."
                raise InputError(Problem(field, message, fix))


def load_frozen(
    target: torch.nn.Module,
    model: PreTrainedModel,
    method: Objective,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> FrozenStates | StoredReference | None:
    """The reference of an objective: the model or the folder of token scores it names, or `target` as it is now; None
    where it reads none.

    Raises:
        InputError: when it cannot be opened, or the method needs more than token scores hold.
    """
    if not method.needs_reference():
        return None
    path = getattr(method, "reference", None)
    if path is not None:
        from tokenwise.scores.layout import is_store
        from tokenwise.scores.reference import StoredReference

        if is_store(path):
            stored = StoredReference(path, model, tokenizer)
            method.check_stored(stored.store.columns)
            return stored
    return FrozenStates(path, target, model)


class ObjectiveForward:
    """Computes the loss of `model` under an objective: what the patched `model.forward` does while training.

    Attributes:
        counts: units of each term in the whole optimizer step over all processes; None for those of the batch.
        observe: called after each micro-batch with the name, sum of losses and units of each term.
    """

    state = None
    scored = None
    pending: Tensor | None = None
    normalize = "none"

    def __init__(
        self,
        model: PreTrainedModel,
        method: Objective,
        reference: FrozenStates | StoredReference | None,
        low_memory: bool = False,
    ):
        self.model = model
        self.method = method
        self.reference = reference
        self.low_memory = low_memory
        self.step = 0
        self.whole_step = False
        self.items: Tensor | int | None = None
        self.terms = [term for term in method.terms() if term.coefficient]
        self.counts: dict[str, int] | None = None
        self.observe: Any = None

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the units of each term in all micro-batches of this process, and over all processes."""
        counts = torch.zeros(len(self.terms), dtype=torch.int64, device=self.model.device)
        for batch in batches:
            columns = {name: shifted(batch[name], 0) for name in COLUMNS if batch.get(name) is not None}
            targets = _targets(batch.get("labels"), batch.get("shift_labels"))
            for index, term in enumerate(self.terms):
                rows, sequence = self._rows(term, targets, columns, batch.get("position_ids"))
                counts[index] += _units(term, rows, sequence)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.counts = dict(zip((term.name for term in self.terms), counts.tolist(), strict=True))

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """The model's output with the objective as its loss and no logits.

        Args:
            labels: [batch, tokens]; or `shift_labels`, moved already.
            num_items_in_batch: what a Trainer passes; the terms have counts of their own.
            inputs: the backbone's inputs, and any of `COLUMNS`.
        """
        columns = {name: shifted(values, 0) for name in COLUMNS if (values := inputs.pop(name, None)) is not None}
        targets = _targets(labels, shift_labels)
        # Before the model itself, so that switching adapters off and on leaves its graph alone.
        frozen = self.frozen(*args, **inputs)
        hidden = last_hidden(self.model, *args, **inputs)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        found = []
        total: Tensor | None = None
        for term in self.terms:
            rows, batch = self.tokens(term, targets, columns, inputs.get("position_ids"))
            units = _units(term, rows, batch.sequence)
            loss = self._sum(term, hidden, columns, rows, batch, frozen)
            found.append((term.name, loss.detach(), units, rows.shape[0]))
            divisor = units if self.counts is None else self.counts[term.name]
            share = loss * (term.coefficient / max(divisor, 1))
            total = share if total is None else total + share
        assert total is not None
        if self.observe is not None:
            self.observe(found)
        return CausalLMOutputWithPast(loss=cast(Any, total))

    def frozen(self, *args: Any, **inputs: Any) -> States | StoredBatch | None:
        """What the reference makes of a batch of the backbone's inputs; None without a reference."""
        if self.reference is not None and hasattr(self.reference, "states"):
            return self.reference.states(*args, **inputs)
        return None if self.reference is None else StoredBatch(self.reference, args, inputs)

    def tokens(
        self, term: Term, targets: Tensor, columns: Mapping[str, Tensor], position_ids: Tensor | None = None
    ) -> tuple[Tensor, TokenBatch]:
        """The labels that a term is about: their positions in the flattened batch [labels], and these tokens.

        Args:
            targets: labels moved to the positions that predict them, [batch, tokens].
            columns: moved likewise.
        """
        rows, sequence = self._rows(term, targets, columns, position_ids)
        return rows, TokenBatch(targets.reshape(-1)[rows], sequence, _sequences(sequence), self.step)

    def _rows(
        self, term: Term, targets: Tensor, columns: Mapping[str, Tensor], position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Position of each label of a term in the flattened batch, and its sequence, numbered from 0: [labels] each."""
        chosen = targets.ne(IGNORED)
        if term.tokens != "all":
            if "forget" not in columns:
                raise InputError(
                    Problem(
                        "forget",
                        f"{type(self.method).__name__} reads the column 'forget', which the batch does not have.",
                        "Give it, shaped and aligned like labels: 1 where a label is to be forgotten, else 0; "
                        "tokenwise.weighting.pair and UnlearningCollator make it.",
                    )
                )
            forget = columns["forget"].to(targets.device) != 0
            chosen = chosen & (forget if term.tokens == "forget" else ~forget)
        rows = chosen.reshape(-1).nonzero().squeeze(1)
        ids = sequence_ids(targets, position_ids).to(targets.device).reshape(-1)[rows]
        _, sequence = torch.unique(ids, return_inverse=True)
        if term.skip:
            lengths = torch.bincount(sequence)
            rank = torch.arange(rows.shape[0], device=rows.device) - (lengths.cumsum(0) - lengths)[sequence]
            rows = rows[rank >= term.skip]
            _, sequence = torch.unique(sequence[rank >= term.skip], return_inverse=True)
        return rows, sequence

    def _sum(
        self,
        term: Term,
        hidden: Tensor,
        columns: Mapping[str, Tensor],
        rows: Tensor,
        batch: TokenBatch,
        frozen: States | StoredBatch | None,
    ) -> Tensor:
        """The sum of a term's losses over one micro-batch, with gradient."""
        head = output_head(self.model)
        if isinstance(term.loss, LogitObjective):
            reference = distributions(frozen, rows, batch.labels) if term.reference else None
            return logit_sum(hidden, head, rows, batch, term.loss, reference, low_memory=self.low_memory)
        if term.reference:
            batch.reference_nll = self.reference_nll(columns, rows, batch.labels, frozen)
        if not term.whole:
            return weighted_sum(hidden, head, rows, batch, term.loss, low_memory=self.low_memory).total
        assert term.loss is not None
        batch.nll = token_statistics(hidden.detach(), head, batch.labels, rows=rows, low_memory=self.low_memory).nll
        values, slopes = term.loss(batch)
        linear = weighted_sum(hidden, head, rows, batch, slopes, low_memory=self.low_memory).total
        # The gradient of the linear sum, the value of the loss.
        return values.sum().to(linear) + (linear - linear.detach())

    def reference_nll(
        self, columns: Mapping[str, Tensor], rows: Tensor, labels: Tensor, frozen: States | StoredBatch | None
    ) -> Tensor:
        """Losses of labels under the reference, from its states, stored losses or the data's column, in nats: [labels].

        Raises:
            InputError: when there is none of them.
        """
        if isinstance(frozen, StoredBatch):
            return frozen.losses(rows, labels)
        if frozen is not None:
            return token_statistics(frozen[0], frozen[1], labels, rows=rows, low_memory=self.low_memory).nll
        if REFERENCE_COLUMN not in columns:
            raise InputError(
                Problem(
                    REFERENCE_COLUMN,
                    f"{type(self.method).__name__} reads the column {REFERENCE_COLUMN!r}, which is not in the batch.",
                    "Give it with the batch, shaped and aligned like labels, or use weigh with a reference model.",
                )
            )
        return columns[REFERENCE_COLUMN].reshape(-1)[rows].float()


class ObjectiveWeighing(Weighing):
    """A model, or a trainer and its model, training under an objective until `undo`.

    Attributes:
        stats: of each term ``<name>_loss`` (its mean over its units so far, without the coefficient) and
            ``<name>_labels`` (how many labels it saw).
    """

    def __init__(self, forward: ObjectiveForward):
        super().__init__(cast(Any, forward))
        self._found: dict[str, list[float]] = {}

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """In a loop of your own: name the micro-batches of the optimizer step that begins, so that every term is
        divided by its number of units in the whole step. On a Trainer this happens by itself."""
        self.forward.begin_step(batches)  # type: ignore[attr-defined]

    def observe(self, found: Any) -> None:
        """Add one micro-batch to `stats`."""
        for name, total, units, labels in found:
            sums = self._found.setdefault(name, [0.0, 0.0, 0.0])
            for index, value in enumerate((float(total), units, labels)):
                sums[index] += value
            self.stats[f"{name}_loss"] = sums[0] / max(sums[1], 1)
            self.stats[f"{name}_labels"] = sums[2]


def _targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    targets = shift_labels if labels is None else shifted(labels, IGNORED)
    assert targets is not None
    return targets


def distributions(frozen: States | StoredBatch | None, rows: Tensor, labels: Tensor) -> States | Likeliest | None:
    """What is known of the reference's distributions in the place of labels at `rows` of the flattened batch."""
    return frozen.likeliest(rows, labels) if isinstance(frozen, StoredBatch) else frozen


def _sequences(sequence: Tensor) -> int:
    """How many sequences there are; their numbers rise along the batch."""
    return int(sequence[-1]) + 1 if sequence.numel() else 0


def _units(term: Term, rows: Tensor, sequence: Tensor) -> int:
    return rows.shape[0] if term.unit == "token" else _sequences(sequence)
