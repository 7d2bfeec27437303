"""Runs of visual question answering: a trained vision-language model with fewer tokens, beside itself with all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tokenwise.comparison.clock import Clock, now
from tokenwise.comparison.memory import PeakMemory
from tokenwise.comparison.pictures import selected, selection_of
from tokenwise.comparison.quality import QuestionQuality
from tokenwise.comparison.questions import Questions
from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.comparison.training import Progress, RunFailed, build_method, versions_of
from tokenwise.models.cache_memory import cache_nbytes
from tokenwise.models.flops import FlopMeter
from tokenwise.models.questions import QuestionInputs, load_vision_language
from tokenwise.models.vision_language import vision_language_model
from tokenwise.reduction.apply import reduce
from tokenwise.reduction.base import TokenReducer
from tokenwise.reduction.decoder import DecoderReduction
from tokenwise.reduction.dense import Dense
from tokenwise.reduction.inputs import InputReduction

WARM = 2
"""Questions before anything is timed; memory is measured on them."""
METERED = 8
"""Questions on which operations, tokens, the cache and scoring are measured, evenly spread."""
TIMED = 24
"""Questions whose prompts are timed, evenly spread; where there are fewer they are taken again."""
EXAMPLES = 4
"""Images that the report draws."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Measure the job's method on every question, and the time of reading a prompt with the dense model's in turn.

    One question goes through the model at a time, so that nothing is padded.
    """
    questions = Questions.load(job.task["held_out_rows"])
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = load_vision_language(job.task["model"]).to(device)
    method = build_method(job, "reduction")
    assert isinstance(method, TokenReducer)
    asked = _Asked(model, QuestionInputs(job.task["model"]), questions, method, job.task["max_new_tokens"])
    with torch.no_grad():
        memory = PeakMemory(device)
        with asked.reduced():
            memory.resume()
            for index in asked.spread(WARM):
                asked.write(asked.batch(index))
            memory.pause()
        quality, written = _measure(asked, progress)
        seconds, dense_seconds = _time(asked)
        costs = _meter(asked)
        scoring = None if isinstance(method, Dense) else _scoring(asked)
        example = _example(asked, written)
    if not quality.finite:
        raise RunFailed("The loss of an answer is not finite.")
    return Result(
        job=job,
        status="finished",
        quality=quality,
        costs=replace(
            costs,
            wall_seconds=seconds,
            dense_seconds=dense_seconds,
            scoring_seconds=scoring,
            peak_memory_bytes=memory.peak,
        ),
        example=example,
        versions=versions_of(device),
    )


class _Forced(LogitsProcessor):
    """Makes a model write given tokens."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = iter(ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, float("-inf")).index_fill_(
            1, torch.tensor([next(self._ids)]).to(scores.device), 0
        )


