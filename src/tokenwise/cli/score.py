"""`tokenwise score`: statistics of every token, computed once and kept on disk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenwise.errors import InputError, Problem


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "score",
        help="compute statistics of every token under a model, once, and keep them on disk",
        description="Compute the log-probability (and what else is asked for) of every token of a data set under a "
        "model, and keep it in Parquet files. Methods with a reference read from there: give the folder as their "
        "reference. A run that was stopped continues where it was.",
        epilog="Example: tokenwise score ./reference-model tokenised.parquet --field input_ids --out scores",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model, or its id on the hub")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="text files, JSON lines, JSON, Parquet, folders that datasets saved; or a plan of `tokenwise compare`, "
        "whose training data is then scored row by row as it is trained on",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the scores")
    parser.add_argument(
        "--field",
        metavar="NAME",
        default="text",
        help="field with text, messages or token ids, such as messages or input_ids (default: text)",
    )
    parser.add_argument(
        "--statistics",
        metavar="LIST",
        default="logp",
        help="of logp, entropy, rank, top_k, with commas (default: logp)",
    )
    parser.add_argument("--top-k", metavar="K", type=int, help="tokens that the statistic top_k keeps (default: 16)")
    parser.add_argument("--max-length", metavar="N", type=int, help="cut rows to N tokens (default: the model's limit)")
    parser.add_argument(
        "--batch-tokens", metavar="N", type=int, default=8192, help="tokens of a forward pass (default: 8192)"
    )
    parser.add_argument("--ray", metavar="ADDRESS", help="compute on this Ray cluster (needs tokenwise[ray])")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    statistics = [name.strip() for name in options.statistics.split(",")]
    if options.top_k is not None and "top_k" not in statistics:
        raise InputError(Problem("--top-k", "only says how many tokens the statistic top_k keeps.",
                                 f"Add --statistics {options.statistics},top_k."))  # fmt: skip

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.scores import score

    logging.disable_progress_bar()
    console = Console()
    with _data(options) as (data, field):
        store = score(
            options.model,
            data,
            options.out,
            field=field,
            statistics=statistics,
            top_k=16 if options.top_k is None else options.top_k,
            max_length=options.max_length,
            batch_tokens=options.batch_tokens,
            ray=options.ray,
            console=console,
        )
    made = store.manifest
    console.print(f"{made.rows:,} rows, {made.tokens:,} tokens: {', '.join(store.columns)}", highlight=False)
    if made.truncated:
        console.print(f"{made.truncated:,} of them cut to {made.max_length} tokens", highlight=False)
    if made.empty:
        console.print(f"{made.empty:,} more without a token, left out", highlight=False)
    console.print(f"Scores: {options.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _data(options: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """What to score, and the field to read: files as they are named, or the rows that a plan trains on."""
    plans = [name for name in options.data if Path(name).suffix in (".yaml", ".yml")]
    if not plans:
        yield options.data, options.field
        return
    given = (("--field", options.field != "text"), ("--max-length", options.max_length), ("DATA", options.data[1:]))
    problems = [
        Problem(name, "does not go with a plan, which says all of it.", "Leave it out.")
        for name, is_there in given
        if is_there
    ]
    if problems:
        raise InputError(problems)

    from tokenwise.comparison.stored import rows_of_plan

    with rows_of_plan(Path(plans[0]), options.model) as rows:
        yield rows, "input_ids"
