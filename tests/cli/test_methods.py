import json
import re

import pytest
import yaml

from tokenwise import catalog
from tokenwise.cli.main import main
from tokenwise.cli.methods import plan_line, python_line


def entry(**changes):
    values = {
        "id": "weighting/excess_loss",
        "name": "excess_loss",
        "family": "weighting",
        "class": "ExcessLoss",
        "module": "tokenwise.weighting.excess",
        "summary": "Keeps the tokens whose loss exceeds the reference's most.",
        "paper": {
            "title": "A paper",
            "arxiv": "2404.07965",
            "venue": "NeurIPS 2024",
            "url": "https://arxiv.org/abs/2404.07965",
        },
        "needs": ["a reference model"],
        "status": "VERIFIED",
        "checked": "against toy numbers",
        "control": "weighting/random",
        "traits": {"reads": ["nll"], "selects": True},
        "fields": {
            "keep": {"description": "Share that stays.", "range": "(0, 1]", "default": 0.6},
            "reference": {"description": "The reference.", "range": "", "required": True},
            "switch": {"description": "A word YAML misreads.", "range": "on, off", "default": "off"},
            "cap": {"description": "Not set.", "range": "> 0", "default": None},
        },
    }
    return values | changes


@pytest.fixture
def one_entry(monkeypatch):
    monkeypatch.setattr(catalog, "entries", lambda: {"weighting/excess_loss": entry()})


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_table_names_every_method_of_the_catalog(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert len(catalog.entries()) > 3
    for each in catalog.entries().values():
        assert re.search(rf"^  {each['name']} +\w", out, re.MULTILINE), each["name"]


def test_table_has_paper_needs_and_status(one_entry, capsys):
    assert main(["methods", "--family", "weighting"]) == 0
    out = capsys.readouterr().out
    assert "arXiv 2404.07965, NeurIPS 2024; needs a reference model; verified" in out


def test_json_is_the_catalog(capsys):
    assert main(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list(catalog.entries().values())


def test_unknown_family_suggests_the_nearest(one_entry, capsys):
    assert main(["methods", "--family", "weihgting"]) == 2
    assert "Did you mean 'weighting'?" in capsys.readouterr().err


def test_unknown_method_suggests_the_nearest(one_entry, capsys):
    assert main(["methods", "show", "exces_loss"]) == 2
    assert "Did you mean 'excess_loss'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["excess_loss", "weighting/excess_loss", "ExcessLoss"])
def test_show_is_the_whole_card(one_entry, capsys, name):
    assert main(["methods", "show", name]) == 0
    out = capsys.readouterr().out
    shown = [
        "Keeps the tokens",
        "https://arxiv.org/abs/2404.07965",
        "a reference model",
        "against toy numbers",
        "(0, 1]",
    ]
    for part in [*shown, "Share that stays.", "required", "weighting/random", plan_line(entry()), python_line(entry())]:
        assert part in out


def test_plan_line_is_yaml_with_the_defaults():
    assert yaml.safe_load(plan_line(entry())) == {"excess_loss": {"keep": 0.6, "reference": "clean", "switch": "off"}}
    assert plan_line(entry(fields={})) == "excess_loss"


def test_python_line_is_python_with_the_defaults():
    line = python_line(entry())
    assert line == ("tw.weigh(trainer, tw.weighting.ExcessLoss(keep=0.6, reference='./reference-model', switch='off'))")
    compile(line, "line", "eval")


def test_ready_lines_of_every_method_build_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calibrated = {"allocator": "by hand", "tokens": 9, "prefix": 1, "counts": [7, 5], "thresholds": [0.9, 0.9]}
    (tmp_path / "plan.json").write_text(json.dumps(calibrated), encoding="utf-8")
    for each in catalog.entries().values():
        spec = yaml.safe_load(plan_line(each))
        assert catalog.build(spec, family=each["family"]).card.id == each["id"]
