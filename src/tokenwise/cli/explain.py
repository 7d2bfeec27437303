"""`tokenwise explain`: which tokens of a text a weighting method attends to, drawn."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.cli.method_fields import add_fields, read_fields
from tokenwise.cli.text_argument import read_text
from tokenwise.errors import InputError, Problem
from tokenwise.models.token_text import token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenwise.cli.token_view import TokenView
    from tokenwise.weighting.base import TokenWeighter
    from tokenwise.weighting.objective import Objective

_INSTEAD = {
    "classes": "It weighs whole examples of a classifier: give rows with text and label by --data.",
    "masks": "It chooses parameters, not tokens: tw.weighting.mask_parameters trains with such a mask.",
}
"""What to do with methods that give no weights, by kind."""

_COLUMNS = {
    "loss_weights": 'Give --rules \'[{"pattern": "[0-9]+", "weight": 3}]\', or a row with loss_weights by --chat.',
    "completion_mask": "Give a prompt with its response by --chat.",
    "prompt_attention": "Give a prompt with its response by --chat.",
    "sample_id": "It tells the samples of a data set apart over epochs; look at the weights in the logs of tw.weigh.",
    "base_nll": "It is a column of a scored data set; tw.weighting.token_weights takes columns.",
    "difference": "fault_pair makes it of two programs; tw.weighting.token_weights takes columns.",
    "reference_nll": "It is a column of a scored data set; tw.weighting.token_weights takes columns.",
}
"""What to give where a method reads a column that is not there."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "explain",
        help="show which tokens of a text, or examples of a file, a method gives weight to",
        description="Show the weight that a method gives to every token of a text, as training on it would; of a "
        "classifier's method to every example of a file.",
        epilog="Examples: tokenwise explain ./model 'some text' --method excess_loss -p reference=./reference-model; "
        "tokenwise explain ./model --chat rows.jsonl --method loss_weights "
        """--rules '[{"role": "assistant", "weight": 1}, {"pattern": "[0-9]+", "weight": 3}]'; """
        "tokenwise explain ./classifier --data labelled.jsonl --method logit_adjustment",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a causal language model (of a classifier for --data), or its id on the hub",
    )
    parser.add_argument("text", metavar="TEXT", nargs="?", help="the text itself, @FILE, or - for standard input")
    parser.add_argument(
        "--chat",
        metavar="FILE",
        type=Path,
        help="instead of TEXT the first row of a .json or .jsonl file, with messages, prompt and completion, or "
        "question and answer",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help="instead of TEXT, for methods of classifiers: .jsonl, .json, .parquet or a folder of datasets, of rows "
        "with text and label",
    )
    parser.add_argument("--method", metavar="NAME", required=True, help="a name, or ./file.py:ClassName")
    add_fields(parser, "keep=0.5")
    parser.add_argument("--rules", metavar="JSON", help="weights by role, turn or pattern, for loss_weights")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a self-contained page as well")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    given = [value for value in (options.text, options.chat, options.data) if value is not None]
    if len(given) != 1:
        raise InputError(Problem("TEXT", "either a text, --chat or --data is needed, and not more than one of them."))
    if options.data is not None:
        return _run_examples(options)
    source = read_text(options.text, "TEXT") if options.chat is None else _read_row(options.chat)
    rules = None if options.rules is None else _read_rules(options.rules)
    fields = read_fields(options.fields)

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.cli.token_view import print_view, write_html

    logging.disable_progress_bar()
    view = explain(options.model, source, options.method, fields, rules)
    console = Console()
    print_view(console, view)
    if options.html is not None:
        write_html(options.html, view)
        console.print(f"Page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _run_examples(options: argparse.Namespace) -> int:
    from tokenwise import catalog
    from tokenwise.weighting.classification import ClassObjective

    if options.rules is not None:
        raise InputError(Problem("--rules", "weigh tokens, and --data has examples.", "Leave them out."))
    fields = read_fields(options.fields)
    if not issubclass(catalog.load_class(options.method, "--method", family="weighting"), ClassObjective):
        message = f"{options.method!r} is no method of classifiers, which --data is for."
        raise InputError(Problem("--method", message, "Give it a text or --chat."))

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.cli.example_view import print_examples, write_examples
    from tokenwise.cli.explain_examples import explain_examples

    logging.disable_progress_bar()
    view = explain_examples(options.model, options.data, options.method, fields)
    console = Console()
    print_examples(console, view)
    if options.html is not None:
        write_examples(options.html, view)
        console.print(f"Page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _read_row(path: Path) -> dict[str, Any]:
    from tokenwise.documents import find_files, read_records

    if path.suffix.lower() not in (".json", ".jsonl"):
        raise InputError(Problem("--chat", f"{str(path)!r} is neither .json nor .jsonl.", "Write rows as JSON lines."))
    where, row = next(read_records(find_files(str(path), Path.cwd(), "--chat"), "--chat"), (repr(str(path)), None))
    if not isinstance(row, dict):
        raise InputError(Problem("--chat", f"{where} holds no row.", "A row is an object with messages, or the like."))
    return row


def _read_rules(text: str) -> list[Mapping[str, Any]]:
    try:
        rules = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(Problem("--rules", f"is not JSON: {error.msg} (column {error.colno}).")) from error
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        fix = 'Write \'[{"role": "assistant", "weight": 1}]\'.'
        raise InputError(Problem("--rules", "is not a list of rules.", fix))
    return rules


@dataclass(frozen=True)
class _Sample:
    """A text or chat as the model reads it; the sequences have one item per token.

    Args:
        ids: token ids.
        tokens: the text of each token.
        labels: token ids, -100 where nothing is learnt.
        columns: what the method reads of the data.
    """

    ids: list[int]
    tokens: list[str]
    labels: list[int]
    columns: dict[str, Sequence[float]] = field(default_factory=dict)


def explain(
    model_name: str,
    source: str | Mapping[str, Any],
    method_name: str,
    fields: dict[str, Any],
    rules: Sequence[Mapping[str, Any]] | None = None,
) -> TokenView:
    """The weight that a method gives to every token of a text or chat; for objectives see `TokenWeights.quantity`.

    Args:
        model_name: folder or hub id of a causal language model with a fast tokenizer.
        source: what to look at, at least two tokens long and within the model's context: a text, or a row with
            ``messages``, with ``prompt`` and ``completion``, or with ``question`` and ``answer``. Of a row only the
            responses are learnt (for methods that weigh prompts against completions, all). Unlearning methods forget
            it, unless a field ``forget`` of the row is false: then it is what they keep.
        method_name: as `catalog.load_class` takes it.
        fields: the method's fields.
        rules: as `segment_weights` takes them, for methods that read ``loss_weights``.

    Raises:
        InputError: when the model, the text or the method cannot be used.
    """
    from tokenwise.cli.token_view import TokenView
    from tokenwise.models.load import load_tokenizer, locate, make_or_load_model, max_positions
    from tokenwise.weighting.apply import token_weights

    method = _build(method_name, fields)
    _check_columns(method, method_name, source, rules)
    forget = _is_forgotten(source)
    directory = locate(model_name, field="MODEL")
    tokenizer = load_tokenizer(directory, "MODEL")
    where = "TEXT" if isinstance(source, str) else "--chat"
    sample = _by_rules(source, tokenizer, rules) if rules is not None else _by_role(source, tokenizer, method)
    if len(sample.ids) < 2:
        message = f"has {len(sample.ids)} tokens; the first is never predicted, so at least two are needed."
        raise InputError(Problem(where, message))
    if all(label == -100 for label in sample.labels[1:]):
        raise InputError(Problem("--rules", "leave no predicted token with a weight.", "Check roles and patterns."))
    model = make_or_load_model(directory, seed=0, tokenizer=tokenizer, field="MODEL").eval()
    limit = max_positions(model.config)
    if limit is not None and len(sample.ids) > limit:
        message = f"has {len(sample.ids)} tokens, and the model reads at most {limit}."
        raise InputError(Problem(where, message, "Give a shorter text."))
    if "forget" in method.reads:
        sample.columns["forget"] = [forget] * len(sample.ids)
    found = token_weights(model, method, sample.ids, labels=sample.labels, columns=sample.columns)
    settings = f" ({', '.join(f'{name} {value}' for name, value in fields.items())})" if fields else ""
    return TokenView(
        title=f"{method_name}{settings} on {model_name}",
        tokens=sample.tokens,
        weights=found.weights,
        nll=found.nll,
        prompt_attention=found.prompt_attention,
        quantity=found.quantity,
    )


def _build(method_name: str, fields: dict[str, Any]) -> TokenWeighter | Objective:
    from tokenwise import catalog
    from tokenwise.weighting.base import TokenWeighter
    from tokenwise.weighting.objective import Objective

    method_class = catalog.load_class(method_name, "--method", family="weighting")
    if not issubclass(method_class, TokenWeighter | Objective):
        fix = _INSTEAD.get(getattr(method_class, "kind", ""), "See `tokenwise methods`.")
        raise InputError(Problem("--method", f"{method_name!r} gives no weights to tokens.", fix))
    method = catalog.build({method_name: fields}, "--method", family="weighting")
    assert isinstance(method, TokenWeighter | Objective)
    return method


def _check_columns(
    method: TokenWeighter | Objective,
    name: str,
    source: str | Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]] | None,
) -> None:
    """Refuse what the method would miss, before anything is loaded."""
    from tokenwise.weighting.objective import REFERENCE_COLUMN, Objective

    if rules is not None and "loss_weights" not in method.reads:
        raise InputError(Problem("--rules", f"make loss_weights, which {name!r} does not read.", "Leave them out."))
    given = {"completion_mask", "prompt_attention"} if isinstance(source, Mapping) else set()
    weighted_row = isinstance(source, Mapping) and (source.get("loss_weights") or source.get("weight")) is not None
    if rules is not None or weighted_row:
        given.add("loss_weights")
    reads = method.reads
    if isinstance(method, Objective):
        if getattr(method, "reference", None) == REFERENCE_COLUMN:
            reads = reads | {REFERENCE_COLUMN}
    elif method.has_reference():
        given.add("reference_nll")
    missing = sorted(reads & (_COLUMNS.keys() - given))
    if missing:
        what = "a text" if isinstance(source, str) else "this row"
        raise InputError(
            Problem("--method", f"{name!r} reads {column!r}, which {what} does not have.", _COLUMNS[column])
            for column in missing
        )


