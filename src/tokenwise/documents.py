"""Documents and records in files: text, JSON lines, JSON, Parquet, and folders that `datasets` saved."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tokenwise.errors import InputError, Problem, missing_file, nearest

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")


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
            for where, text in read_values(path, text_field, field):
                if text is not None and not isinstance(text, str):
                    message = f"field {text_field!r} of {where} holds {type(text).__name__}, not text."
                    raise InputError(Problem(field, message))
                if text and not text.isspace():
                    documents.append(text)
                else:
                    documents.empty += 1
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not documents:
        names = ", ".join(str(path) for path in files[:3]) + (" ..." if len(files) > 3 else "")
        raise InputError(Problem(field, f"there is no text in {names} ({documents.empty} empty documents)."))
    return documents


def read_values(path: Path, name: str, field: str = "data") -> Iterator[tuple[str, Any]]:
    """One value of every record of a file, in order, each with where it stands, for messages.

    Args:
        path: as `read_documents` takes it; the content of a text file is its only value.
        name: the field or column to read. Of a text file it is not asked.
        field: the field to name in an error.

    Raises:
        InputError: when the file cannot be read, or a record lacks the field.
    """
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            yield from ((repr(str(path)), value) for value in _read_dataset(path, name, field))
        elif suffix in TEXT_SUFFIXES:
            yield repr(str(path)), path.read_text(encoding="utf-8-sig")
        elif suffix == ".parquet":
            yield from ((repr(str(path)), value) for value in _read_parquet(path, name, field))
        else:
            yield from _read_json(path, name, field)
    except UnicodeDecodeError as error:
        message = f"{str(path)!r} is not UTF-8 text (byte {error.start})."
        raise InputError(Problem(field, message, "Convert it, or leave it out.")) from error
    except OSError as error:
        raise InputError(Problem(field, f"{str(path)!r} cannot be read: {error.strerror or error}.")) from error


def read_records(paths: Iterable[Path | str], field: str = "data") -> Iterator[tuple[str, Any]]:
    """All records of the files, in order, each with where it stands, for messages.

    Args:
        paths: JSON lines, a JSON list, Parquet, or folders that `datasets.Dataset.save_to_disk` made.
        field: the field to name in an error.

    Raises:
        InputError: when a file is plain text or cannot be read.
    """
    for path in map(Path, paths):
        suffix = path.suffix.lower()
        if path.is_dir():
            from datasets import load_from_disk

            yield from ((f"row {number} of {str(path)!r}", row) for number, row in enumerate(load_from_disk(path), 1))
        elif suffix in TEXT_SUFFIXES:
            fix = f"Readable: {', '.join(name for name in SUFFIXES if name not in TEXT_SUFFIXES)}."
            raise InputError(Problem(field, f"{str(path)!r} is plain text, which has no fields.", fix))
        elif suffix == ".parquet":
            batches = _parquet_file(path, field).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"row {number} of {str(path)!r}", row) for number, row in enumerate(rows, 1))
        else:
            try:
                with path.open(encoding="utf-8-sig") as stream:
                    yield from _records(stream, path, field)
            except UnicodeDecodeError as error:
                message = f"{str(path)!r} is not UTF-8 text (byte {error.start})."
                raise InputError(Problem(field, message, "Convert it, or leave it out.")) from error


def count_values(path: Path, field: str = "data") -> int:
    """How many records a file has, without reading them where that is possible; lines for JSON lines."""
    suffix = path.suffix.lower()
    if path.is_dir():
        from datasets import load_from_disk

        return len(load_from_disk(str(path)))
    if suffix in TEXT_SUFFIXES:
        return 1
    if suffix == ".parquet":
        return int(_parquet_file(path, field).metadata.num_rows)
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        return sum(1 for _ in _records(stream, path, field)) if suffix == ".json" else sum(1 for _ in stream)


def _read_dataset(path: Path, text_field: str, field: str) -> Iterator[Any]:
    from datasets import load_from_disk

    dataset = load_from_disk(str(path))
    check_field(text_field, dataset.column_names, str(path), field)
    for batch in dataset.select_columns([text_field]).iter(batch_size=1000):
        yield from batch[text_field]


def _read_parquet(path: Path, text_field: str, field: str) -> Iterator[Any]:
    file = _parquet_file(path, field)
    check_field(text_field, file.schema_arrow.names, str(path), field)
    for batch in file.iter_batches(columns=[text_field]):
        yield from batch.column(0).to_pylist()


def _parquet_file(path: Path, field: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(Problem(field, f"{str(path)!r} is not a Parquet file.")) from error


def _read_json(path: Path, text_field: str, field: str) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as stream:
        for where, record in _records(stream, path, field):
            if not isinstance(record, dict):
                message = f"{where} holds {type(record).__name__}, not an object with a field {text_field!r}."
                raise InputError(Problem(field, message))
            check_field(text_field, record, where, field)
            yield where, record[text_field]


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


def check_field(text_field: str, fields: Iterable[str], where: str, field: str) -> None:
    """Check that a record has the field that is to be read.

    Raises:
        InputError: when it does not, with what it has.
    """
    if text_field not in fields:
        message = f"{where} has no field {text_field!r}; it has {', '.join(fields) or 'none'}."
        fix = nearest(text_field, fields, "Name the one that holds the text.")
        raise InputError(Problem(field, message, fix))
