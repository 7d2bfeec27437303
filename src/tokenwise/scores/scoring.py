"""Computing a score store: in one process, or shard by shard on a Ray cluster; resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import torch
from filelock import FileLock, Timeout
from torch import nn

import tokenwise
from tokenwise import cluster, fingerprint
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.models.adapters import adapters_disabled, has_adapters, parameters_fingerprint
from tokenwise.models.head import base_of, check_head, output_head
from tokenwise.models.load import has_tokenizer, load_model, load_tokenizer, locate, max_positions, read_config
from tokenwise.models.machine import speed_of
from tokenwise.scores.layout import (
    COLUMNS,
    Cost,
    Manifest,
    Shard,
    add_cost,
    is_store,
    read_cost,
    read_facts,
    table_facts,
    write_shard,
)
from tokenwise.scores.rows import Encoder, Source, kind_of, make_shards, open_source
from tokenwise.scores.scorer import Scorer
from tokenwise.scores.store import ScoreStore

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


def score(
    model: str | Path | nn.Module,
    data: Any,
    out: str | Path,
    *,
    field: str = "text",
    statistics: Sequence[str] = ("logp",),
    top_k: int = 16,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    shard_tokens: int = 2**19,
    adapters: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ray: str | None = None,
    console: Console | None = None,
) -> ScoreStore:
    """Compute statistics of every token of a data set under a model, once, and keep them on disk.

    What is stored, and how, says `tokenwise.scores.layout`. A run that was stopped continues with the shard it was at
    when it is called again with the same arguments, and gives the same files as an uninterrupted one; a finished one
    answers at once.

    Args:
        model: a local directory or a hub id (fp32 on the CPU; on a GPU in the type it was saved in), or a model in
            memory, run as it is.
        data: a path, a glob or a list of them (text files, JSON lines, JSON, Parquet, folders that datasets saved), a
            `datasets.Dataset`; or a list of records or of rows of token ids. Files are streamed.
        out: folder of the store; made if missing.
        field: the field or column to read. It may hold text (tokenised with special tokens), messages (which go
            through the tokenizer's chat template), or rows of token ids.
        statistics: of ``logp`` (log-probability of the token), ``entropy`` (of its distribution), ``rank`` (how many
            tokens are more likely) and ``top_k`` (the most likely tokens and their log-probabilities); in nats.
        top_k: how many tokens the statistic ``top_k`` keeps.
        max_length: rows are cut to their first so many tokens; the model's longest sequence unless given.
        batch_tokens: tokens of a forward pass at most, padding included.
        shard_tokens: tokens after which a file ends, the most that is lost when a run is killed. Rows of a shard are
            held in memory.
        adapters: False scores with the base model under the adapters of a PEFT model.
        tokenizer: for a model in memory; a directory's own unless given.
        ray: address of a Ray cluster whose workers compute the shards, or ``local``.
        console: where to show the progress; nowhere unless given.

    Returns:
        The finished store, open.

    Raises:
        InputError: when model, data or options cannot be used, or the folder holds other scores or other files.
    """
    _check_options(statistics, top_k, max_length, batch_tokens, shard_tokens)
    if ray is not None:
        cluster.require_ray()
    source = open_source(data, field)
    asked = _Model(model, tokenizer, adapters)
    limit = max_positions(asked.config)
    if limit is not None and max_length is not None and max_length > limit:
        message = f"{max_length} is more than the model reads ({limit})."
        raise InputError(Problem("max_length", message, f"Write at most {limit}."))
    if "top_k" in statistics and top_k > asked.vocabulary:
        raise InputError(Problem("top_k", f"{top_k} is more than the vocabulary of {asked.vocabulary} tokens."))
    kind = next((kind for _, value in source.values() if (kind := kind_of(value)) != "empty"), "empty")
    if kind == "empty":
        raise InputError(Problem("data", f"all {source.count} records are empty."))
    encoder = Encoder(kind, asked.tokenizer, asked.vocabulary, max_length or limit)
    encoder.check()
    manifest = Manifest(
        model={"name": asked.name, "fingerprint": asked.fingerprint(), "adapters": adapters},
        tokenizer=None if asked.tokenizer is None else fingerprint.of_vocabulary(asked.tokenizer),
        vocabulary=asked.vocabulary,
        data={"names": source.names, "fingerprint": source.fingerprint, "field": field},
        statistics=[name for name in COLUMNS if name in statistics],
        top_k=top_k if "top_k" in statistics else 0,
        max_length=max_length or limit,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
        dtype=str(asked.dtype).removeprefix("torch."),
        tokenwise=tokenwise.__version__,
    )
    folder = Path(out)
    with _locked(folder):
        if not _finished(folder, manifest):
            manifest.write(folder)
            scorer = Scorer(asked.load(to_device=ray is None), manifest.statistics, top_k, batch_tokens, adapters)
            _run(folder, manifest, source, encoder, scorer, ray, console)
    return ScoreStore(folder)


def _check_options(
    statistics: Sequence[str], top_k: int, max_length: int | None, batch_tokens: int, shard_tokens: int
) -> None:
    problems = [
        Problem("statistics", f"there is no statistic {name!r}.", nearest(name, COLUMNS))
        for name in statistics
        if name not in COLUMNS
    ]
    if not statistics or isinstance(statistics, str):
        problems = [Problem("statistics", f"{statistics!r} is no list of names.", f"Known: {', '.join(COLUMNS)}.")]
    for name, value, least in (
        ("top_k", top_k, 1),
        ("max_length", max_length, 2),
        ("batch_tokens", batch_tokens, 1),
        ("shard_tokens", shard_tokens, 1),
    ):
        if value is not None and value < least:
            problems.append(Problem(name, f"{value} is too small.", f"Write at least {least}."))
    if problems:
        raise InputError(problems)


class _Model:
    """What scores: a saved model that is loaded when it is needed, or one in memory."""

    def __init__(
        self, model: str | Path | nn.Module, tokenizer: PreTrainedTokenizerBase | None, adapters: bool
    ) -> None:
        self._model = model
        self._adapters = adapters
        if isinstance(model, nn.Module):
            base = base_of(model)
            if not adapters and not has_adapters(model):
                with adapters_disabled(model):
                    pass
            if adapters and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                message = "a learnt prompt comes before the tokens, which scores do not know."
                raise InputError(Problem("model", message, "Score with adapters=False, or another kind of adapter."))
            check_head(base)
            self.name, self.config, self.tokenizer = type(base).__name__, base.config, tokenizer
            self.vocabulary, self.dtype = output_head(base).vocabulary, base.dtype
            return
        if not adapters:
            fix = "Give the PEFT model itself, in Python."
            raise InputError(Problem("adapters", f"{str(model)!r} is loaded without adapters anyway.", fix))
        self._directory = locate(model, field="MODEL")
        self.name, self.config = str(model), read_config(self._directory, "MODEL")
        self.vocabulary = self.config.get_text_config().vocab_size
        on_gpu = torch.cuda.is_available()
        self.dtype = (self.config.dtype if on_gpu else None) or torch.float32
        if tokenizer is None and has_tokenizer(self._directory):
            tokenizer = load_tokenizer(self._directory, "MODEL")
        self.tokenizer = tokenizer

    def fingerprint(self) -> str:
        if isinstance(self._model, nn.Module):
            return parameters_fingerprint(base_of(self._model), self._adapters)
        return fingerprint.of_model(self._directory)

    def load(self, to_device: bool) -> nn.Module:
        if isinstance(self._model, nn.Module):
            return self._model
        model = load_model(self._directory, "MODEL").eval().requires_grad_(False)
        nn.Module.to(model, "cuda" if to_device and torch.cuda.is_available() else "cpu", self.dtype)
        check_head(model)
        if output_head(model).vocabulary != self.vocabulary:
            raise InputError(Problem("MODEL", f"its head gives {output_head(model).vocabulary} logits, and its config "
                                     f"says {self.vocabulary}.", "Save it again."))  # fmt: skip
        return model


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder. The system drops the lock of a process that dies."""
    if folder.exists() and not folder.is_dir():
        raise InputError(Problem("out", f"{str(folder)!r} is a file.", "Name a folder."))
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()) and not is_store(folder):
        raise InputError(Problem("out", f"{str(folder)!r} holds other files.", "Name a new or empty folder."))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another run writes scores to {str(folder)!r}."
        raise InputError(Problem("out", message, "Wait for it, or use another folder.")) from None
    try:
        yield
    finally:
        lock.release()