def _is_forgotten(source: str | Mapping[str, Any]) -> bool:
    """Whether an unlearning method is to forget it: so it is unless a row says otherwise."""
    forget = True if isinstance(source, str) else source.get("forget", True)
    if forget not in (True, False):  # 1 and 0 are these
        raise InputError(
            Problem("--chat", f"field 'forget' holds {forget!r}.", "Write true, or false for what is kept.")
        )
    return bool(forget)


def _by_role(
    source: str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, method: TokenWeighter | Objective
) -> _Sample:
    """The responses are learnt, or the whole of a text."""
    if isinstance(source, str):
        return _tokenised([(source, True)], tokenizer, add_special_tokens=True)
    from tokenwise.comparison.chat import render, row_weights

    try:
        sample = _tokenised(render(source, tokenizer).parts, tokenizer, add_special_tokens=False)
        if "loss_weights" in method.reads:
            weights = row_weights(source, len(sample.ids))
            assert weights is not None
            sample.columns["loss_weights"] = weights
    except InputError:
        raise
    except ValueError as problem:
        raise InputError(Problem("--chat", f"the row {problem.args[0]}.", *problem.args[1:])) from problem
    if "completion_mask" in method.reads:
        mask = [float(label != -100) for label in sample.labels]
        return _Sample(sample.ids, sample.tokens, sample.ids, {"completion_mask": mask})
    return sample


