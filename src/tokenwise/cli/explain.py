"""`tokenwise explain`: which tokens of a text a weighting method attends to, drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.errors import InputError, Problem, missing_file

if TYPE_CHECKING:
    from tokenwise.cli.token_view import TokenView


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "explain",
        help="show which tokens of a text a method gives weight to",
        description="Show the weight that a method gives to every token of a text, as training on it would.",
        epilog="Example: tokenwise explain ./model 'some text' --method excess_loss -p reference=./reference-model",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model, or its id on the hub")
    parser.add_argument("text", metavar="TEXT", help="the text itself, @FILE, or - for standard input")
    parser.add_argument("--method", metavar="NAME", required=True, help="a name, or ./file.py:ClassName")
    parser.add_argument(
        "-p",
        dest="fields",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a field of the method, such as keep=0.5; repeat it for more",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a self-contained page as well")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    text = _read_text(options.text)
    fields = dict(_field(word) for word in options.fields)

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.cli.token_view import print_view, write_html

    logging.disable_progress_bar()
    view = explain(options.model, text, options.method, fields)
    console = Console()
    print_view(console, view)
    if options.html is not None:
        write_html(options.html, view)
        console.print(f"Page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _read_text(argument: str) -> str:
    if argument == "-":
        return sys.stdin.read()
    if argument.startswith("@"):
        path = Path(argument[1:])
        if not path.is_file():
            raise InputError(missing_file("TEXT", path))
        return path.read_text(encoding="utf-8")
    return argument


def _field(word: str) -> tuple[str, Any]:
    from tokenwise.comparison.yaml_file import parse_value

    name, equals, value = word.partition("=")
    if not equals or not name:
        raise InputError(Problem("-p", f"{word!r} is not a field and its value.", "Write -p keep=0.5."))
    return name, parse_value(value)


def explain(model_name: str, text: str, method_name: str, fields: dict[str, Any]) -> TokenView:
    """The weight that a method gives to every token of a text.

    Args:
        model_name: folder or hub id of a causal language model with a fast tokenizer.
        text: what to look at, at least two tokens long and within the model's context.
        method_name: as `catalog.load_class` takes it.
        fields: the method's fields.

    Raises:
        InputError: when the model, the text or the method cannot be used.
    """
    from tokenwise import catalog
    from tokenwise.cli.token_view import TokenView
    from tokenwise.models.load import load_tokenizer, locate, make_or_load_model, max_positions
    from tokenwise.weighting.apply import token_weights
    from tokenwise.weighting.base import TokenWeighter

    method = catalog.build({method_name: fields}, "--method")
    if not isinstance(method, TokenWeighter):
        raise InputError(
            Problem("--method", f"{method_name!r} gives no weights to tokens.", "See `tokenwise methods`.")
        )
    directory = locate(model_name, field="MODEL")
    tokenizer = load_tokenizer(directory, "MODEL")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if len(ids) < 2:
        message = f"has {len(ids)} tokens; the first is never predicted, so at least two are needed."
        raise InputError(Problem("TEXT", message))
    model = make_or_load_model(directory, seed=0, tokenizer=tokenizer, field="MODEL").eval()
    limit = max_positions(model.config)
    if limit is not None and len(ids) > limit:
        message = f"has {len(ids)} tokens, and the model reads at most {limit}."
        raise InputError(Problem("TEXT", message, "Give a shorter text."))
    found = token_weights(model, method, ids)
    settings = f" ({', '.join(f'{name} {value}' for name, value in fields.items())})" if fields else ""
    return TokenView(
        title=f"{method_name}{settings} on {model_name}",
        tokens=token_texts(text, encoded["offset_mapping"], list(tokenizer.convert_ids_to_tokens(ids))),
        weights=found.weights,
        nll=found.nll,
    )


def token_texts(text: str, offsets: list[tuple[int, int]], names: list[str]) -> list[str]:
    """The piece of the text that each token stands for; joined they give the text, special tokens apart.

    What lies between two tokens goes to the later one. A character that several tokens share goes to the first of
    them; the others show a dot. A special token shows its name.
    """
    pieces = []
    position = 0
    for (start, end), name in zip(offsets, names, strict=True):
        pieces.append(text[position:end] or (name if start == end else "·"))
        position = max(position, end)
    return pieces
