"""Fills the pages' lists of methods from the catalog, so that they cannot go stale.

A page says where: ``<!-- methods: weighting -->`` gives a table of the family, ``<!-- methods: weighting classes -->``
of its kind "classes" alone, ``<!-- cards -->`` every card, ``<!-- correctness: tokens -->`` one
of the tables that tests/weighting/correctness.py measures.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenwise import catalog
from tokenwise.cli.methods import comparable, facts, plan_line, python_line

Entry = dict[str, Any]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page's source."""
    entries = list(catalog.entries().values())
    markdown = re.sub(
        r"<!-- methods: (\w+)(?: (\w+))? -->",
        lambda found: table(
            [
                entry
                for entry in entries
                if entry["family"] == found[1]
                and found[2] in (None, entry["traits"].get("kind"), entry["traits"].get("site"))
            ]
        ),
        markdown,
    )
    markdown = markdown.replace("<!-- cards -->", "\n\n".join(card(entry) for entry in entries))
    return re.sub(r"<!-- correctness: (\w+) -->", lambda found: correctness(found[1]), markdown)


def correctness(group: str) -> str:
    """Which method of a group gives the exact update in which layout of the batch."""
    found = json.loads(Path(__file__).with_name("correctness.json").read_text(encoding="utf-8"))[group]
    layouts = list(next(iter(found.values())))
    lines = [_row("method", *layouts), "|---" * (len(layouts) + 1) + "|"]
    return "\n".join([*lines, *(_row(f"`{name}`", *row.values()) for name, row in found.items())])


def table(entries: list[Entry]) -> str:
    """One row per method, linked to its card."""
    rows = ["| method | what it does | paper | needs |", "|---|---|---|---|"]
    for entry in entries:
        paper = entry["paper"]
        source = f"[{paper['title']}]({paper['url']})" if paper and paper["url"] else paper["title"] if paper else "-"
        needs = ", ".join(entry["needs"]) or "-"
        name = f"[`{entry['name']}`](catalog.md#{anchor(entry)})"
        rows.append(_row(name, entry["summary"], source, needs))
    return "\n".join(rows)


def anchor(entry: Entry) -> str:
    """Where the catalog page has the method; families may share names."""
    return entry["id"].replace("/", "-")


def card(entry: Entry) -> str:
    """Everything the catalog knows of a method."""
    lines = [f"## {entry['name']} {{ #{anchor(entry)} }}", "", entry["summary"], ""]
    lines += [f"- **{name}**: {value}" for name, value in facts(entry)]
    if entry["fields"]:
        lines += ["", "| field | default | range | description |", "|---|---|---|---|"]
        for name, field in entry["fields"].items():
            default = "required" if field.get("required") else f"`{field['default']}`"
            lines.append(_row(f"`{name}`", default, field["range"] or "-", field["description"]))
    if comparable(entry):
        lines += ["", "```yaml", plan_line(entry), "```"]
    return "\n".join([*lines, "", "```python", python_line(entry), "```"])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
