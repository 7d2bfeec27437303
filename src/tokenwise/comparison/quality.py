"""How good a trained model is on held-out items, item by item, so that items can be drawn anew.

A task's quality is a function of sums over items: of losses and tokens, of errors in each class. Drawing items with
replacement then is one matrix product, whatever the function. The measure that ranks is always a loss: lower is better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """What a number says.

    Args:
        name: as a sentence uses it: ``held-out loss``.
        unit: of its values.
        definition: how it is computed, in whole sentences.
        difference_unit: of differences, where that is another word.
        decimals: how many to show; as many as the intervals deserve unless given.
    """

    name: str
    unit: str
    definition: str = ""
    difference_unit: str = ""
    decimals: int | None = None

    @property
    def title(self) -> str:
        """The name at the start of a line."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def points(self) -> str:
        """The unit of a difference."""
        return self.difference_unit or self.unit

    def __str__(self) -> str:
        return f"{self.name}, {self.unit}"


def _percent(name: str, definition: str = "", decimals: int | None = 1) -> Measure:
    return Measure(name, "%", definition, "percentage points", decimals)


class Quality(ABC):
    """Quality on held-out items, always unweighted."""

    kind: str
    item: ClassVar[str] = "example"
    """What one item is called."""
    smallest: ClassVar[str] = "rarest class"
    """What the smallest of its strata is called."""
    brief: ClassVar[tuple[Measure, ...]] = ()
    """Those of `details` that also belong in a table in the terminal."""

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """What methods are ranked by; lower is better."""

    @property
    def curve_measure(self) -> Measure:
        """What is measured on the way."""
        return self.measure

    @abstractmethod
    def columns(self) -> Array:
        """What each item adds to the sums, shape [items, columns]."""

    @abstractmethod
    def of_sums(self, sums: Array) -> Array:
        """The measure from sums over items: shape [..., columns] to [...]."""

    @abstractmethod
    def identity(self) -> Hashable:
        """Equal for two runs that were measured on the same items."""

    @property
    @abstractmethod
    def held_out(self) -> str:
        """How much was measured on, in words."""

    def strata(self) -> NDArray[np.int64] | None:
        """The group within which each item is drawn anew, shape [items]; None where all are one group."""
        return None

    @property
    def items(self) -> int:
        return len(self.columns())

    @property
    def value(self) -> float:
        """The measure over all items."""
        return float(self.of_sums(self.columns().sum(axis=0)))

    @property
    def finite(self) -> bool:
        """Whether every number behind it is."""
        return bool(np.isfinite(self.columns()).all())

    @property
    def details(self) -> dict[Measure, float]:
        """Further measures of the whole, best known first. They carry no test."""
        return {}

    @property
    def groups(self) -> dict[str, dict[Measure, float]]:
        """Measures of parts, by the part's name."""
        return {}

    @property
    def goals(self) -> tuple[tuple[Measure, float], tuple[Measure, float]] | None:
        """Two measures that pull against each other, both the better the higher; None where there is one goal."""
        return None


LOSS = Measure(
    "held-out loss",
    "nats/token",
    "The unweighted negative log-likelihood of the held-out documents, summed and divided by their tokens, after "
    "training. Bits/byte divides by the text's bytes instead, so that it also compares across tokenizers.",
)
BITS = Measure("bits/byte", "bits/byte")


@dataclass
class _TokenLosses(Quality):
    """Losses of texts; ranked by the loss of their tokens."""

    nll: list[float]
    tokens: list[int]

    def columns(self) -> Array:
        return np.array([self.nll, self.tokens], dtype=np.float64).T

    def of_sums(self, sums: Array) -> Array:
        return np.asarray(sums[..., 0] / sums[..., 1])

    def identity(self) -> Hashable:
        return tuple(self.tokens)


