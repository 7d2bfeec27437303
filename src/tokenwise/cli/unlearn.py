"""`tokenwise unlearn`: make a model forget some examples and keep others."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.cli.method_fields import add_fields, read_fields
from tokenwise.errors import InputError, Problem, nearest

if TYPE_CHECKING:
    from tokenwise.weighting.unlearning import Unlearner
    from tokenwise.weighting.unlearning_run import Unlearned


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "unlearn",
        help="make a model forget some examples and keep others",
        description="Train a causal language model so that it forgets the answers of one file and keeps those of "
        "another, and show how well it knows them before and after.",
        epilog="Files are JSON lines with prompt and completion, question and answer, messages, or text. "
        "Example: tokenwise unlearn ./model --forget forget.jsonl --retain retain.jsonl --method npo -p beta=0.1 "
        "--out ./forgetful",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model, or its id on the hub")
    parser.add_argument("--forget", metavar="FILE", required=True, help="what to forget")
    parser.add_argument("--retain", metavar="FILE", required=True, help="what to keep")
    parser.add_argument("--eval-retain", metavar="FILE", help="more that should stay, not trained on, only measured")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--method", metavar="NAME", default="npo", help="the unlearning method (default: %(default)s)")
    add_fields(parser, "beta=0.1")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", metavar="N", type=_positive(int), help="optimizer steps")
    length.add_argument("--epochs", metavar="N", type=_positive(float), help="passes over FORGET (default: 10)")
    parser.add_argument(
        "--lr", metavar="RATE", type=_positive(float), help="peak learning rate (default: 1e-5, or 1e-4 with --lora)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=_positive(int), default=8, help="pairs at once (default: %(default)s)"
    )
    parser.add_argument(
        "--accumulate",
        metavar="N",
        type=_positive(int),
        default=1,
        help="batches to an optimizer step (default: %(default)s)",
    )
    parser.add_argument(
        "--lora", metavar="RANK", type=_positive(int), help="train LoRA adapters of this rank, merged in the end"
    )
    parser.add_argument("--max-length", metavar="N", type=_positive(int), help="cut longer examples to N tokens")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the order (default: %(default)s)")
    parser.set_defaults(run=_run)


def _positive(kind: type) -> Any:
    def convert(word: str) -> Any:
        value = kind(word)
        if not 0 < value < float("inf"):
            raise ValueError(word)
        return value

    convert.__name__ = "positive number"  # argparse names it in its message
    return convert


def _run(options: argparse.Namespace) -> int:
    fields = read_fields(options.fields)
    problems: list[Problem] = []
    if options.out.exists() or options.out.is_symlink():
        problems.append(Problem("--out", f"{str(options.out)!r} exists already.", "Name a new folder."))
    for name in ("forget", "retain", "eval_retain"):
        path = getattr(options, name)
        if path is not None and not Path(path).is_file():
            from tokenwise.errors import missing_file

            problems.append(missing_file("--" + name.replace("_", "-"), path))
    method = None
    try:
        method = _method(options.method, fields)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    assert method is not None
    return _unlearn(options, method)


def _method(name: str, fields: dict[str, Any]) -> Unlearner:
    from tokenwise import catalog
    from tokenwise.weighting.unlearning import Unlearner

    method_class = None
    if name in catalog.entries() or ".py:" in name or any(name in (e["name"], e["class"]) for e in _entries()):
        method_class = catalog.load_class(name, "--method", family="weighting")
    if method_class is None or not issubclass(method_class, Unlearner):
        reason = "there is no unlearning method" if method_class is None else "this is no unlearning method:"
        known = [entry["name"] for entry in _entries() if "forget" in entry["traits"].get("reads", ())]
        raise InputError(Problem("--method", f"{reason} {name!r}.", nearest(name, known)))
    method = catalog.build({name: fields}, "--method", family="weighting")
    assert isinstance(method, Unlearner)
    return method


def _entries() -> list[dict[str, Any]]:
    from tokenwise import catalog

    return list(catalog.entries().values())


def _unlearn(options: argparse.Namespace, method: Unlearner) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import set_seed
    from transformers.utils import logging

    from tokenwise.models.load import load_tokenizer, locate, make_or_load_model, max_positions
    from tokenwise.weighting.unlearning_data import read_examples
    from tokenwise.weighting.unlearning_run import unlearn

    logging.disable_progress_bar()
    directory = locate(options.model, field="MODEL")
    tokenizer = load_tokenizer(directory, "MODEL")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    set_seed(options.seed)
    model = make_or_load_model(str(directory), seed=options.seed, tokenizer=tokenizer, field="MODEL")
    limits = [limit for limit in (options.max_length, max_positions(model.config)) if limit is not None]
    limit = min(limits, default=None)
    forget = read_examples(options.forget, tokenizer, limit, "--forget")
    retain = read_examples(options.retain, tokenizer, limit, "--retain")
    measure = {}
    if options.eval_retain is not None:
        measure["held-out retain"] = read_examples(options.eval_retain, tokenizer, limit, "--eval-retain")
    trained: Any = model if options.lora is None else _with_lora(model, options.lora)
    rate = options.lr or (1e-5 if options.lora is None else 1e-4)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("unlearning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("unlearning", total=None, loss="-")

        def progress(done: int, total: int, loss: float | None) -> None:
            bar.update(task, completed=done, total=total)
            if loss is not None:
                bar.update(task, loss=f"{loss:.4g}")

        found = unlearn(
            trained,
            forget,
            retain,
            method,
            pad_token_id=pad,
            measure=measure,
            progress=progress,
            learning_rate=rate,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            seed=options.seed,
            **({"max_steps": options.steps} if options.steps else {"num_train_epochs": options.epochs or 10}),
        )
    if options.lora is not None:
        model = trained.merge_and_unload()
    settings = {
        "model": options.model,
        "forget": options.forget,
        "retain": options.retain,
        "method": method.spec(),
        "learning_rate": rate,
        "batch_size": options.batch_size,
        "accumulate": options.accumulate,
        "lora": options.lora,
        "max_length": options.max_length,
        "seed": options.seed,
        **found.as_dict(),
    }
    _save(options.out, model, tokenizer, settings)
    _print(found, method)
    print(f"Model: {options.out}")
    return 0


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(Problem("--lora", "needs the package peft.", "pip install peft")) from error
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _save(out: Path, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    """Write the folder under another name first, so that what lies under its own is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (folder / "tokenwise_unlearning.json").write_text(text + "\n", encoding="utf-8")
        folder.chmod(0o777 & ~_umask())
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _print(found: Unlearned, method: Unlearner) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{method.card.name}, {found.steps} steps", title_justify="left", show_edge=False, pad_edge=False
    )
    table.add_column("answers")
    table.add_column("")
    for name in ("nll, nats/token", "probability", "word for word"):
        table.add_column(name, justify="right")
    for name, before in found.before.items():
        for when, seen in (("before", before), ("after", found.after[name])):
            label = f"{name} ({seen.examples})" if when == "before" else ""
            table.add_row(label, when, f"{seen.nll:.3f}", f"{seen.probability:.3f}", f"{seen.exact:.0%}")
    console = Console(highlight=False)
    console.print(table)
    for hint in _hints(found):
        console.print(hint, soft_wrap=True)


def _hints(found: Unlearned) -> list[str]:
    """What to try where the numbers say that it went too far or not far enough."""
    hints = []
    if found.after["forget"].probability > 0.9 * found.before["forget"].probability:
        hints.append("Next to nothing was forgotten: try more steps, a larger --lr, or a stronger method.")
    if found.after["retain"].probability < 0.5 * found.before["retain"].probability:
        hints.append("What should stay suffered: try fewer steps, a smaller --lr, or a method with a retain term.")
    return hints