def _tokenised(
    parts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> _Sample:
    sample = _Sample([], [], [])
    for text, is_learnt in parts:
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
        ids = found["input_ids"]
        sample.ids.extend(ids)
        sample.labels.extend(ids if is_learnt else [-100] * len(ids))
        sample.tokens.extend(token_texts(text, found["offset_mapping"], list(tokenizer.convert_ids_to_tokens(ids))))
    return sample


def _by_rules(
    source: str | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rules: Sequence[Mapping[str, Any]]
) -> _Sample:
    from tokenwise.weighting.segments import segment_weights

    if isinstance(source, str):
        text, conversation = source, source
    else:
        messages = source.get("messages")
        if messages is None and {"question", "answer"} <= source.keys():
            messages = [
                {"role": role, "content": source[name]}
                for role, name in (("user", "question"), ("assistant", "answer"))
            ]
        if messages is None:
            fix = "Write the row as messages; prompts and completions have no roles."
            raise InputError(Problem("--rules", "need a row with messages, or with question and answer.", fix))
        if not tokenizer.chat_template:
            message = "the tokenizer has no chat template, so that messages cannot be told apart."
            raise InputError(Problem("--rules", message, "Give TEXT and rules with patterns."))
        text, conversation = _rendered(messages, tokenizer), messages
    columns = segment_weights(tokenizer, conversation, rules)
    sample = _tokenised([(text, True)], tokenizer, add_special_tokens=isinstance(source, str))
    assert sample.ids == columns["input_ids"]
    return _Sample(sample.ids, sample.tokens, columns["labels"], {"loss_weights": columns["loss_weights"]})


def _rendered(messages: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(messages, list) or not all(
        isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise InputError(Problem("--chat", "field 'messages' is not a list of {role: ..., content: ...}."))
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise errors of many kinds of their own
        message = f"the chat template refuses the row ({' '.join(str(error).split())})."
        raise InputError(Problem("--chat", message)) from error