@dataclass
class TextLoss(_TokenLosses):
    """Loss of held-out documents.

    Args:
        nll: summed negative log-likelihood of each document, in nats.
        tokens: labels of each document.
        bytes: UTF-8 bytes of each document that these labels cover.
    """

    bytes: list[int]
    kind: Literal["text_loss"] = "text_loss"

    item: ClassVar[str] = "document"

    @property
    def measure(self) -> Measure:
        return LOSS

    @property
    def nats_per_token(self) -> float:
        return sum(self.nll) / sum(self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return sum(self.nll) / sum(self.bytes) / 0.6931471805599453

    @property
    def value(self) -> float:
        return self.nats_per_token

    @property
    def details(self) -> dict[Measure, float]:
        return {BITS: self.bits_per_byte}

    @property
    def held_out(self) -> str:
        return f"{_count(len(self.tokens), 'document')}, {sum(self.tokens):,} tokens"


RESPONSE_LOSS = Measure(
    "response loss",
    "nats/token",
    "The unweighted negative log-likelihood of the held-out responses, summed and divided by their tokens, after "
    "training. Prompts are read, not scored.",
)
EXACT_MATCH = _percent("exact match")
WRONG_ANSWERS = _percent(
    "wrong answers",
    "The share of held-out rows whose answer, written by the model token by token (always the likeliest one), is not "
    "exactly the expected one: what follows the last #### where the expected response has it, or else the whole text.",
    None,
)


@dataclass
class _WrongAnswers(Quality):
    """Answers that are right or wrong; ranked by the share of wrong ones."""

    @property
    @abstractmethod
    def wrong(self) -> Sequence[bool]:
        """Of each item whether its answer is wrong."""

    def columns(self) -> Array:
        return np.array([[100.0 * wrong, 1.0] for wrong in self.wrong])

    def of_sums(self, sums: Array) -> Array:
        return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass
class _WrittenAnswers(_WrongAnswers):
    """Answers that a model wrote beside those expected."""

    nll: list[float]
    tokens: list[int]
    correct: list[bool]

    @property
    def wrong(self) -> Sequence[bool]:
        return [not right for right in self.correct]

    def identity(self) -> Hashable:
        return tuple(self.tokens)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.nll).all())


@dataclass
class ResponseQuality(_WrittenAnswers):
    """Loss of held-out responses, and whether the model's own answers match.

    Args:
        nll: summed negative log-likelihood of each row's response, in nats.
        tokens: response tokens of each row.
        correct: whether the answer the model wrote is the expected one.
        metric: which of the two ranks.
    """

    metric: Literal["loss", "exact_match"] = "loss"
    kind: Literal["response"] = "response"

    item: ClassVar[str] = "row"
    brief: ClassVar[tuple[Measure, ...]] = (EXACT_MATCH,)

    @property
    def measure(self) -> Measure:
        return RESPONSE_LOSS if self.metric == "loss" else WRONG_ANSWERS

    @property
    def curve_measure(self) -> Measure:
        return RESPONSE_LOSS

    def columns(self) -> Array:
        if self.metric == "loss":
            return np.array([self.nll, self.tokens], dtype=np.float64).T
        return super().columns()

    @property
    def details(self) -> dict[Measure, float]:
        found = {EXACT_MATCH: 100 * sum(self.correct) / len(self.correct)}
        return found if self.metric == "loss" else {**found, RESPONSE_LOSS: sum(self.nll) / sum(self.tokens)}

    @property
    def held_out(self) -> str:
        return f"{_count(len(self.tokens), 'row')}, {sum(self.tokens):,} response tokens"


MACRO_ERROR = _percent(
    "macro-averaged error",
    "In each class the share of held-out examples that are given another class; then the mean over the classes, so "
    "that a rare class counts as much as a frequent one. Examples are drawn anew within their class.",
    None,
)
ACCURACY = _percent("accuracy")
MACRO_F1 = _percent("macro-F1")
LOG_LOSS = Measure("log-loss", "nats/example", decimals=3)
RECALL = _percent("recall")
F1 = _percent("F1")


@dataclass
class ClassQuality(Quality):
    """Predictions for held-out examples.

    Args:
        labels: class of each example, an index into `names`.
        predictions: the class the model gives it.
        log_loss: negative log-likelihood of the right class, in nats.
        names: of the classes.
    """

    labels: list[int]
    predictions: list[int]
    log_loss: list[float]
    names: list[str]
    kind: Literal["classes"] = "classes"

    brief: ClassVar[tuple[Measure, ...]] = (ACCURACY, MACRO_F1)

    @property
    def measure(self) -> Measure:
        return MACRO_ERROR

    def columns(self) -> Array:
        own = np.eye(len(self.names))[self.labels]
        wrong = np.not_equal(self.labels, self.predictions)
        return np.concatenate([100 * own * wrong[:, None], own], axis=1)

    def of_sums(self, sums: Array) -> Array:
        errors, counts = np.split(sums, 2, axis=-1)
        return np.asarray((errors / counts).mean(axis=-1))

    def strata(self) -> NDArray[np.int64]:
        # A rare class must not vanish from a draw: nothing could be said of it then.
        return np.array(self.labels)

    def identity(self) -> Hashable:
        return tuple(self.labels), tuple(self.names)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.log_loss).all())

    @property
    def details(self) -> dict[Measure, float]:
        right = np.equal(self.labels, self.predictions)
        return {
            ACCURACY: 100 * float(right.mean()),
            MACRO_F1: float(np.mean([group[F1] for group in self.groups.values()])),
            LOG_LOSS: float(np.mean(self.log_loss)),
        }

    @property
    def groups(self) -> dict[str, dict[Measure, float]]:
        labels, predictions = np.array(self.labels), np.array(self.predictions)
        found = {}
        for index, name in enumerate(self.names):
            own, given = labels == index, predictions == index
            both = int((own & given).sum())
            recall, f1 = both / own.sum(), 2 * both / (own.sum() + given.sum())
            found[name] = {RECALL: 100 * float(recall), F1: 100 * float(f1)}
        return found

    @property
    def held_out(self) -> str:
        rarest = int(np.bincount(self.labels, minlength=len(self.names)).min())
        return f"{_count(len(self.labels), 'example')} of {len(self.names)} classes, {rarest:,} of the rarest"


