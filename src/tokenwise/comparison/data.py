"""From files to token ids: documents, blocks to train on, and windows in which every held-out token is scored once."""

from __future__ import annotations

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenwise.errors import InputError, Problem, missing_file, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")
IGNORED = -100

_PIECE = 200_000
"""Characters: longer documents are tokenized in pieces, or one large file would cost a hundred times its size."""
_BATCH = 4_000_000
"""Characters tokenized at once."""


class Documents(list[str]):
    """Documents in the order of their files; `empty` is how many were left out because they hold no text."""

    empty: int = 0


def find_files(patterns: str | Sequence[str], folder: Path, field: str = "data") -> list[Path]:
    """The files that a path, a list of paths or a glob names, absolute, sorted within each glob.

    Raises:
        InputError: for a missing file, a glob that matches nothing, and a kind of file that cannot be read.
    """
    listed = isinstance(patterns, list | tuple)
    entries = list(patterns) if listed else [patterns]
    if not entries:
        raise InputError(Problem(field, "names no file."))
    found: list[Path] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        where = f"{field}[{index}]" if listed else field
        if not isinstance(entry, str) or not entry:
            problems.append(Problem(where, f"{entry!r} is not a path.", "Write a path, a list of paths or a glob."))
            continue
        path = folder / Path(entry).expanduser()
        matches = [path]
        if not path.exists():
            if not glob.has_magic(entry):
                problems.append(missing_file(where, path))
                continue
            matches = [
                Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if not Path(match).is_dir()
            ]
            if not matches:
                problems.append(Problem(where, f"no file matches {str(path)!r}."))
        problems += [problem for match in matches if (problem := _kind_problem(match, where))]
        found += [match.resolve() for match in matches]
    if problems:
        raise InputError(problems)
    return found


def _kind_problem(path: Path, field: str) -> Problem | None:
    if path.is_dir():
        if (path / "state.json").is_file():
            return None
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            fix = f"Write one of them, such as {str(path / splits[0])!r}."
            return Problem(field, f"{str(path)!r} holds the splits {', '.join(splits)}.", fix)
        fix = f"Write its files, such as {str(path / '*.txt')!r}."
        return Problem(field, f"{str(path)!r} is a folder, but not one that datasets' save_to_disk made.", fix)
    if path.suffix.lower() not in SUFFIXES:
        message = f"{str(path)!r} is of a kind that cannot be read ({path.suffix or 'no suffix'})."
        return Problem(field, message, f"Readable: {', '.join(SUFFIXES)}, and folders that save_to_disk made.")
    return None


def read_documents(paths: Iterable[Path | str], text_field: str = "text", field: str = "data") -> Documents:
    """All documents of the files, those without text left out.

    Args:
        paths: text files (a file is a document), JSON lines, a JSON list of objects, Parquet, or folders that
            `datasets.Dataset.save_to_disk` made.
        text_field: name of the field or column that holds the text.
        field: the field to name in an error.

    Raises:
        InputError: for every file that cannot be read, with the line of a broken record; or when no text is left.
    """
    files = [Path(path) for path in paths]
    documents = Documents()
    problems: list[Problem] = []
    for path in files:
        try:
            for text in _read(path, text_field, field):
                if text is not None and not isinstance(text, str):
                    message = f"field {text_field!r} of {str(path)!r} holds {type(text).__name__}, not text."
                    raise InputError(Problem(field, message))
                if text and not text.isspace():
                    documents.append(text)
                else:
                    documents.empty += 1
        except UnicodeDecodeError as error:
            message = f"{str(path)!r} is not UTF-8 text (byte {error.start})."
            problems.append(Problem(field, message, "Convert it, or leave it out."))
        except OSError as error:
            problems.append(Problem(field, f"{str(path)!r} cannot be read: {error.strerror or error}."))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not documents:
        names = ", ".join(str(path) for path in files[:3]) + (" ..." if len(files) > 3 else "")
        raise InputError(Problem(field, f"there is no text in {names} ({documents.empty} empty documents)."))
    return documents


