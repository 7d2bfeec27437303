"""Train a small vision-language model to read the marked cell of a picture.

Usage: python examples/marked_cell/train.py FOLDER [--layers 3] [--seed 0]

A picture is a grid of 6 by 6 cells, each one patch of the model. DIGITS of them show a digit, and the frames of four of
these have the four COLOURS; the others are empty. A question names a colour ("digit in frame red") or a
place ("digit in cell b3"), and the answer is one digit. So one patch of 36 is enough for each question, but which one
only the question says: what a method can know without it is which cells are not empty.

Writes, the same on every run on the same machine:

- model/: a LLaVA of about a quarter of a million parameters (with 8 layers, half a million) with its processor and
  tokenizer, trained from scratch;
- questions.jsonl and images/: EVAL pictures never trained on, with a question of each kind: {"image": ...,
  "question": ..., "answer": ..., "kind": "frame" or "cell"}.

Takes a few minutes on one core; with 8 layers, five.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

SIDE, PATCH = 6, 8
CELLS = SIDE * SIDE
DIGITS = 12
COLOURS = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (60, 90, 240), "yellow": (235, 210, 40)}
FONT = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"  # five rows of three pixels for each digit
SPECIAL = ("<pad>", "</s>", "<unk>", "<image>")
PLACES = [f"{column}{row + 1}" for row in range(SIDE) for column in "abcdef"]
WORDS = ("digit", "in", "frame", "cell", *COLOURS, *PLACES, *"0123456789")
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
TOWER_STEPS, STEPS, BATCH, QUESTIONS, LEARNING_RATE = 300, 1600, 32, 8, 2e-3
EVAL = 300


@dataclass
class Pictures:
    """Drawn pictures and what is in them.

    Args:
        pixels: [pictures, height, width, 3], uint8.
        digit: of each cell, [pictures, cells]; -1 where it is empty.
        frame: the number of the colour of each cell's frame, [pictures, cells]; -1 where there is none.
    """

    pixels: NDArray[np.uint8]
    digit: NDArray[np.int64]
    frame: NDArray[np.int64]


def draw(count: int, generator: np.random.Generator) -> Pictures:
    """`count` pictures, by chance."""
    order = generator.random((count, CELLS)).argsort(1)
    pictures = np.arange(count)[:, None]
    digit, frame = np.full((count, CELLS), -1), np.full((count, CELLS), -1)
    digit[pictures, order[:, :DIGITS]] = generator.integers(10, size=(count, DIGITS))
    frame[pictures, order[:, : len(COLOURS)]] = np.arange(len(COLOURS))
    bits = np.array([int(row) >> (2 - column) & 1 for row in FONT.replace(" ", "") for column in range(3)])
    bits = bits.astype(bool).reshape(10, 5, 3)
    background = generator.uniform(0, 90, (count, 1, 1, 1, 1))
    cells = np.broadcast_to(background, (count, CELLS, PATCH, PATCH, 3)).copy()
    for colour, values in enumerate(COLOURS.values()):
        edge = np.ones((PATCH, PATCH), bool)
        edge[1:-1, 1:-1] = False
        cells[(frame == colour)[:, :, None, None] & edge] = values
    # Each digit stands at one of four places in its cell.
    down, right = generator.integers(1, 3, (count, CELLS)), generator.integers(2, 4, (count, CELLS))
    ink = generator.uniform(180, 255, (count, CELLS))
    for picture, cell in np.argwhere(digit >= 0):
        top, left = down[picture, cell], right[picture, cell]
        shown = bits[digit[picture, cell]]
        cells[picture, cell, top : top + 5, left : left + 3][shown] = ink[picture, cell]
    grid = cells.reshape(count, SIDE, SIDE, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    grid = grid.reshape(count, SIDE * PATCH, SIDE * PATCH, 3) + generator.normal(0, 12, (count, 48, 48, 3))
    return Pictures(grid.clip(0, 255).astype(np.uint8), digit, frame)


def question(pictures: Pictures, index: int, kind: str, generator: np.random.Generator) -> tuple[str, str]:
    """A question about one picture, and its answer."""
    if kind == "frame":
        colour = int(generator.integers(len(COLOURS)))
        cell, name = int(np.flatnonzero(pictures.frame[index] == colour)[0]), list(COLOURS)[colour]
    else:
        cell = int(generator.choice(np.flatnonzero(pictures.digit[index] >= 0)))
        name = PLACES[cell]
    asked = f"digit in {kind} {name}"
    return asked, str(pictures.digit[index, cell])


def make_processor() -> LlavaProcessor:
    """Words as tokens, and pictures as they are."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = transformers.CLIPImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_model(processor: LlavaProcessor, layers: int, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, whose language model has `layers` layers."""
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        num_hidden_layers=layers,
        **TEXT,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE * PATCH, patch_size=PATCH, **VISION),
        text_config=text,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaForConditionalGeneration(config)


