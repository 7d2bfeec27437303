import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "demo" / "prepare.py"


def prepare(folder: Path) -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-I", SCRIPT, folder], capture_output=True, text=True, check=True)
    assert "shuffled words" in done.stdout
    return {
        name: [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "clean", "eval")
    }


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("demo"))


def test_same_data_every_time(documents, tmp_path):
    assert prepare(tmp_path) == documents


def test_no_document_is_in_two_splits(documents):
    train, clean, held_out = (set(texts) for texts in documents.values())
    assert not train & clean
    assert not train & held_out
    assert not clean & held_out


def test_there_is_enough_and_it_is_code(documents):
    assert sum(map(len, documents["train"])) > 2_000_000
    assert sum(map(len, documents["clean"])) > 500_000
    assert len(documents["eval"]) > 50
    assert sum("def " in text for text in documents["clean"]) > 0.5 * len(documents["clean"])


def test_three_in_ten_training_documents_have_their_words_shuffled(documents):
    spec = importlib.util.spec_from_file_location("demo_prepare", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    undamaged = script.collect(Path(os.__file__).parent)
    assert documents["clean"] == undamaged["clean"]
    assert documents["eval"] == undamaged["eval"]
    pairs = list(zip(documents["train"], undamaged["train"], strict=True))
    changed = [(text, original) for text, original in pairs if text != original]
    assert len(changed) == round(0.3 * len(pairs))
    assert all(sorted("".join(text.split())) == sorted("".join(original.split())) for text, original in changed)


def test_wrong_use_says_how():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Usage" in done.stderr