def _finished(folder: Path, manifest: Manifest) -> bool:
    """Whether these scores are all there; what a killed run left half-written is removed."""
    if not is_store(folder):
        return False
    before = Manifest.read(folder, "out")
    theirs, ours = before.deciding(), manifest.deciding()
    problems = [
        Problem(
            "out",
            f"{str(folder)!r} holds scores with {name} {theirs[name]!r}, and this run has {ours[name]!r}.",
            "Use another folder, or delete this one.",
        )
        for name in ours
        if theirs[name] != ours[name]
    ]
    if problems:
        raise InputError(problems)
    for pattern in (".shard-*", ".manifest*"):
        for half in folder.glob(pattern):
            half.unlink()
    return before.complete


def _run(
    folder: Path,
    manifest: Manifest,
    source: Source,
    encoder: Encoder,
    scorer: Scorer,
    ray: str | None,
    console: Console | None,
) -> None:
    totals = dict.fromkeys(("records", "rows", "tokens", "truncated"), 0)
    shards = 0
    with _Display(console, source.count) as display:

        def to_do() -> Iterator[Shard]:
            for found in make_shards(source, encoder, manifest.shard_tokens, lambda index: read_facts(folder, index)):
                if isinstance(found, Shard):
                    yield found
                else:
                    count(found, scored=False)

        def count(facts: dict[str, int], scored: bool) -> None:
            nonlocal shards
            shards += 1
            for name in totals:
                totals[name] += facts[name]
            display.update(facts["records"], facts["tokens"] if scored else 0)

        tables = _here(scorer, to_do()) if ray is None else _on_cluster(ray, scorer, to_do())
        for table, cost in tables:
            add_cost(folder, table_facts(table)["index"], cost)
            count(write_shard(folder, table), scored=True)
    replace(
        manifest,
        complete=True,
        shards=shards,
        rows=totals["rows"],
        tokens=totals["tokens"],
        truncated=totals["truncated"],
        empty=totals["records"] - totals["rows"],
        cost=read_cost(folder, shards),
    ).write(folder)