class Teacher(nn.Module):
    """What stands in for a tower's pretraining, and is thrown away: each patch is to tell its digit, frame and
    place, and the class token, as a picture's summary, which digit is in which frame."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(VISION["hidden_size"], 11 + 5 + CELLS)
        self.summary = nn.Linear(VISION["hidden_size"], len(COLOURS) * 10)

    def forward(self, states: BaseModelOutputWithPooling, pictures: Pictures) -> Tensor:
        """The loss of what the tower's output tells."""
        digit, frame = (torch.from_numpy(values) + 1 for values in (pictures.digit, pictures.frame))
        told = self.patch(states.hidden_states[-2][:, 1:]).flatten(0, 1)
        place = torch.arange(CELLS).repeat(len(digit))
        cell = torch.stack([(frame == colour + 1).long().argmax(1) for colour in range(len(COLOURS))], 1)
        in_frame = (digit - 1).gather(1, cell)
        summary = self.summary(states.last_hidden_state[:, 0]).unflatten(1, (len(COLOURS), 10))
        return (
            nn.functional.cross_entropy(told[:, :11], digit.flatten())
            + nn.functional.cross_entropy(told[:, 11:16], frame.flatten())
            + nn.functional.cross_entropy(told[:, 16:], place)
            + nn.functional.cross_entropy(summary.flatten(0, 1), in_frame.flatten())
        )


def train(processor: LlavaProcessor, layers: int, seed: int) -> LlavaForConditionalGeneration:
    """A model trained on pictures drawn as they are needed: the tower first, then all of it."""
    model, teacher = make_model(processor, layers, seed).train(), Teacher()
    # Never 1, with which the held-out pictures are drawn.
    generator = np.random.default_rng(100 * seed)
    tower = model.model.vision_tower
    states: list[BaseModelOutputWithPooling] = []
    tower.register_forward_hook(lambda module, args, output: states.append(output))
    word = processor.tokenizer.get_vocab()

    def tower_loss(pictures: Pictures, pixels: Tensor) -> Tensor:
        tower(pixel_values=pixels, output_hidden_states=True)
        return teacher(states.pop(), pictures)

    def whole_loss(pictures: Pictures, pixels: Tensor) -> Tensor:
        """Several questions about each picture, one after the other."""
        rows, labels = [], []
        for index in range(BATCH):
            ids, told = [word["<image>"]] * CELLS, [-100] * CELLS
            for kind in generator.permutation(["frame", "cell"] * (QUESTIONS // 2)):
                asked, answer = question(pictures, index, kind, generator)
                ids += [*(word[part] for part in asked.split()), word[answer], word["</s>"]]
                told += [*[-100] * len(asked.split()), word[answer], word["</s>"]]
            rows.append(ids)
            labels.append(told)
        loss = model(input_ids=torch.tensor(rows), pixel_values=pixels, labels=torch.tensor(labels)).loss
        return loss + teacher(states.pop(), pictures)

    for what, steps, loss_of in (("tower", TOWER_STEPS, tower_loss), ("all", STEPS, whole_loss)):
        parameters = [*model.parameters(), *teacher.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
        for step in range(steps):
            pictures = draw(BATCH, generator)
            loss = loss_of(pictures, torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2) / 127.5 - 1)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0:
                print(f"{what}: step {step + 1} of {steps}, loss {loss:.3f}", flush=True)
    tower._forward_hooks.clear()
    return model.eval()


def write_questions(folder: Path) -> list[dict[str, str]]:
    """The held-out questions, with their pictures beside them."""
    generator = np.random.default_rng(1)
    pictures = draw(EVAL, generator)
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for index in range(EVAL):
        name = f"images/{index:03d}.png"
        Image.fromarray(pictures.pixels[index]).save(folder / name)
        for kind in ("frame", "cell"):
            asked, answer = question(pictures, index, kind, generator)
            records.append({"image": name, "question": asked, "answer": answer, "kind": kind})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3, help="of the language model; 3 unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the pictures trained on")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_questions(folder)
    processor = make_processor()
    model = train(processor, options.layers, options.seed)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
