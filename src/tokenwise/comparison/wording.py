"""What a report and a terminal call the costs of a comparison, and how they explain its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tokenwise.comparison.formatting import amount, duration, memory, plain, ratio
from tokenwise.comparison.quality import QuestionQuality


def _tokens(value: float | None) -> str:
    return "–" if value is None else plain(value, 0 if float(value).is_integer() else 1)


def _percent(value: float) -> str:
    return f"{plain(100 * value, 1)}%"


_KEPT = ("token_share", lambda value: f"{_percent(value)} kept")


def _scoring(value: float) -> str:
    return f"{duration(value)} scoring" if value else "no scoring"


_SCORING = ("scoring_seconds", _scoring)


@dataclass(frozen=True)
class Column:
    """A cost in the table.

    Args:
        name: of the field of `Costs`.
        title: its heading.
        show: its value in words.
        adds: whether the cost of a reference adds to it.
        relative: the row's field that gives it as a multiple of the baseline's; empty where there is none.
        below: what stands below it: fields of `Costs`, and their values in words.
    """

    name: str
    title: str
    show: Callable[[Any], str]
    adds: bool = True
    relative: str = ""
    below: tuple[tuple[str, Callable[[Any], str]], ...] = ()


@dataclass(frozen=True)
class Wording:
    """The words of one family of comparisons.

    Args:
        per: what FLOPs and time are of, after the title of an axis; empty for a whole run.
        columns: the costs that are shown.
        equal: what all methods have in common.
        named: when a method is named.
        terms: further terms and what they mean.
        unmeasured: what none of these comparisons measures.
    """

    per: str
    columns: tuple[Column, ...]
    equal: str
    named: str
    terms: tuple[tuple[str, str], ...]
    unmeasured: str


_MEMORY = Column("peak_memory_bytes", "Peak memory", memory, adds=False)
TRAINING = Wording(
    per="",
    columns=(
        Column("flops", "FLOPs", amount, relative="relative_flops"),
        Column("wall_seconds", "Wall time", duration),
        _MEMORY,
        Column("tokens_seen", "Tokens seen", amount),
        Column("tokens_trained", "Tokens trained on", amount),
    ),
    equal="With one seed, every method starts from the same weights and sees the data in the same order. Every "
    "run has the "
    "same budget ({budget}); the learning rate follows the share of it that is spent.",
    named="Its interval against {baseline} lies below zero, and, where it selects tokens, so does the one against its "
    "random control. Otherwise the answer is that no difference is shown.",
    terms=(
        (
            "FLOPs",
            "Of all training steps, forward and backward, the method's own scoring included, evaluation "
            "excluded. G is 10⁹, "
            "T is 10¹², P is 10¹⁵. \"=\" is the sum with the reference's, as a multiple of {baseline}'s.",
        ),
        (
            "Wall time, memory",
            "Time spent training, without loading and evaluation. Memory is the high-water mark of the process "
            "while it "
            "trains, the largest of the seeds.",
        ),
        (
            "Tokens",
            "Seen: {labels} that went through the forward pass. Trained on: labels with a weight other than zero.",
        ),
    ),
    unmeasured="the cost of choosing hyper-parameters, energy, and quality in any other respect than the columns "
    "above. "
    "The curves and the front are means and carry no test.",
)
REDUCTION = Wording(
    per=" per {item}",
    columns=(
        Column(
            "flops",
            "FLOPs",
            amount,
            relative="relative_flops",
            below=(("block_flops", lambda value: f"{amount(value)} in blocks"),),
        ),
        Column(
            "wall_seconds",
            "Time",
            duration,
            relative="relative_seconds",
            below=(_SCORING,),
        ),
        Column("tokens_after", "Tokens left", _tokens, below=(_KEPT,)),
        _MEMORY,
    ),
    equal="Every method runs the same trained model on the same {item}s, nothing is trained. At one budget each "
    "keeps as "
    "much as the others. A method that draws nothing has one run, which stands for every seed; chance between seeds is "
    "that of the random control.",
    named="At its budget, its interval against its random control lies below zero. Where several are, and no "
    "difference "
    "is shown between them, the cheaper one is named, or all of them. What a budget costs in quality is for the "
    "reader to weigh: right answers that are kept are a share of those that {baseline} gets right, and their interval "
    "is that of the difference.",
    terms=(
        (
            "FLOPs",
            "Of one {item}: matrix products, convolutions and attention as they are counted while the model runs, the "
            "method's own among them, a multiply-add as two. In the blocks: the closed form of the encoder's "
            "blocks for the "
            'tokens that were left in each. "=" is a multiple of {baseline}\'s.',
        ),
        (
            "Time",
            "Of one {item}: the median over batches. Every batch goes through the method and the dense model one "
            "right after "
            "the other, in alternating order, after warming up; times are scaled so that the dense model takes "
            "as long in "
            "every run as in {baseline}'s. Preparing images is not counted, and operations are counted in "
            "another pass. "
            "Scoring: the time of the method's own decisions, taken in a pass of its own.",
        ),
        (
            "Tokens, memory",
            "Left: after the last block. Kept: the share of tokens that the feed-forward layers work on, "
            "averaged over the "
            "blocks. Memory is the high-water mark of the process while the model runs, its weights and "
            "libraries included.",
        ),
    ),
    unmeasured="other sizes of batches, energy, and quality in any other respect than the columns above. The "
    "front is of "
    "means and carries no test.",
)


ASKING = replace(
    REDUCTION,
    columns=(
        Column("flops", "FLOPs", amount, relative="relative_flops"),
        REDUCTION.columns[1],
        Column(
            "tokens_after",
            "Image tokens left",
            _tokens,
            below=(_KEPT,),
        ),
        Column("cache_bytes", "Key-value cache", memory, adds=False),
        _MEMORY,
    ),
    terms=(
        (
            "FLOPs",
            "Of reading one prompt, image and question, the vision tower included: matrix products, convolutions and "
            "attention as they are counted while the model runs, the method's own among them, a multiply-add as two. "
            'Writing the answer is not counted. "=" is a multiple of {baseline}\'s.',
        ),
        (
            "Time",
            "Of reading one prompt: the median over questions. Every prompt goes through the method and the dense "
            "model one right after the other, in alternating order, after warming up; times are scaled so that the "
            "dense model takes as long in every run as in {baseline}'s. Preparing images and writing the answer are "
            "not counted. Scoring: the time of the method's own decisions, what it looks at in the model included, "
            "taken in a pass of its own.",
        ),
        (
            "Tokens, cache, memory",
            "Left: image tokens that the last layer of the language model works on. Kept: their share of all, "
            "averaged over its layers. The key-value cache is what holds the keys and values of one prompt, as "
            "they are stored. Memory is the high-water mark of the process while the model answers, its weights "
            "and libraries included.",
        ),
    ),
    unmeasured="several questions at once, the time of writing answers, energy, and quality in any other respect than "
    "the columns above. The front is of means and carries no test.",
)


REMEMBERING = replace(
    REDUCTION,
    columns=(
        Column(
            "cache_bytes", "Key-value cache", memory, below=(("full_cache_bytes", lambda size: f"of {memory(size)}"),)
        ),
        Column(
            "tokens_after",
            "Tokens stored",
            _tokens,
            below=(_KEPT, ("tokens_read", lambda value: f"{_tokens(value)} read")),
        ),
        Column(
            "wall_seconds",
            "Time of reading",
            duration,
            relative="relative_seconds",
            below=(_SCORING,),
        ),
        Column(
            "decode_seconds",
            "Time of a token",
            duration,
            relative="relative_decode_seconds",
            below=(("decode_scoring_seconds", _scoring),),
        ),
        _MEMORY,
    ),
    terms=(
        (
            "Visible, hidden",
            "With the question visible, context and question are read and then evicted from; the prompt's last token "
            "is read once more from what is left, so that all of the answer follows from it. With the question hidden "
            "the context alone is read and evicted from, and the question follows as a second turn on the same cache, "
            "which is brought back to its budget after it. The full cache answers the same either way.",
        ),
        (
            "Key-value cache, tokens",
            "What the stored keys and values take once a method has evicted from what it has read, and what they "
            "would take if all were stored. Stored: tokens, as a mean over layers and heads. Read: where a method "
            "stores them all, those that writing a token reads.",
        ),
        (
            "Time",
            "Of reading what the method sees of a row before it evicts, scoring and evicting included, and of writing "
            "one token after it: medians over rows. Every row goes through the method and the full cache one right "
            "after the other, in alternating order, after warming up; times are scaled so that the full cache takes as "
            "long in every run as in {baseline}'s. Scoring: the part that the method's own work takes (looking at the "
            "attention, scoring, choosing, moving what stays), by its share in a pass of its own.",
        ),
        (
            "Memory",
            "The high-water mark of the process while the model reads and writes, its weights and libraries included.",
        ),
    ),
    unmeasured="several rows at once, energy, and quality in any other respect than the columns above. The front is of "
    "means and carries no test.",
)


def wording(family: str, item: str) -> Wording:
    """The words for a family of methods, measured on items of some kind."""
    if family == "cache":
        return REMEMBERING
    if family == "reduction":
        return ASKING if item == QuestionQuality.item else REDUCTION
    return TRAINING


def multiple(value: float | None) -> str:
    """How many times the baseline's a cost is; empty where it is not known."""
    return "" if value is None else f"= {ratio(value)}"