IMAGE_ERROR = _percent(
    "error",
    "The share of images that are given another class than their label's.",
    None,
)
AGREEMENT = _percent("agreement", "The share of images that are given the class that the dense model gives them.")


@dataclass
class ImageQuality(_WrongAnswers):
    """Classes that a model gives images.

    Args:
        labels: class of each image, a number.
        predictions: the class that the model gives it.
        dense: the class that the model gives it with nothing left out.
        log_loss: negative log-likelihood of the right class, in nats.
        classes: how many there are.
    """

    labels: list[int]
    predictions: list[int]
    dense: list[int]
    log_loss: list[float]
    classes: int
    kind: Literal["images"] = "images"

    item: ClassVar[str] = "image"
    brief: ClassVar[tuple[Measure, ...]] = (AGREEMENT,)

    @property
    def measure(self) -> Measure:
        return IMAGE_ERROR

    @property
    def wrong(self) -> Sequence[bool]:
        return [label != said for label, said in zip(self.labels, self.predictions, strict=True)]

    def identity(self) -> Hashable:
        return tuple(self.labels)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.log_loss).all())

    @property
    def details(self) -> dict[Measure, float]:
        return {
            ACCURACY: 100 * float(np.equal(self.labels, self.predictions).mean()),
            AGREEMENT: 100 * float(np.equal(self.dense, self.predictions).mean()),
        }

    @property
    def held_out(self) -> str:
        return f"{_count(len(self.labels), 'image')} of {self.classes:,} classes"


WRONG_ABOUT_IMAGES = _percent(
    "wrong answers",
    "The share of questions whose answer, written by the model token by token (always the likeliest one), is not "
    "exactly the expected one, blanks around it apart.",
    None,
)
ANSWER_LOSS = Measure("answer loss", "nats/token", decimals=3)


@dataclass
class _AnsweredQuestions(_WrittenAnswers):
    item: ClassVar[str] = "question"
    brief: ClassVar[tuple[Measure, ...]] = (ANSWER_LOSS,)

    @property
    def details(self) -> dict[Measure, float]:
        return {
            EXACT_MATCH: 100 * sum(self.correct) / len(self.correct),
            ANSWER_LOSS: sum(self.nll) / sum(self.tokens),
        }

    @property
    def held_out(self) -> str:
        return f"{_count(len(self.tokens), 'question')}, {sum(self.tokens):,} answer tokens"


@dataclass
class QuestionQuality(_AnsweredQuestions):
    """Answers to questions about images.

    Args:
        nll: summed negative log-likelihood of each expected answer, in nats.
        tokens: of each expected answer.
        correct: whether the answer the model wrote is the expected one.
    """

    kind: Literal["questions"] = "questions"

    @property
    def measure(self) -> Measure:
        return WRONG_ABOUT_IMAGES


WRONG_RECALL = _percent(
    "wrong answers",
    "The share of questions whose answer, written by the model token by token (always the likeliest one) with what is "
    "left in its cache, is not exactly the expected one, blanks around it apart.",
    None,
)


@dataclass
class RecallQuality(_AnsweredQuestions):
    """Answers to questions about long contexts.

    Args:
        nll: summed negative log-likelihood of each expected answer, in nats.
        tokens: of each expected answer.
        correct: whether the answer the model wrote is the expected one.
        depth: where in the context each answer stands, from 0 to 1; empty where that is not known.
    """

    depth: list[float]
    kind: Literal["recall"] = "recall"

    @property
    def measure(self) -> Measure:
        return WRONG_RECALL


CONTINUATION_LOSS = Measure(
    "continuation loss",
    "nats/token",
    "The negative log-likelihood of what follows each context, as the model would write it with what is left in its "
    "cache, summed and divided by its tokens.",
)


