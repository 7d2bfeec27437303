from pathlib import Path

import pytest
from PIL import Image

from small_images import classifier, image
from tokenwise.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reduce")
    classifier(folder / "vit")
    for number in range(2):
        image(number).save(folder / f"{number}.png")
    return folder


def test_an_image_before_and_after(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["reduce", "vit", "--method", "tome", "--keep", "0.5", "0.png", "1.png"]
    assert main([*arguments, "--out", "kept", "--html", "kept.html"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No image processor beside the model" in out
    assert "image tokens 16" in out
    for number in range(2):
        with Image.open(f"kept/{number}.png") as drawn:
            assert drawn.size == (224, 224)
    page = Path("kept.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert "tome (keep 0.5" in page


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "tome", "2.png"], "does not exist"),
        (["--method", "tome", "vit/config.json"], "cannot be decoded"),
        (["--method", "tome", "0.png", "--question", "What?"], "answers no questions"),
        (["--method", "faster_vlm", "0.png"], "the model is an encoder alone"),
        (["--method", "dft", "0.png"], "is no token reduction"),
        (["--method", "tome", "--keep", "2", "0.png"], "whole number is ambiguous"),
        (["--method", "tome", "0.png", "1.png", "--out", "a.png"], "one file for several images"),
    ],
)
def test_what_cannot_be_used_is_said(folder, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(folder)
    assert main(["reduce", "vit", *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
