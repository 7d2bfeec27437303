"""`tokenwise evict`: a model's answer with less in its key-value cache, beside its answer with all of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.cli.method_fields import add_fields, read_fields
from tokenwise.cli.text_argument import read_text
from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from tokenwise.comparison.cache_trial import CacheTrial


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "evict",
        help="see what a model answers with less in its cache, how fast, and what of the prompt was kept",
        description="Give prompts to a language model with its full key-value cache and with a method's: the answers, "
        "the tokens, the memory and the time before and after, and the prompt coloured by what was kept.",
        epilog="Example: tokenwise evict ./model --method snap_kv --keep 0.25 @report.txt",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model, or its id on the hub")
    parser.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="+",
        help="each a prompt of its own: the text, @FILE, or - for standard input",
    )
    parser.add_argument("--method", metavar="NAME", required=True, help="a method of the cache; see tokenwise methods")
    parser.add_argument(
        "--keep",
        "--budget",
        metavar="K",
        help="what stays, such as 0.25, '1024 tokens' or '2 GiB' (default: the method's)",
    )
    add_fields(parser, "sink=4")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=40, help="tokens of an answer (default: 40)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise InputError(Problem("--max-new-tokens", f"{options.max_new_tokens} is less than 1."))
    prompts = [read_text(prompt, "PROMPT") for prompt in options.prompts]

    from tokenwise import catalog
    from tokenwise.comparison.yaml_file import parse_value

    fields = read_fields(options.fields) | ({} if options.keep is None else {"keep": parse_value(options.keep)})
    method = catalog.build({options.method: fields}, "--method", Path.cwd(), "cache")

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.comparison.cache_trial import try_out

    logging.disable_progress_bar()
    console = Console()
    found = try_out(options.model, method, prompts, options.max_new_tokens)
    for line in [found.method, *found.remarks]:
        console.print(line, markup=False, highlight=False, style="dim")
    for trial in found.trials:
        _print(trial, console)
    return 0


def _print(trial: CacheTrial, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tokenwise.cli.token_view import colour, coloured, has_colours

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "full cache", "method's"):
        table.add_column(name)
    for name, before, after in trial.lines():
        table.add_row(Text(name), Text(before), Text(after))
    console.print(table)
    word = "read" if trial.selects else "kept"
    meaning = f"share of layers and heads that {'read it in the last step' if trial.selects else 'keep the token'}"
    if not has_colours(console):
        for line in [f"    {word}  token ({meaning})", *_numbers(trial)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(coloured(trial.tokens, [colour(share) if share else "dim" for share in trial.shares]))
    console.print()
    steps = [step / 4 for step in range(5)]
    legend = coloured([f" {step:g} " for step in steps], [colour(step) if step else "dim" for step in steps])
    console.print(Text(f"{word} ") + legend + Text(f"  {meaning}"))


def _numbers(trial: CacheTrial) -> list[str]:
    return [f"{share:8.2f}  {token!r}" for share, token in zip(trial.shares, trial.tokens, strict=True)]