class _Asked:
    """A model, the questions it is asked, and the method that reduces what it reads."""

    def __init__(
        self, model: Any, inputs: QuestionInputs, questions: Questions, method: TokenReducer, max_new_tokens: int
    ) -> None:
        self.model, self.inputs, self.questions, self.method = model, inputs, questions, method
        self.layout = vision_language_model(model)
        self._most = max_new_tokens
        # As in generation, where the model knows how: no logits but the last token's.
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def reduced(self) -> AbstractContextManager[Any]:
        """The model with fewer tokens; the dense one without any hook."""
        return nullcontext() if isinstance(self.method, Dense) else reduce(self.model, self.method)

    def spread(self, count: int) -> list[int]:
        """So many questions, evenly spread; all where there are fewer."""
        return np.unique(np.linspace(0, len(self.questions) - 1, count).round().astype(int)).tolist()

    def batch(self, index: int) -> Any:
        """The model's inputs for a question, its image in the model's type."""
        made = self.inputs(self.questions.picture(index), self.questions.questions[index])
        return made.to(self.device, self.model.dtype)

    def prefill(self, batch: Any) -> Any:
        """Read a prompt."""
        return self.model(**batch, use_cache=True, **self._last)

    def write(self, batch: Any) -> str:
        """What the model answers, always the likeliest token."""
        ids = self._generate(batch, self._most)
        return self.inputs.text(ids[0, batch["input_ids"].shape[1] :])

    def losses(self, batch: Any, answer: list[int]) -> list[float]:
        """Negative log-likelihood of each token of an answer, in nats.

        The answer is written, not read with the prompt: what is kept must not follow from it.
        """
        found = self._generate(
            batch,
            len(answer),
            _Forced(answer),
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(found.logits).float()
        return F.cross_entropy(logits, torch.tensor(answer, device=logits.device), reduction="none").double().tolist()

    def _generate(self, batch: Any, count: int, *processors: LogitsProcessor, **options: Any) -> Any:
        tokenizer = self.inputs.processor.tokenizer
        own = self.model.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        greedy = GenerationConfig(
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            eos_token_id=sorted(ends) or None,
            # An answer holds no images: a placeholder in it would be looked for among the prompt's.
            suppress_tokens=[getattr(self.model.config, f"{modality}_token_id") for modality in self.layout.modalities],
            **options,
        )
        return self.model.generate(**batch, generation_config=greedy, logits_processor=LogitsProcessorList(processors))


def _measure(asked: _Asked, progress: Progress) -> tuple[QuestionQuality, list[str]]:
    """The quality on all questions, and what was answered."""
    nll, tokens, written = [], [], []
    questions = asked.questions
    with asked.reduced():
        for index in range(len(questions)):
            batch = asked.batch(index)
            written.append(asked.write(batch))
            losses = asked.losses(batch, asked.inputs.answer_ids(questions.questions[index], questions.answers[index]))
            nll.append(sum(losses))
            tokens.append(len(losses))
            progress({"event": "progress", "share": 0.9 * (index + 1) / len(questions)})
    right = [text == answer for text, answer in zip(written, questions.answers, strict=True)]
    return QuestionQuality(nll, tokens, right), written


def _time(asked: _Asked) -> tuple[float, float]:
    """The median time of reading a prompt, reduced and dense, one right after the other in alternating order."""
    order: list[tuple[str, Callable[[], AbstractContextManager[Any]]]]
    order = [("reduced", asked.reduced), ("dense", nullcontext)]
    times: dict[str, list[float]] = {"reduced": [], "dense": []}
    chosen = asked.spread(TIMED)
    for number in range(-WARM, TIMED):
        batch = asked.batch(chosen[number % len(chosen)])
        for name, context in order if number % 2 == 0 else reversed(order):
            with context():
                start = now(asked.device)
                asked.prefill(batch)
                seconds = now(asked.device) - start
            if number >= 0:
                times[name].append(seconds)
    return median(times["reduced"]), median(times["dense"])


def _scoring(asked: _Asked) -> float:
    """The median time that looking for the tokens to keep takes of reading a prompt."""
    found = []
    for index in asked.spread(METERED):
        batch = asked.batch(index)
        clock = Clock(asked.method, asked.device)
        with asked.reduced() as handle:
            handle.method = clock
            if isinstance(handle, InputReduction):
                handle.layout.timed = clock.timed
            asked.prefill(batch)
        found.append(clock.seconds)
    return median(found)


def _meter(asked: _Asked) -> Costs:
    """Operations, image tokens, their share over the layers, and the cache after a prompt: means over questions."""
    found: list[dict[str, float]] = []
    for index in asked.spread(METERED):
        batch = asked.batch(index)
        before = int(asked.layout.places(batch["input_ids"]).sum())
        with asked.reduced() as handle:
            with FlopMeter() as meter:
                output = asked.prefill(batch)
            after, share = _left(handle, before)
        found.append(
            {
                "flops": meter.flops,
                "cache_bytes": cache_nbytes(output.past_key_values),
                "tokens_before": before,
                "tokens_after": after,
                "token_share": share,
            }
        )
    mean = {name: fmean(costs[name] for costs in found) for name in found[0]}
    return Costs(
        flops=mean["flops"],
        cache_bytes=mean["cache_bytes"],
        tokens_before=mean["tokens_before"],
        tokens_after=mean["tokens_after"],
        token_share=mean["token_share"],
    )


def _left(handle: Any, before: int) -> tuple[int, float]:
    """Image tokens that the last layer works on, and their share of all, averaged over the layers."""
    if isinstance(handle, InputReduction):
        after = sum(len(kept) for kept in handle.kept)
        return after, after / before
    if isinstance(handle, DecoderReduction):
        assert handle.last is not None
        return handle.last.counts[0], handle.stats["mean_share"]
    return before, 1.0


def _example(asked: _Asked, written: list[str]) -> dict[str, list[Any]] | None:
    """A few images and what is kept of each; None where tokens are not a plain grid of patches."""
    drawn = []
    for index in asked.spread(EXAMPLES):
        batch = asked.batch(index)
        pixels = batch.get("pixel_values")
        if pixels is None or pixels.dim() != 4 or pixels.shape[0] != 1:
            continue  # tiles, or patches without a grid
        before = int(asked.layout.places(batch["input_ids"]).sum())
        with asked.reduced() as handle:
            asked.prefill(batch)
        picture = selection_of(_group(handle, before), asked.model, pixels, asked.questions.picture(index))
        if picture is not None:
            texts = {"question": asked.questions.questions[index], "label": asked.questions.answers[index]}
            drawn.append({**picture, **texts, "prediction": written[index]})
    return {"pictures": drawn} if drawn else None


def _group(handle: Any, before: int) -> Tensor:
    """Which of the tokens that are left in the last layer each image token is in, [before]; -1 where it is in none."""
    if isinstance(handle, InputReduction):
        return handle.group[0]
    return selected(handle.kept[0], before) if isinstance(handle, DecoderReduction) else torch.arange(before)
