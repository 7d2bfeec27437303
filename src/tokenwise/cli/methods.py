"""`tokenwise methods`: the catalog, as a table, as JSON, or one whole card."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tokenwise import catalog
from tokenwise.errors import InputError, Problem, nearest

if TYPE_CHECKING:
    from rich.console import Console

Entry = dict[str, Any]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser("methods", help="list the methods, or show one of them in full")
    parser.add_argument("--family", help="only the methods of this family, such as weighting")
    parser.add_argument("--json", action="store_true", help="print the catalog's entries as JSON")
    parser.set_defaults(run=_list)
    show = parser.add_subparsers(title="one method", metavar="show NAME").add_parser("show", help="show one method")
    show.add_argument("name", metavar="NAME", help="its name, id (family/name) or class name")
    show.set_defaults(run=_show)


def _list(options: argparse.Namespace) -> int:
    entries = list(catalog.entries().values())
    if options.family is not None:
        families = sorted({entry["family"] for entry in entries})
        if options.family not in families:
            message = f"there is no family {options.family!r}."
            raise InputError(Problem("--family", message, nearest(options.family, families)))
        entries = [entry for entry in entries if entry["family"] == options.family]
    if options.json:
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return 0

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for family in sorted({entry["family"] for entry in entries}):
        console.print(family, style="bold")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        for entry in entries:
            if entry["family"] == family:
                table.add_row(f"  {entry['name']}", Text(_plain(entry["summary"])).append(f"\n{_origin(entry)}", "dim"))
        console.print(table)
    console.print("\nOne in full: tokenwise methods show NAME", style="dim")
    return 0


def _origin(entry: Entry) -> str:
    paper = entry["paper"]
    source = "no paper"
    if paper:
        source = f"arXiv {paper['arxiv']}" if paper["arxiv"] else paper["title"]
        source += f", {paper['venue']}" if paper["venue"] else ""
    needs = [f"needs {', '.join(entry['needs'])}"] if entry["needs"] else []
    return "; ".join([source, *needs, entry["status"].lower()])


def _plain(text: str) -> str:
    return text.replace("``", "")


def _show(options: argparse.Namespace) -> int:
    from rich.console import Console

    entry = catalog.find(options.name, where="NAME")
    console = Console(highlight=False)
    console.print(entry["id"], style="bold", markup=False)
    console.print(_plain(entry["summary"]), markup=False)
    console.print()
    shown = facts(entry)
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        console.print(f"[bold]{name:<{width}}[/bold]  ", end="")
        console.print(value, markup=False, soft_wrap=True)
    console.print()
    if entry["fields"]:
        _print_fields(console, entry)
        console.print()
    if comparable(entry):
        console.print("In a plan", style="bold")
        console.print(f"  methods: [uniform, {plan_line(entry)}]", markup=False, soft_wrap=True)
    console.print("In Python", style="bold")
    console.print(f"  {python_line(entry)}", markup=False, soft_wrap=True)
    return 0


def facts(entry: Entry) -> list[tuple[str, str]]:
    """Name and value of what the card says beside summary and fields."""
    paper = entry["paper"]
    source = "none: a control or standard practice"
    if paper:
        source = ", ".join(part for part in (paper["title"], paper["venue"], paper["url"]) if part)
    facts = [
        ("paper", source),
        ("needs", ", ".join(entry["needs"]) or "nothing beyond the model and the data"),
        ("status", f"{entry['status'].lower()}: {entry['checked']}"),
    ]
    if entry["control"]:
        facts.append(("control", f"{entry['control']} runs beside it in a comparison"))
    for trait, value in entry["traits"].items():
        shown = ", ".join(value) or "-" if isinstance(value, list) else {True: "yes", False: "no"}.get(value, value)
        facts.append((trait, str(shown)))
    return facts


def _print_fields(console: Console, entry: Entry) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("field", style="bold", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("range", ratio=1)
    table.add_column("description", ratio=2)
    for name, field in entry["fields"].items():
        default = "required" if field.get("required") else json.dumps(field["default"])
        table.add_row(*(Text(cell) for cell in (name, default, field["range"] or "-", _plain(field["description"]))))
    console.print(table)


def comparable(entry: Entry) -> bool:
    """Whether a plan may list the method; unlearning and masks of parameters need data that no task has."""
    return entry["family"] == "weighting" and entry["traits"].get("kind") not in ("masks", "objective")


def plan_line(entry: Entry) -> str:
    """The method as a plan writes it, every field at its default: ``{excess_loss: {keep: 0.6, reference: clean}}``."""
    values = _values(entry, reference="clean")
    if not values:
        return str(entry["name"])
    fields = ", ".join(f"{name}: {_yaml(value)}" for name, value in values.items())
    return f"{{{entry['name']}: {{{fields}}}}}"


def python_line(entry: Entry) -> str:
    """The call that puts the method into effect, every field at its default."""
    values = _values(entry, reference="./reference-model")
    fields = ", ".join(f"{name}={value!r}" for name, value in values.items())
    made = f"tw.{entry['family']}.{entry['class']}({fields})"
    if entry["traits"].get("kind") == "masks":
        batches = "".join(f", {name}={name}_batches" for name in entry["traits"]["reads"])
        return f"tw.weighting.mask_parameters(trainer, {made}.masks(model{batches}))"
    verb = {"weighting": "weigh(trainer", "reduction": "reduce(model", "cache": "evict(model"}[entry["family"]]
    return f"tw.{verb}, {made})"


def _values(entry: Entry, reference: str) -> dict[str, Any]:
    values = {}
    for name, field in entry["fields"].items():
        if name == "reference" and field.get("required"):
            values[name] = reference
        elif name == "plan" and field.get("required"):
            values[name] = "./plan.json"
        elif field.get("required"):
            values[name] = f"<{name}>"
        elif field["default"] is not None:
            values[name] = field["default"]
    return values


def _yaml(value: Any) -> str:
    # JSON is YAML, but plain words need no quotes; `off`, `no` and their like do.
    if isinstance(value, str) and value.isidentifier() and value.lower() not in ("on", "off", "yes", "no", "y", "n"):
        return value
    return json.dumps(value)
