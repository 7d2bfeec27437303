"""The marked cell: pictures show what the questions ask, and the scripts run from pictures to tables."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "marked_cell"


def script(name):
    spec = importlib.util.spec_from_file_location(f"marked_cell_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train():
    return script("train")


def test_each_colour_frames_one_digit(train):
    pictures = train.draw(20, np.random.default_rng(0))
    assert ((pictures.digit >= 0).sum(1) == train.DIGITS).all()
    for colour, values in enumerate(train.COLOURS.values()):
        cells = np.argwhere(pictures.frame == colour)
        assert cells[:, 0].tolist() == list(range(20))
        for picture, cell in cells:
            assert pictures.digit[picture, cell] >= 0
            row, column = divmod(cell, train.SIDE)
            patch = pictures.pixels[picture].astype(int)[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            edge = np.concatenate([patch[0], patch[-1], patch[:, 0], patch[:, -1]])
            assert np.abs(edge.mean(0) - values).max() < 15
            # The ink of the digit, and nothing else inside the frame, is bright.
            assert (patch[1:-1, 1:-1].min(2) > 135).sum() == ink(train, pictures.digit[picture, cell])


def ink(train, digit):
    return sum(int(row).bit_count() for row in train.FONT.split()[digit])


def test_the_answer_is_the_digit_of_the_cell(train):
    pictures, generator = train.draw(5, np.random.default_rng(1)), np.random.default_rng(2)
    for index in range(5):
        asked, answer = train.question(pictures, index, "frame", generator)
        colour = list(train.COLOURS).index(asked.split()[-1])
        assert pictures.digit[index][pictures.frame[index] == colour].tolist() == [int(answer)]
        asked, answer = train.question(pictures, index, "cell", generator)
        column, row = asked.split()[-1]
        assert pictures.digit[index].reshape(6, 6)[int(row) - 1, "abcdef".index(column)] == int(answer)


def test_from_pictures_to_tables(train, tmp_path, monkeypatch, capsys):
    for name, value in (("TOWER_STEPS", 1), ("STEPS", 2), ("BATCH", 2), ("EVAL", 6)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path), "--layers", "4"])
    train.main()
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len(records) == 12
    assert Image.open(tmp_path / records[0]["image"]).size == (48, 48)
    again = tmp_path / "again"
    again.mkdir()
    assert train.write_questions(again) == records
    measure = script("measure")
    monkeypatch.setattr(measure, "BATCH", 5)
    wanted = ["faster_vlm", "faster_vlm:layer=9", "fast_v", "--against", "random"]
    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path), *wanted])
    measure.main()
    shown = capsys.readouterr().out
    assert shown.count("left out: faster_vlm:layer=9") == 1
    # FastV in layer 2 of 4 keeps more than half: only three quarters can be had.
    assert shown.count("left out: fast_v") == 3
    assert shown.count("|  |  |  |\n") == 5
    assert shown.count("|---|---|---|---|---|\n") == shown.count("| faster_vlm | ") == 5
    assert shown.count("| random | ") == 3
    assert shown.count("Points above random") == 2
