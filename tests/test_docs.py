"""Runs what the documentation shows, and checks that it fits together.

A fenced block after ``<!-- run -->`` is run, one after ``<!-- file: NAME -->`` is written to that file; both in order,
page by page, in an empty folder. A block of console lines runs each line that starts with ``$ tokenwise``.
"""

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tokenwise import catalog
from tokenwise.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"^<!-- (?P<action>run|file: (?P<file>\S+)) -->\n+```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """One marked block; `line` is where its code starts in the page."""

    language: str
    code: str
    file: str | None
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], found["file"], text.count("\n", 0, found.start("code")))
        for found in _BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_marked_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = set(sys.modules)
    names = {"__name__": page.stem}
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        else:
            commands = [line[2:] for line in block.code.splitlines() if line.startswith("$ ")]
            assert commands, f"{page.name}:{block.line}: nothing to run"
            for command in commands:
                program, *arguments = shlex.split(command)
                assert program == "tokenwise"
                assert main(arguments) == 0, command
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mark_is_understood(page):
    marks = re.findall(r"<!--.*?-->", page.read_text(encoding="utf-8"))
    lists = [mark for mark in marks if re.fullmatch(r"<!-- (methods: \w+( \w+)?|cards|correctness: \w+) -->", mark)]
    assert len(marks) == len(lists) + len(blocks(page))


def test_the_shown_plan_has_every_field_at_its_default():
    from tokenwise.comparison import sections, tasks
    from tokenwise.comparison.plan import SECTIONS

    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    plan = yaml.load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1], Loader=yaml.BaseLoader)
    assert set(plan) == set(SECTIONS)
    shown = {
        tasks.LanguageModeling: plan["task"],
        tasks.TextData: plan["task"]["data"],
        sections.Training: plan["training"],
        sections.Budget: plan["budget"],
        sections.Reference: {name: value for entry in plan["references"].values() for name, value in entry.items()},
    }
    for section, values in shown.items():
        assert set(values) == set(section.model_fields), section
        for name, field in section.model_fields.items():
            if not field.is_required() and field.default is not None:
                assert values[name] == str(field.default), name
    assert plan["training"]["learning_rate"] == "5e-5"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries = [path for entry in yaml.safe_load(text)["nav"] for path in entry.values()]
    groups = [entry for entry in entries if isinstance(entry, list)]
    listed = [entry for entry in entries if isinstance(entry, str)]
    listed += [path for group in groups for entry in group for path in entry.values()]
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_catalog_page_has_a_card_for_every_method(hooks):
    page = hooks.on_page_markdown((ROOT / "docs" / "catalog.md").read_text(encoding="utf-8"))
    for entry in catalog.entries().values():
        assert f"## {entry['name']} {{ #{hooks.anchor(entry)} }}" in page
        assert entry["checked"] in page
        for field in entry["fields"].values():
            assert field["description"] in page


def test_every_family_has_a_table_on_its_page(hooks):
    for family in catalog.FAMILIES:
        page = hooks.on_page_markdown((ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8"))
        for entry in catalog.entries().values():
            if entry["family"] == family:
                assert f"[`{entry['name']}`](catalog.md#{hooks.anchor(entry)})" in page


def test_table_cells_cannot_break_the_table(hooks):
    entry = {"id": "weighting/x", "name": "x", "summary": "a | b", "paper": None, "needs": []}
    assert hooks.table([entry]).splitlines()[2] == r"| [`x`](catalog.md#weighting-x) | a \| b | - | - |"
