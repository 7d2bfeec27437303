"""One method on a few prompts: what a model answers with its full cache and with less, how fast, and what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenwise.cache.base import CachePolicy, CacheSelector
from tokenwise.comparison.formatting import duration, memory, plain, ratio
from tokenwise.errors import InputError, Problem
from tokenwise.method import Method
from tokenwise.models import load
from tokenwise.models.token_text import token_texts

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class CacheTrial:
    """One prompt.

    Args:
        answers: with the full cache, and with the method's.
        seen: tokens of prompt and answer that the method's cache was given.
        kept: how many of them it stores in the end, or the last step reads, as a mean over layers and heads.
        full_bytes: what a cache of all of them takes.
        bytes: what the method's takes.
        seconds: of the whole answer, with the full cache and with the method's.
        tokens: the text of each token of the prompt; joined they are the prompt as the model reads it.
        shares: of the layers and heads that keep each of these tokens to the end, or read it in the last step; one
            item per token.
        selects: whether all tokens are stored, and some of them read at each step.
    """

    answers: tuple[str, str]
    seen: int
    kept: float
    full_bytes: int
    bytes: int
    seconds: tuple[float, float]
    tokens: Sequence[str]
    shares: Sequence[float]
    selects: bool = False

    def lines(self) -> list[tuple[str, str, str]]:
        """What is shown: a name, before and after."""
        kept = plain(self.kept, 0 if self.kept.is_integer() else 1)
        return [
            ("answer", *self.answers),
            (
                "tokens read, last step" if self.selects else "cached tokens",
                str(self.seen),
                f"{kept} ({_percent(self.kept / self.seen)})",
            ),
            ("cache", memory(self.full_bytes), f"{memory(self.bytes)} ({_percent(self.bytes / self.full_bytes)})"),
            (
                "time",
                duration(self.seconds[0]),
                f"{duration(self.seconds[1])} ({ratio(self.seconds[1] / self.seconds[0])})",
            ),
        ]


@dataclass(frozen=True)
class CacheTrials:
    """All prompts.

    Args:
        method: what was tried, in words.
        remarks: what a reader should know.
        trials: one for each prompt.
    """

    method: str
    remarks: list[str]
    trials: list[CacheTrial]


def try_out(model: str, method: Method, prompts: Sequence[str], max_new_tokens: int = 40) -> CacheTrials:
    """Give prompts to a model with its full cache and with a method's; of several likely words the first is taken.

    Args:
        model: directory or hub id of a causal language model with a fast tokenizer. Where that has a chat template
            a prompt is what the user says.
        method: a method of the cache.
        prompts: texts.
        max_new_tokens: of an answer.

    Raises:
        InputError: when the model, a prompt or the method cannot be used.
    """
    if not isinstance(method, CachePolicy | CacheSelector):
        raise InputError(
            Problem("--method", f"{method.card.id!r} is no method of the cache.", "See tokenwise methods.")
        )
    directory = load.locate(model, field="MODEL")
    tokenizer: Any = load.load_tokenizer(directory, "MODEL")
    if not tokenizer.is_fast:
        raise InputError(Problem("MODEL", "has a slow tokenizer, which does not say where its tokens stand."))
    read = [_read(prompt, tokenizer) for prompt in prompts]
    limit = load.max_positions(load.read_config(directory, "MODEL"))
    longest = max(len(ids) for ids, _ in read) + max_new_tokens
    if limit is not None and longest > limit:
        message = (
            f"has {longest - max_new_tokens} tokens, and with an answer of {max_new_tokens} the model reads {limit}."
        )
        raise InputError(Problem("PROMPT", message, "Give a shorter prompt, or --max-new-tokens."))

    import torch

    loaded: Any = load.make_or_load_model(directory, seed=0, tokenizer=tokenizer, field="MODEL").eval()
    loaded = loaded.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
    templated = (
        "written by the chat template" if tokenizer.chat_template else "read as it is: there is no chat template"
    )
    described = ", ".join(f"{name} {value}" for name, value in method.config().items() if value is not None)
    remarks = [f"The prompt is {templated}.", "Time is that of the whole answer: a longer one takes longer."]
    with torch.no_grad():
        trials = [_try(loaded, method, tokenizer, ids, tokens, max_new_tokens) for ids, tokens in read]
    return CacheTrials(f"{method.card.name} ({described})", remarks, trials)


def _read(prompt: str, tokenizer: Any) -> tuple[list[int], list[str]]:
    """The prompt's token ids, and what each of them stands for."""
    templated = bool(tokenizer.chat_template)
    if templated:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    found = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=not templated)
    ids = found["input_ids"]
    if not ids:
        raise InputError(Problem("PROMPT", "is empty."))
    return ids, token_texts(prompt, found["offset_mapping"], tokenizer.convert_ids_to_tokens(ids))


def _try(
    model: Any,
    method: CachePolicy | CacheSelector,
    tokenizer: Any,
    ids: list[int],
    tokens: list[str],
    max_new_tokens: int,
) -> CacheTrial:
    import torch
    from transformers import DynamicCache

    from tokenwise.cache.apply import evict
    from tokenwise.comparison.clock import now

    prompt = torch.tensor([ids], device=model.device)

    def answer(cache: Any) -> tuple[str, float]:
        start = now(model.device)
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=load.padding_id(tokenizer),
        )
        seconds = now(model.device) - start
        return tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True), seconds

    # The first of the two rounds warms up.
    for _ in range(2):
        before = answer(DynamicCache(config=model.config))
        cache = evict(model, method)
        with cache:
            after = answer(cache)
    kept = torch.stack([cache.kept(index)[0] for index in cache.places]).float()
    return CacheTrial(
        (before[0], after[0]),
        kept.shape[2],
        float(kept.sum(2).mean()),
        cache.full_nbytes(),
        cache.nbytes(),
        (before[1], after[1]),
        tokens,
        kept.mean((0, 1))[: len(ids)].tolist(),
        isinstance(method, CacheSelector),
    )


def _percent(share: float) -> str:
    return f"{plain(100 * share, 0)}%"
