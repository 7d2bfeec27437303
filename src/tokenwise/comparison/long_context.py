"""Runs of long context: a trained model with less of its key-value cache, beside itself with all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from tokenwise.cache.apply import evict
from tokenwise.cache.attaching import ListeningCache
from tokenwise.cache.full import Full
from tokenwise.cache.selecting import SelectingCache
from tokenwise.comparison.clock import Clock, now
from tokenwise.comparison.contexts import Contexts
from tokenwise.comparison.memory import PeakMemory
from tokenwise.comparison.quality import ContinuationQuality, Quality, RecallQuality
from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.comparison.training import Progress, RunFailed, build_method, versions_of
from tokenwise.models import load
from tokenwise.models.cache_memory import cache_nbytes

WARM = 2
"""Rows before anything is timed; memory is measured on them."""
METERED = 8
"""Rows on which tokens, bytes and scoring are measured, evenly spread."""
TIMED = 16
"""Rows that are timed, evenly spread; where there are fewer they are taken again."""
STEPS = 16
"""Tokens written after each prompt that is timed."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Measure the job's method on every row, and its time with the full cache's in turn.

    One row goes through the model at a time, so that nothing is padded.
    """
    rows = Contexts.load(job.task["held_out_rows"])
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(job.task["model"], use_safetensors=True, trust_remote_code=False)
    method = build_method(job, "cache")
    reader = Reader(model.eval().to(device), method, rows, job.budget.get("way") == "hidden")
    with torch.no_grad():
        memory = PeakMemory(device)
        memory.resume()
        for index in reader.spread(WARM):
            first, cache = reader.first(index), reader.cache()
            reader.forward(first, cache)
            reader.write(cache, first[:, -1:], STEPS)
        memory.pause()
        quality: Quality
        if rows.continuations:
            quality = _continue(reader, progress)
        else:
            tokenizer = load.load_tokenizer(job.task["model"])
            quality = _ask(reader, tokenizer, job.task["max_new_tokens"], progress)
        costs = _costs(reader)
    if not quality.finite:
        raise RunFailed("The loss of an answer is not finite.")
    return Result(
        job=job,
        status="finished",
        quality=quality,
        costs=replace(costs, peak_memory_bytes=memory.peak),
        versions=versions_of(device),
    )


@dataclass
class Read:
    """A prompt that was read.

    Args:
        cache: what was stored of it.
        ids: all its tokens, [1, tokens].
        rest: how many of the last ones are still to be read.
    """

    cache: Any
    ids: Tensor
    rest: int


class Reader:
    """A model that reads rows, and the method that evicts from its cache.

    Args:
        model: on its device.
        method: what is evicted by; `Full` uses the stock cache.
        rows: what is read.
        hidden: whether the context alone is read and evicted from, before the question follows.
    """

    def __init__(self, model: Any, method: Any, rows: Contexts, hidden: bool) -> None:
        self.model, self.method, self.rows, self.hidden = model, method, rows, hidden

    def spread(self, count: int) -> list[int]:
        """So many rows, evenly spread; all where there are fewer."""
        return np.unique(np.linspace(0, len(self.rows) - 1, count).round().astype(int)).tolist()

    def cache(self, full: bool = False) -> Any:
        """A new cache, by the method unless the `full` one is asked for."""
        if full or isinstance(self.method, Full):
            return DynamicCache(config=self.model.config)
        return evict(self.model, self.method)

    def first(self, index: int) -> Tensor:
        """What a method sees of a row before it evicts, [1, tokens]."""
        context, question, _ = self.rows.parts(index)
        return self._ids(context if self.hidden else context + question)

    def read(self, index: int) -> Read:
        """Read a row up to where its answer follows from what is left in the cache.

        Where the method has seen the whole prompt, its last token is taken back, to be read again from the smaller
        cache; else no answer's first token would say anything of it.
        """
        context, question, _ = self.rows.parts(index)
        ids, first, cache = self._ids(context + question), self.first(index), self.cache()
        if not self.hidden:
            # Layers with a window hold what is needed to go back, until they are cropped.
            windows = [layer for layer in cache.layers if hasattr(layer, "activate_past_recording")]
            for layer in windows:
                layer.activate_past_recording()
            self.forward(first, cache)
            take_back(cache)
            for layer in windows:
                layer.record_past = False
            return Read(cache, ids, 1)
        self.forward(first, cache)
        if self.method.mode == "select" and not self.method.parts:
            # Such a method has the parts of a prompt read everything: the question is read as what is written is.
            for token in question[:-1]:
                self.forward(self._ids([token]), cache)
            return Read(cache, ids, 1)
        return Read(cache, ids, len(question))

    def forward(self, ids: Tensor, cache: Any, last: bool = True) -> Tensor:
        """The logits of the last token, or of all, [1, tokens, vocabulary]."""
        options = {"logits_to_keep": 1} if last else {}
        found: Tensor = self.model(ids, past_key_values=cache, use_cache=True, **options).logits
        return found

    def write(self, cache: Any, ids: Tensor, count: int) -> None:
        """Read a token, [1, 1], and write so many, each the likeliest one."""
        for _ in range(count):
            ids = self.forward(ids, cache).argmax(-1)

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)


def take_back(cache: Any) -> None:
    """Forget the last token that a cache has seen."""
    if hasattr(cache, "take_back"):
        cache.take_back(1)
    else:  # all tokens are stored
        cache.crop(-1)


def losses(reader: Reader, index: int, wanted: list[int]) -> list[float]:
    """Negative log-likelihood of each token of an answer or a continuation, in nats, as it would be written.

    Read at once where nothing is evicted while tokens are written: then both are the same.
    """
    method, read = reader.method, reader.read(index)
    target = torch.tensor([wanted], device=read.ids.device)
    rest, fed = read.ids[:, -read.rest :], target[:, :-1]
    once = method.mode == "evict" and method.interval is None
    pieces = [rest, *(fed.split(fed.shape[1] if once else 1, 1) if fed.shape[1] else ())]
    logits = torch.cat([reader.forward(piece, read.cache, last=False) for piece in pieces], 1)
    logits = logits[0, read.rest - 1 :].float()
    return F.cross_entropy(logits, target[0], reduction="none").double().tolist()


def _continue(reader: Reader, progress: Progress) -> ContinuationQuality:
    nll, tokens = [], []
    rows = reader.rows
    for index in range(len(rows)):
        found = losses(reader, index, rows.parts(index)[2])
        nll.append(sum(found))
        tokens.append(len(found))
        progress({"event": "progress", "share": 0.9 * (index + 1) / len(rows)})
    return ContinuationQuality(nll, tokens)


def _ask(reader: Reader, tokenizer: Any, most: int, progress: Progress) -> RecallQuality:
    rows = reader.rows
    own = reader.model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    greedy = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        use_cache=True,
        pad_token_id=load.padding_id(tokenizer),
        eos_token_id=sorted(ends) or None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    nll, tokens, right = [], [], []
    for index, expected in enumerate(rows.expected):
        answer = rows.parts(index)[2]
        read = reader.read(index)
        found = reader.model.generate(
            read.ids,
            attention_mask=torch.ones_like(read.ids),
            past_key_values=read.cache,
            generation_config=greedy,
        )
        ids = found.sequences[0, read.ids.shape[1] :].tolist()
        right.append(tokenizer.decode(ids, skip_special_tokens=True).strip() == expected)
        if ids[: len(answer)] == answer:
            logits = torch.cat(found.logits[: len(answer)]).float()
            wanted = torch.tensor(answer, device=logits.device)
            loss = F.cross_entropy(logits, wanted, reduction="none").double().tolist()
        else:
            loss = losses(reader, index, answer)
        nll.append(sum(loss))
        tokens.append(len(answer))
        progress({"event": "progress", "share": 0.9 * (index + 1) / len(rows)})
    depth = [] if np.isnan(rows.depth).any() else rows.depth.tolist()
    return RecallQuality(nll, tokens, right, depth)


def _costs(reader: Reader) -> Costs:
    """What is stored after what a method sees of a prompt, beside what the full cache stores; the median time of
    reading it and of writing a token, with both caches one right after the other in alternating order."""
    stored: list[dict[str, float]] = []
    scoring: list[tuple[float, float]] = []
    for index in reader.spread(METERED):
        first, cache, full = reader.first(index), reader.cache(), reader.cache(full=True)
        reader.forward(first, cache)
        reader.forward(first, full)
        tokens, stats = first.shape[1], getattr(cache, "stats", {})
        found = {
            "cache_bytes": cache.nbytes() if hasattr(cache, "nbytes") else cache_nbytes(cache),
            "full_cache_bytes": cache_nbytes(full),
            "tokens_before": tokens,
            "tokens_after": stats.get("tokens_stored", tokens),
        }
        if isinstance(cache, SelectingCache):
            reader.write(cache, first[:, -1:], 1)
            found["tokens_read"] = cache.stats["tokens_read"]
        stored.append(found)
        if isinstance(cache, ListeningCache):
            scoring.append(_scoring(reader, first))
    times: dict[str, list[float]] = {}
    chosen = reader.spread(TIMED)
    for number in range(-WARM, TIMED):
        first = reader.first(chosen[number % len(chosen)])
        for name in ("full", "evicting") if number % 2 == 0 else ("evicting", "full"):
            cache = reader.cache(full=name == "full")
            start = now(reader.model.device)
            reader.forward(first, cache)
            read = now(reader.model.device)
            reader.write(cache, first[:, -1:], STEPS)
            written = now(reader.model.device)
            if number >= 0:
                times.setdefault(f"{name} read", []).append(read - start)
                times.setdefault(f"{name} written", []).append(written - read)
    reading, writing = median(times["evicting read"]), median(times["evicting written"]) / STEPS
    mean = {name: fmean(costs[name] for costs in stored) for name in stored[0]}
    return Costs(
        wall_seconds=reading,
        dense_seconds=median(times["full read"]),
        decode_seconds=writing,
        full_decode_seconds=median(times["full written"]) / STEPS,
        token_share=mean["tokens_after"] / mean["tokens_before"],
        tokens_before=mean["tokens_before"],
        tokens_after=mean["tokens_after"],
        cache_bytes=mean["cache_bytes"],
        full_cache_bytes=mean["full_cache_bytes"],
        tokens_read=mean.get("tokens_read"),
        scoring_seconds=reading * median(share for share, _ in scoring) if scoring else None,
        decode_scoring_seconds=writing * median(share for _, share in scoring) if scoring else None,
    )


def _scoring(reader: Reader, first: Tensor) -> tuple[float, float]:
    """The shares that the method's own work has in the time of reading a prompt and of writing tokens."""
    device = reader.model.device
    clock = Clock(reader.method, device)
    with reader.cache() as cache, clock.around(cache, cache.works_in):
        start = now(device)
        reader.forward(first, cache)
        read, own = now(device), clock.seconds
        reader.write(cache, first[:, -1:], STEPS)
        written = now(device)
    return own / (read - start), (clock.seconds - own) / (written - read)
