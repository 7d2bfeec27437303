"""Write the demo's data: documents cut from the source code of Python's own standard library.

Usage: python examples/demo/prepare.py FOLDER

Writes three JSONL files with one document per line, ``{"text": ...}``, the same on every run with the same Python:

- train.jsonl: what the compared methods train on. In 30% of the documents the words stand in random order (the white
  space stays where it was), so that not every token is worth learning;
- clean.jsonl: undamaged documents, for the reference model that excess loss asks for;
- eval.jsonl: undamaged documents on which every method is judged.

The three are split by source file: no file contributes to two of them. Needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path

DOCUMENT_CHARACTERS = 1_500
DAMAGED_SHARE = 0.3
CHARACTERS = {"train": 2_000_000, "clean": 1_000_000, "eval": 100_000}
PIECES_PER_FILE = {"train": 40, "clean": 40, "eval": 2}  # few per file in eval, so that it covers many files
# Tests and generated tables are not what one would call source code; the rest is not part of the library.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python examples/demo/prepare.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    documents = collect(Path(os.__file__).parent)
    damaged = damage(documents["train"])
    for name, texts in documents.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        note = f", {damaged} of them with shuffled words" if name == "train" else ""
        size = sum(map(len, texts)) / 1e6
        print(f"{folder / name}.jsonl: {len(texts)} documents, {size:.1f} million characters{note}")


def collect(library: Path) -> dict[str, list[str]]:
    """The undamaged documents of each split, at most `CHARACTERS` each."""
    documents: dict[str, list[str]] = {name: [] for name in CHARACTERS}
    room = dict(CHARACTERS)
    # By hash: an order that is the same everywhere and mixes the packages.
    for file in sorted(source_files(library), key=lambda file: digest(file.relative_to(library))):
        split = ("train", "train", "train", "clean", "eval")[digest(file.relative_to(library)) % 5]
        for text in pieces(file.read_text(encoding="utf-8", errors="replace"))[: PIECES_PER_FILE[split]]:
            if room[split] > 0:
                documents[split].append(text)
                room[split] -= len(text)
    return documents


def source_files(library: Path) -> list[Path]:
    """The library's Python files."""
    return [file for file in library.rglob("*.py") if not LEFT_OUT & set(file.relative_to(library).parts)]


def digest(path: Path) -> int:
    return int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:8], "big")


def pieces(source: str) -> list[str]:
    """Cut a file at line ends into documents of about `DOCUMENT_CHARACTERS`; a short rest is dropped."""
    documents = []
    current = ""
    for line in source.splitlines(keepends=True):
        current += line
        if len(current) >= DOCUMENT_CHARACTERS:
            documents.append(current)
            current = ""
    return documents if len(current) < DOCUMENT_CHARACTERS // 2 else [*documents, current]


def damage(texts: list[str]) -> int:
    """Shuffle the words of a share of the texts in place; returns how many were shuffled."""
    generator = random.Random(0)
    chosen = generator.sample(range(len(texts)), round(DAMAGED_SHARE * len(texts)))
    for index in chosen:
        parts = re.split(r"(\s+)", texts[index])  # words and white space in turn
        words = parts[::2]
        generator.shuffle(words)
        parts[::2] = words
        texts[index] = "".join(parts)
    return len(chosen)


if __name__ == "__main__":
    main()
