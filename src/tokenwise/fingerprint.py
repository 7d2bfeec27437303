"""Fingerprints of content: what a result depends on, whatever the files are called and wherever they lie."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenwise

_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja"}


def of_value(value: Any) -> str:
    """Of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def of_file(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_data(paths: Iterable[Path]) -> str:
    """Of data files and `datasets` directories in their order. The suffix counts, as it decides how a file is read."""
    return of_value([_tree(path) if path.is_dir() else [path.suffix, of_file(path)] for path in paths])


def of_model(directory: Path) -> str:
    """Of a saved model: weights, configuration and tokenizer files, by name."""
    return _files(directory, _MODEL_SUFFIXES)


def of_tokenizer(directory: Path) -> str:
    """Of the small files of a saved model or tokenizer, the weights left out."""
    return _files(directory, _MODEL_SUFFIXES - {".safetensors"})


def of_vocabulary(tokenizer: Any) -> str:
    """Of what token ids mean: the vocabulary and the special tokens, whatever files hold them."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return of_value([sorted(tokenizer.get_vocab().items()), special])


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    others = ("torch", "transformers", "tokenizers")
    return {"tokenwise": tokenwise.__version__, **{name: importlib.metadata.version(name) for name in others}}


def _files(directory: Path, suffixes: set[str]) -> str:
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.suffix in suffixes]
    return of_value([[path.name, of_file(path)] for path in files])


def _tree(directory: Path) -> list[list[str]]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [[path.relative_to(directory).as_posix(), of_file(path)] for path in files]