def _here(scorer: Scorer, shards: Iterator[Shard]) -> Iterator[tuple[pyarrow.Table, Cost]]:
    """The tables of the shards in their order, and what each cost."""
    machine = speed_of(base_of(scorer.model).device)
    for shard in shards:
        table, cost = scorer.table(shard)
        yield table, replace(cost, machine=machine)


def _on_cluster(address: str, scorer: Scorer, shards: Iterator[Shard]) -> Iterator[tuple[pyarrow.Table, Cost]]:
    """The tables of the shards as they are ready, in any order, and what each cost. Every worker holds the model once.

    The seconds of workers beside one another are those of no machine.
    """
    import ray
    from ray.util import ActorPool

    connected_here = cluster.connect(address)
    actors = []
    try:
        threads, gpus = cluster.worker_resources()
        held = ray.put(scorer)
        available = ray.cluster_resources()
        count = int(available["GPU"] if gpus else available["CPU"] // threads)
        kind: Any = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=3, max_task_retries=3)(_Worker)
        actors = [kind.remote(held, threads) for _ in range(max(1, count))]
        pool = ActorPool(actors)
        for shard in shards:
            while not pool.has_free():
                yield pool.get_next_unordered()
            pool.submit(lambda actor, value: actor.table.remote(value), shard)
        while pool.has_next():
            yield pool.get_next_unordered()
    finally:
        for actor in actors:
            ray.kill(actor)
        if connected_here:
            ray.shutdown()


class _Worker:
    """A process on the cluster that scores shards one after the other."""

    def __init__(self, scorer: Scorer, threads: int) -> None:
        torch.set_num_threads(threads)
        self._scorer = scorer
        nn.Module.to(scorer.model, "cuda" if torch.cuda.is_available() else "cpu")

    def table(self, shard: Shard) -> tuple[pyarrow.Table, Cost]:
        table, cost = self._scorer.table(shard)
        return table, replace(cost, seconds=None)


class _Display(AbstractContextManager["_Display"]):
    """Records done, tokens a second and the time left; on anything but a terminal a line per shard."""

    def __init__(self, console: Console | None, records: int) -> None:
        self._console = console
        self._records = records
        self._done = 0
        self._scored_records = 0
        self._tokens = 0
        self._started = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> _Display:
        if self._console is not None and self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}", markup=False))
            self._live = Progress(*columns, console=self._console, transient=True, refresh_per_second=2)
            self._bar = self._live.add_task("records", total=self._records, now="")
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, records: int, tokens: int) -> None:
        """Count a shard that was computed, or with ``tokens=0`` one that was there already."""
        self._done += records
        self._tokens += tokens
        self._scored_records += records if tokens else 0
        if self._console is None:
            return
        seconds = time.monotonic() - self._started
        now = "found finished"
        if self._scored_records:
            left = max(0, self._records - self._done) * seconds / self._scored_records
            now = f"{self._tokens / seconds:,.0f} tokens/s, {left / 60:.0f} min left"
        if self._live is not None:
            self._live.update(self._bar, completed=self._done, now=now)
        else:
            line = f"{self._done:,} of {self._records:,} records: {now}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
