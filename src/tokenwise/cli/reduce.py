"""`tokenwise reduce`: a model's answer to images with fewer tokens, beside its answer with all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.cli.method_fields import add_fields, read_fields
from tokenwise.errors import InputError, Problem, missing_file

if TYPE_CHECKING:
    from tokenwise.comparison.reduction_trial import Trial


_OTHER_PICTURES = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".html")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "reduce",
        help="see what a model answers with fewer tokens, how fast, and what was kept",
        description="Show images to an image classifier, or ask a vision-language model about them, with all "
        "tokens and "
        "with fewer: the answers, the tokens and the time before and after, and a picture of what was kept.",
        epilog="Example: tokenwise reduce ./vit --method tome --keep 0.5 cat.jpg --out kept.png",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the model, or its id on the hub")
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="image files")
    parser.add_argument("--method", metavar="NAME", required=True, help="a reduction; see tokenwise methods")
    parser.add_argument(
        "--keep",
        metavar="K",
        help="what stays, such as 0.5, '64 tokens' or '0.6 flops' (default: the method's)",
    )
    add_fields(parser, "r=8")
    parser.add_argument("--question", metavar="TEXT", help="what to ask a vision-language model about each image")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=40, help="tokens of an answer to --question (default: 40)"
    )
    parser.add_argument("--out", metavar="PATH", type=Path, help="draw what was kept: a PNG file, or a folder of them")
    parser.add_argument("--html", metavar="FILE", type=Path, help="answers and drawings as one HTML page")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    problems = [
        Problem("IMAGE", f"{str(image)!r} is a folder.", "Name its files.")
        if image.is_dir()
        else missing_file("IMAGE", image)
        for image in options.images
        if not image.is_file()
    ]
    if options.out is not None and options.out.suffix.lower() == ".png" and len(options.images) > 1:
        problems.append(Problem("--out", "is one file for several images.", "Name a folder."))
    elif options.out is not None and options.out.suffix.lower() in _OTHER_PICTURES and not options.out.is_dir():
        problems.append(Problem("--out", f"{options.out.suffix!r} is not written.", "Name a .png file, or a folder."))
    if options.max_new_tokens < 1:
        problems.append(Problem("--max-new-tokens", f"{options.max_new_tokens} is less than 1."))
    if problems:
        raise InputError(problems)

    from tokenwise import catalog
    from tokenwise.models.images import require_pillow

    require_pillow("IMAGE")
    from tokenwise.comparison.yaml_file import parse_value

    fields = read_fields(options.fields) | ({} if options.keep is None else {"keep": parse_value(options.keep)})
    method = catalog.build({options.method: fields}, "--method", Path.cwd(), "reduction")

    from rich.console import Console
    from transformers.utils import logging

    from tokenwise.comparison.reduction_trial import try_out, write_page, write_picture

    logging.disable_progress_bar()
    console = Console()
    found = try_out(options.model, method, options.images, options.question, options.max_new_tokens)
    for line in found.remarks:
        console.print(line, markup=False, highlight=False, style="dim")
    for trial in found.trials:
        _print(trial, console)
    drawn = [trial for trial in found.trials if trial.picture is not None]
    if (options.out is not None or options.html is not None) and len(drawn) < len(found.trials):
        console.print("Not drawn where the model's tokens are not a plain grid of patches.", style="dim")
    if options.out is not None and drawn:
        single = options.out.suffix.lower() == ".png"
        for trial in drawn:
            path = options.out if single else options.out / f"{trial.image.stem}.png"
            write_picture(trial, path)
            console.print(f"Picture: {path}", markup=False, highlight=False, soft_wrap=True)
    if options.html is not None:
        write_page(found, options.html)
        console.print(f"Page: {options.html}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _print(trial: Trial, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=str(trial.image), title_justify="left", title_style="bold")
    for name in ("", "all tokens", "reduced"):
        table.add_column(name)
    for name, before, after in trial.lines():
        table.add_row(Text(name), Text(before), Text(after))
    console.print(table)