def _read(path: Path, text_field: str, field: str) -> Iterable[Any]:
    if path.is_dir():
        return _read_dataset(path, text_field, field)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return [path.read_text(encoding="utf-8-sig")]
    if suffix == ".parquet":
        return _read_parquet(path, text_field, field)
    return _read_json(path, text_field, field)


def _read_dataset(path: Path, text_field: str, field: str) -> Iterator[Any]:
    from datasets import load_from_disk

    dataset = load_from_disk(str(path))
    _check_text_field(text_field, dataset.column_names, str(path), field)
    for batch in dataset.select_columns([text_field]).iter(batch_size=1000):
        yield from batch[text_field]


def _read_parquet(path: Path, text_field: str, field: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(Problem(field, f"{str(path)!r} is not a Parquet file.")) from error
    _check_text_field(text_field, file.schema_arrow.names, str(path), field)
    for batch in file.iter_batches(columns=[text_field]):
        yield from batch.column(0).to_pylist()


def _read_json(path: Path, text_field: str, field: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as stream:
        for where, record in _records(stream, path, field):
            if not isinstance(record, dict):
                message = f"{where} holds {type(record).__name__}, not an object with a field {text_field!r}."
                raise InputError(Problem(field, message))
            _check_text_field(text_field, record, where, field)
            text = record[text_field]
            if text is not None and not isinstance(text, str):
                message = f"field {text_field!r} of {where} holds {type(text).__name__}, not text."
                raise InputError(Problem(field, message))
            yield text


def _records(stream: IO[str], path: Path, field: str) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json" and _first_character(stream) == "[":
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            message = f"{str(path)!r} line {error.lineno} is not JSON: {error.msg}."
            raise InputError(Problem(field, message)) from error
        yield from ((f"record {index} of {str(path)!r}", record) for index, record in enumerate(content, 1))
        return
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            where = f"{str(path)!r} line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                message = f"{where} is not JSON: {error.msg} (column {error.colno})."
                fix = "A file of JSON lines holds one object on each line."
                raise InputError(Problem(field, message, fix)) from error


def _first_character(stream: IO[str]) -> str:
    first = next((character for line in stream for character in line if not character.isspace()), "")
    stream.seek(0)
    return first


def _check_text_field(text_field: str, fields: Iterable[str], where: str, field: str) -> None:
    if text_field not in fields:
        message = f"{where} has no field {text_field!r}; it has {', '.join(fields) or 'none'}."
        fix = nearest(text_field, fields, "Set text_field to the one that holds the text.")
        raise InputError(Problem(field, message, fix))


def joint_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between two documents, the last of which the next document's first token is predicted from.

    EOS, then BOS where the tokenizer itself begins texts with it; BOS alone for a tokenizer without EOS; none for one
    without either.
    """
    begins = tokenizer("a")["input_ids"][:1]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [eos, bos] if begins == [bos] or eos is None else [eos]
    return [token for token in ids if token is not None]


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    """Token ids of each document in turn, without special tokens.

    Documents beyond 200,000 characters are tokenized in pieces that end at a line's end where there is one.
    """
    for _, pieces in itertools.groupby(_encoded_pieces(documents, tokenizer), key=itemgetter(0)):
        arrays = [ids for _, ids in pieces]
        yield arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _encoded_pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    for batch in _batches((index, piece) for index, text in enumerate(documents) for piece in _pieces(text)):
        encoded = tokenizer(
            [piece for _, piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for (index, _), ids in zip(batch, encoded, strict=True):
            yield index, np.array(ids, dtype=np.int32)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        # Behind a line's end that no blank follows: tokenizers end a token there anyway.
        end = start + _PIECE
        while end > start + 1 and not (text[end - 1] == "\n" and not text[end].isspace()):
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start + 1 else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for index, piece in pieces:
        batch.append((index, piece))
        characters += len(piece)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def token_blocks(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    at_least: int = 1,
    field: str = "data.train",
) -> NDArray[np.int32]:
    """The documents in one row, joined as `joint_ids` says and cut into blocks; what is left over is dropped.

    Args:
        documents: texts.
        tokenizer: makes the token ids.
        sequence_length: tokens of a block.
        at_least: how many blocks there must be.
        field: the field to name in an error.

    Returns:
        Token ids, shape [blocks, sequence_length].

    Raises:
        InputError: when the documents are too short for `at_least` blocks.
    """
    joint = np.array(joint_ids(tokenizer), dtype=np.int32)
    parts = [joint[-1:]]
    for ids in encode(documents, tokenizer):
        parts += [ids, joint]
    stream = np.concatenate(parts)
    blocks = len(stream) // sequence_length
    if blocks < at_least:
        needed = at_least * sequence_length
        message = f"too short: {len(stream):,} tokens, and {needed:,} are needed"
        message += f" (a batch of {at_least} sequences of {sequence_length} tokens)."
        raise InputError(Problem(field, message, "Add text, or lower sequence_length or batch_size."))
    return stream[: blocks * sequence_length].reshape(blocks, sequence_length)


@dataclass(frozen=True)
class Windows:
    """Held-out documents cut into sequences, every token of a document predicted in exactly one of them.

    A document's windows overlap by one token, so that each begins with the token before the first one it scores.
    Documents with nothing to score are left out.

    Args:
        input_ids: token ids, padded on the right, shape [windows, sequence_length].
        labels: the same ids where they are scored, -100 elsewhere, shape [windows, sequence_length]. As the models of
            transformers want them: label t is predicted from the tokens before t, and column 0 is always -100.
        lengths: tokens of each window without padding, shape [windows].
        document: which document each window is of, in order, shape [windows].
        text_bytes: UTF-8 bytes of each document that its scored tokens cover, shape [documents].
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int32]
    document: NDArray[np.int32]
    text_bytes: NDArray[np.int64]

    def save(self, stream: IO[bytes]) -> None:
        """Write to an open file."""
        np.savez(stream, **vars(self))

    @classmethod
    def load(cls, path: Path | str) -> Windows:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def held_out_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    field: str = "data.eval",
) -> Windows:
    """Windows of at most `sequence_length` tokens in which to score the documents.

    The first token of a document is predicted from the token that also stands before it in training (see
    `joint_ids`); for a tokenizer without BOS and EOS it is not scored.

    Raises:
        InputError: when there is no token to score.
    """
    start = np.array(joint_ids(tokenizer)[-1:], dtype=np.int32)
    stride = sequence_length - 1
    windows: list[NDArray[np.int32]] = []
    document: list[int] = []
    covered: list[int] = []
    kept, encoded = itertools.tee(documents)
    for text, ids in zip(kept, encode(encoded, tokenizer), strict=True):
        row = np.concatenate([start, ids])
        if len(row) < 2:
            continue
        windows += [row[begin : begin + sequence_length] for begin in range(0, len(row) - 1, stride)]
        document += [len(covered)] * -(-(len(row) - 1) // stride)
        unscored = 0 if len(start) else len(str(tokenizer.decode(ids[:1])).encode())
        covered.append(len(text.encode()) - unscored)
    if not windows:
        raise InputError(Problem(field, "too short: there is no token to score.", "Add held-out text."))
    padding = tokenizer.pad_token_id or 0
    input_ids = np.full((len(windows), sequence_length), padding, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED)
    for index, window in enumerate(windows):
        input_ids[index, : len(window)] = window
        labels[index, 1 : len(window)] = window[1:]
    return Windows(
        input_ids,
        labels,
        np.array([len(window) for window in windows], dtype=np.int32),
        np.array(document, dtype=np.int32),
        np.array(covered, dtype=np.int64),
    )


def write_array(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a binary file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            write(stream)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
