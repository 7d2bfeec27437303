"""Write labelled texts of two classes, one a hundred times as frequent as the other, with wrong labels among them.

Usage: python examples/imbalance/prepare.py FOLDER

A text is a row of made-up words. Texts of the class "fault" hold two or three of sixty words that hint at it; one of
the class "normal" now and then holds one, never more. Writes, the same on every run:

- train.jsonl: TRAIN texts, {"text": ..., "label": ...}, 100 labelled normal for each labelled fault. A fifth of the
  labels "fault" are wrong, and a fifth of the faults are labelled normal;
- eval.jsonl: EVAL texts of each class, all labels right.

Needs nothing but Python.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

TRAIN = 10_100
RATIO = 100
NOISE = 0.2
EVAL = 200
WORDS = 12


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python examples/imbalance/prepare.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    words = sorted({word(generator) for _ in range(460)})
    generator.shuffle(words)
    hints, common = words[:60], words[60:]
    faults = TRAIN // (RATIO + 1)
    train = [(text(generator, hints, common, fault), fault) for fault in [True] * faults + [False] * (TRAIN - faults)]
    swapped = round(NOISE * faults)
    # As many in each class: a fifth of the faults are called normal, and as many normal texts faults.
    wrong = {*generator.sample(range(faults), swapped), *generator.sample(range(faults, TRAIN), swapped)}
    rows = [record(body, fault != (index in wrong)) for index, (body, fault) in enumerate(train)]
    generator.shuffle(rows)
    held_out = [record(text(generator, hints, common, fault), fault) for fault in (True, False) for _ in range(EVAL)]
    for name, lines in (("train", rows), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    labelled = sum(row["label"] == "fault" for row in rows)
    print(f"{len(rows)} texts to train on, {labelled} of them labelled fault, {swapped} of these wrongly.")


def word(generator: random.Random) -> str:
    """A word of two or three syllables."""
    return "".join(
        generator.choice("bdfgklmnprst") + generator.choice("aeiou") for _ in range(generator.choice((2, 3)))
    )


def text(generator: random.Random, hints: list[str], common: list[str], fault: bool) -> str:
    count = generator.choice((2, 3)) if fault else generator.choice((0, 0, 0, 1))
    chosen = generator.sample(hints, count) + generator.choices(common, k=WORDS - count)
    generator.shuffle(chosen)
    return " ".join(chosen)


def record(body: str, fault: bool) -> dict[str, str]:
    return {"text": body, "label": "fault" if fault else "normal"}


if __name__ == "__main__":
    main()