@dataclass
class ContinuationQuality(_TokenLosses):
    """Loss of what follows long contexts.

    Args:
        nll: summed negative log-likelihood of each continuation, in nats.
        tokens: of each continuation.
    """

    kind: Literal["continuation"] = "continuation"

    item: ClassVar[str] = "text"

    @property
    def measure(self) -> Measure:
        return CONTINUATION_LOSS

    @property
    def held_out(self) -> str:
        return f"{_count(len(self.tokens), 'text')}, {sum(self.tokens):,} tokens that follow"


UNLEARNING_ERROR = _percent(
    "unlearning error",
    "100% minus the harmonic mean of what was forgotten (1 minus the probability of the answers to forget) and what "
    "was kept (the probability of the answers to keep): 0% where all is forgotten and all kept, 100% where nothing is "
    "forgotten, or nothing kept. The probability of an answer is the geometric mean over its tokens, averaged over "
    "answers. Answers are drawn anew among those to forget and among those to keep.",
    None,
)
FORGET_PROBABILITY = _percent("forget probability")
RETAIN_PROBABILITY = _percent("retain probability")
FORGOTTEN = _percent("forgotten", "100% minus the forget probability.")
KEPT = _percent("kept", "the retain probability.")
FORGET_LOSS = Measure("forget loss", "nats/token", decimals=3)
RETAIN_LOSS = Measure("retain loss", "nats/token", decimals=3)


@dataclass
class UnlearningQuality(Quality):
    """How far some answers are forgotten, and others kept.

    Args:
        nll: summed negative log-likelihood of each answer, in nats.
        tokens: of each answer.
        forget: whether the answer is to be forgotten.
    """

    nll: list[float]
    tokens: list[int]
    forget: list[bool]
    kind: Literal["unlearning"] = "unlearning"

    item: ClassVar[str] = "answer"
    smallest: ClassVar[str] = "smaller of the two sets"
    brief: ClassVar[tuple[Measure, ...]] = (FORGET_PROBABILITY, RETAIN_PROBABILITY)

    @property
    def measure(self) -> Measure:
        return UNLEARNING_ERROR

    def columns(self) -> Array:
        probability = np.exp(-np.divide(self.nll, self.tokens))
        groups = np.array([self.forget, np.logical_not(self.forget)], dtype=np.float64).T
        return np.concatenate([groups * probability[:, None], groups], axis=1)

    def of_sums(self, sums: Array) -> Array:
        probabilities, counts = np.split(sums, 2, axis=-1)
        means = probabilities / counts
        forgotten, kept = 1 - means[..., 0], means[..., 1]
        total = forgotten + kept
        mean = np.divide(2 * forgotten * kept, total, out=np.zeros_like(total), where=total > 0)
        return np.asarray(100 * (1 - mean))

    def strata(self) -> NDArray[np.int64]:
        return np.array(self.forget, dtype=np.int64)

    def identity(self) -> Hashable:
        return tuple(self.tokens), tuple(self.forget)

    @property
    def finite(self) -> bool:
        # A probability of 0 hides a loss that is not finite.
        return bool(np.isfinite(self.nll).all())

    @property
    def details(self) -> dict[Measure, float]:
        nll, tokens, forget = np.array(self.nll), np.array(self.tokens), np.array(self.forget)
        probability = 100 * np.exp(-nll / tokens)
        return {
            FORGET_PROBABILITY: float(probability[forget].mean()),
            RETAIN_PROBABILITY: float(probability[~forget].mean()),
            FORGET_LOSS: float(nll[forget].sum() / tokens[forget].sum()),
            RETAIN_LOSS: float(nll[~forget].sum() / tokens[~forget].sum()),
        }

    @property
    def goals(self) -> tuple[tuple[Measure, float], tuple[Measure, float]]:
        details = self.details
        return (FORGOTTEN, 100 - details[FORGET_PROBABILITY]), (KEPT, details[RETAIN_PROBABILITY])

    @property
    def held_out(self) -> str:
        forget = sum(self.forget)
        return f"{_count(forget, 'answer')} to forget and {len(self.forget) - forget:,} to keep"


_KINDS: dict[str, type[Quality]] = {
    "text_loss": TextLoss,
    "response": ResponseQuality,
    "classes": ClassQuality,
    "images": ImageQuality,
    "questions": QuestionQuality,
    "recall": RecallQuality,
    "continuation": ContinuationQuality,
    "unlearning": UnlearningQuality,
}


def read_quality(values: dict[str, Any]) -> Quality:
    """The quality that `dataclasses.asdict` turned into plain values."""
    return _KINDS[values.get("kind", "text_loss")](**values)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")
