import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from small_images import classifier, image
from tokenwise.cli.main import main
from tokenwise.models.load import train_tokenizer


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
        (["--method", "tome", "0.png", "--question", "What?"], "answers no questions about images"),
        (["--method", "fast_v", "0.png"], "the model is an encoder alone"),
        (["--method", "tome", "vit"], "is a folder"),
        (["--method", "tomee", "0.png"], "Did you mean 'tome'?"),
        (["--method", "faster_vlm", "0.png"], "the model is an encoder alone"),
        (["--method", "dft", "0.png"], "is no token reduction"),
        (["--method", "tome", "--keep", "2", "0.png"], "whole number is ambiguous"),
        (["--method", "tome", "0.png", "1.png", "--out", "a.png"], "one file for several images"),
        (["--method", "tome", "0.png", "--out", "a.jpg"], "'.jpg' is not written. Name a .png file"),
    ],
)
def test_what_cannot_be_used_is_said(folder, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(folder)
    assert main(["reduce", "vit", *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A tiny vision-language model with its processor, without a chat template."""
    folder = tmp_path_factory.mktemp("speaking")
    tokenizer = train_tokenizer(["What is in the picture? a dog"] * 5, 280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes),
            text_config=transformers.LlamaConfig(vocab_size=300, **sizes),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
    ).save_pretrained(folder / "model")
    image(1).save(folder / "0.png")
    return folder


def test_a_question_before_and_after(speaking, monkeypatch, capsys):
    monkeypatch.chdir(speaking)
    arguments = ["reduce", "model", "0.png", "--method", "faster_vlm", "--keep", "0.25", "--max-new-tokens", "3"]
    assert main([*arguments, "--question", "What is it?", "--out", "kept.png"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "image tokens 16 4 (25%)" in out
    assert "no chat template" in out
    with Image.open("kept.png") as drawn:
        grey = [drawn.getpixel((column * 56 + 28, row * 56 + 28)) for row in range(4) for column in range(4)]
    assert sum(len(set(pixel)) == 1 for pixel in grey) >= 12  # three quarters of the patches are gone
    assert main(arguments) == 2
    assert "answers questions" in capsys.readouterr().err
    assert main(["reduce", "model", "0.png", "--method", "tome", "--question", "What?"]) == 2
    assert "works at the site 'encoder'" in capsys.readouterr().err


def test_tokens_that_go_between_layers(speaking, monkeypatch, capsys):
    monkeypatch.chdir(speaking)
    arguments = ["reduce", "model", "0.png", "--method", "fast_v", "--keep", "0.75", "-p", "layer=1"]
    assert main([*arguments, "--max-new-tokens", "3", "--question", "What is it?", "--out", "inside.png"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "image tokens, last layer 16 8 (50%)" in out
    assert "image tokens × layers 32 24 (75%)" in out
    before = int(re.search(r"cached tokens × layers (\d+) × 2", out)[1])
    assert f"{before} × 2 {before} × 1, {before - 8} × 1" in out
    with Image.open("inside.png") as drawn:
        grey = [drawn.getpixel((column * 56 + 28, row * 56 + 28)) for row in range(4) for column in range(4)]
    assert sum(len(set(pixel)) == 1 for pixel in grey) == 8


def test_a_model_without_its_processor(speaking, tmp_path, capsys):
    shutil.copytree(speaking / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*processor*"))
    arguments = ["reduce", str(tmp_path / "model"), str(speaking / "0.png"), "--method", "fast_v"]
    assert main([*arguments, "--question", "What?"]) == 2
    assert "has no processor" in " ".join(capsys.readouterr().err.split())
