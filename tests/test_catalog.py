"""The catalog is what the classes say, and finds what users write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokenwise as tw
from tokenwise import catalog
from tokenwise.errors import InputError
from tokenwise.method import Method, snake_case

OWN_METHOD = '''
import torch
import tokenwise as tw

class LongWords(tw.weighting.TokenWeighter):
    """Weigh every other token."""

    every: int = 2

    def weights(self, batch, state=None):
        return (torch.arange(len(batch.labels)) % self.every == 0).float()
'''


def test_the_file_is_not_stale():
    written = json.dumps(list(catalog.entries().values()))
    assert written == json.dumps(catalog.generate()), "run `make catalog`"


def test_every_method_is_documented_and_reachable():
    for entry in catalog.entries().values():
        found = catalog.load_class(entry["id"])
        assert found.card.id == entry["id"] == f"{entry['family']}/{entry['name']}"
        assert snake_case(entry["class"]).replace("_", "") == entry["name"].replace("_", "")
        assert getattr(getattr(tw, entry["family"]), entry["class"]) is found
        assert entry["summary"].endswith(".")
        assert entry["status"] in ("VERIFIED", "RECONSTRUCTION")
        assert entry["checked"]
        for name, field in entry["fields"].items():
            assert field["description"], f"{entry['id']}.{name} has no description"
        if entry["control"]:
            assert entry["control"] in catalog.entries()


@pytest.mark.parametrize("name", ["excess_loss", "weighting/excess_loss", "ExcessLoss"])
def test_a_method_is_found_by_name_id_and_class(name):
    assert catalog.find(name)["class"] == "ExcessLoss"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("profit", "pro_fit"),
        ("PROFIT", "pro_fit"),
        ("satimp", "sat_imp"),
        ("simnpo", "sim_npo"),
        ("kl_dro", "kldro"),
        ("UN-DIAL", "undial"),
        ("Ldam", "ldam"),
        ("WGA_", "wga"),
    ],
)
def test_names_that_differ_in_case_and_underscores_are_suggested(word, expected):
    with pytest.raises(InputError, match=f"Did you mean '{expected}'"):
        catalog.find(word)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(
        InputError, match=r"methods\[2\]: there is no method 'exces_loss'. Did you mean 'excess_loss'\?"
    ):
        catalog.find("exces_loss", "methods[2]")
    with pytest.raises(InputError, match=r"Known: .*dft, .*dynamic_loss"):
        catalog.find("zzz")


def test_build_names_fields_as_the_user_wrote_them():
    built = catalog.build({"excess_loss": {"keep": 0.3, "reference": "r"}})
    assert built == tw.ExcessLoss(keep=0.3, reference="r")
    assert catalog.build("dft") == tw.DFT()
    assert catalog.build(built.spec()) == built
    with pytest.raises(InputError) as caught:
        catalog.build({"excess_loss": {"keep": 1.6, "scop": "step"}}, "methods[1]")
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"methods[1].excess_loss.keep", "methods[1].excess_loss.scop", "methods[1].excess_loss.reference"}
    for wrong in (3, ["dft"], {"dft": {}, "focal": {}}, {"dft": 3}, None):
        with pytest.raises(InputError, match="is not a method"):
            catalog.build(wrong)


def test_a_method_of_ones_own_comes_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_METHOD, encoding="utf-8")
    built = catalog.build({"./mine.py:LongWords": {"every": 3}}, folder=tmp_path)
    assert built.every == 3
    assert built.card.id == "weighting/long_words"
    assert built.card.status == "RECONSTRUCTION"
    with pytest.raises(InputError, match=r"no method class 'LongWord'. Did you mean 'LongWords'\?"):
        catalog.build("./mine.py:LongWord", folder=tmp_path)
    with pytest.raises(InputError, match=r"mein\.py' does not exist. Did you mean .*mine\.py"):
        catalog.build("./mein.py:LongWords", folder=tmp_path)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.py cannot be imported: ModuleNotFoundError"):
        catalog.build("./broken.py:X", folder=tmp_path)
    assert "weighting/long_words" not in {entry["id"] for entry in catalog.generate()}


def test_importing_is_light_and_names_resolve_lazily():
    code = (
        "import sys, tokenwise;"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert 'ExcessLoss' in dir(tokenwise) and 'weigh' in dir(tokenwise);"
        "assert 'torch' not in sys.modules;"
        "assert tokenwise.ToMe is tokenwise.reduction.ToMe;"
        "import pytest\n"
        "with pytest.raises(AttributeError, match='weighting.Random'): tokenwise.Random\n"
        "with pytest.raises(AttributeError): tokenwise.Nothing\n"
        "with pytest.raises(AttributeError): tokenwise.nothing\n"
    )
    environment = {"PYTHONPATH": str(Path(tw.__file__).parents[1]), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_methods_are_frozen_values():
    method = tw.ExcessLoss(keep="128 tokens", reference="r")
    assert isinstance(method, Method)
    assert method.spec() == {"excess_loss": {"keep": "128 tokens", "reference": "r", "scope": "micro_batch"}}
    assert method.replace(scope="step").scope == "step"
    with pytest.raises(InputError):
        method.replace(keep=0)
    with pytest.raises(Exception, match="frozen"):
        method.keep = 0.1
    assert hash(method) == hash(tw.ExcessLoss(keep="128 tokens", reference="r"))
