"""Labelled images in files: a folder of class folders, Parquet, or a folder that `datasets` saved."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from tokenwise.comparison.rows import Findings
from tokenwise.comparison.sections import shorten
from tokenwise.errors import InputError, Problem, missing_file, nearest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
_KINDS = "A folder with one folder of images for each class, Parquet files, or a folder that datasets saved."

Record = tuple[str, bytes, str | int]
"""Where an image stands, the content of its file, and its label."""


@dataclass
class Pictures:
    """Labelled images, as the bytes of their files.

    Args:
        content: all files, one after the other, uint8.
        ends: where each ends, [images].
        labels: class of each, an index into the model's classes, [images].
        total: how many there were before some were chosen.
    """

    content: NDArray[np.uint8]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64]
    total: int

    def __len__(self) -> int:
        return len(self.ends)

    def image(self, index: int) -> Any:
        """One of them, decoded."""
        start = int(self.ends[index - 1]) if index else 0
        return decode(self.content[start : self.ends[index]].tobytes())

    def save(self, stream: IO[bytes]) -> None:
        """Write as `load` reads it."""
        np.savez(stream, content=self.content, ends=self.ends, labels=self.labels, total=np.array(self.total))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["content"], found["ends"], found["labels"], int(found["total"]))


def find_images(value: Any, folder: Path) -> tuple[Path, ...]:
    """The files and folders of images that a path, a list of paths or a glob names, absolute.

    Raises:
        InputError: for a missing one, and one of a kind that cannot be read.
    """
    entries = list(value) if isinstance(value, list | tuple) else [value]
    problems: list[Problem] = []
    found: list[Path] = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            problems.append(Problem("", f"{shorten(entry)} is not a path.", f"Write one. {_KINDS}"))
            continue
        path = folder / Path(entry).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            problems.append(missing_file("", path))
        for match in matches:
            if match.is_dir() and (match / "dataset_dict.json").is_file():
                splits = json.loads((match / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
                fix = f"Write one of them, such as {str(match / splits[0])!r}."
                problems.append(Problem("", f"{str(match)!r} holds the splits {', '.join(splits)}.", fix))
            elif match.is_dir() and not (match / "state.json").is_file() and not _class_folders(match):
                problems.append(Problem("", f"{str(match)!r} has no folder with images in it.", f"Readable: {_KINDS}"))
            elif not match.is_dir() and match.suffix.lower() != ".parquet":
                message = f"{str(match)!r} is of a kind that cannot be read ({match.suffix or 'no suffix'})."
                problems.append(Problem("", message, f"Readable: {_KINDS}"))
            found.append(match.resolve())
    if problems:
        raise InputError(problems)
    return tuple(found)


def read_pictures(
    paths: Sequence[Path], image_field: str, label_field: str, limit: int | None, classes: Mapping[int, str], where: str
) -> Pictures:
    """Read labelled images, every one decoded once to see that it can be.

    Args:
        paths: as `find_images` gives them.
        image_field: field of the image: its file's content, or a mapping with ``bytes`` or ``path``.
        label_field: field of the label: text, or a whole number.
        limit: how many at most, evenly spread over all; None for all.
        classes: the model's, by number.
        where: the field to name in an error.

    Raises:
        InputError: with everything wrong with them.
    """
    findings = Findings(where)
    total = sum(_count(path) for path in paths)
    chosen = _spread(total, limit)
    names: list[str] | None = None
    content, labels, places = [], [], []
    number = 0
    for path in paths:
        names = _class_names(path, label_field) or names
        for place, data, label in _records(path, image_field, label_field, findings):
            if chosen is None or number in chosen:
                try:
                    decode(data)
                except OSError as error:
                    findings.add(place, f"cannot be decoded as an image ({error}).")
                content.append(np.frombuffer(data, dtype=np.uint8))
                labels.append(label)
                places.append(place)
            number += 1
    classed = _classes_of(labels, places, names, classes, findings)
    problems = findings.problems()
    if not labels and not problems:
        problems.append(Problem(where, "there is no image."))
    if problems:
        raise InputError(problems)
    ends = np.cumsum([len(part) for part in content], dtype=np.int64)
    return Pictures(np.concatenate(content), ends, np.array(classed, dtype=np.int64), number)


def _spread(total: int, limit: int | None) -> set[int] | None:
    # The first ones alone would be of one class wherever images are sorted by class.
    return None if limit is None or limit >= total else {place * total // limit for place in range(limit)}


def decode(content: bytes) -> Any:
    """The image in a file's content.

    Raises:
        OSError: where there is none.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def _class_folders(path: Path) -> list[Path]:
    folders = (folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith("."))
    return [folder for folder in folders if any(_image_files(folder))]


def _image_files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        message = f"{str(path)!r} cannot be read: {' '.join(str(error).split())}."
        raise InputError(Problem("task.data.eval", message)) from error


def _dataset(path: Path) -> Any:
    from datasets import Image, load_from_disk

    found = load_from_disk(str(path))
    for name, feature in found.features.items():
        if isinstance(feature, Image):
            found = found.cast_column(name, Image(decode=False))
    return found


def _count(path: Path) -> int:
    if path.is_file():
        return int(_parquet(path).metadata.num_rows)
    if (path / "state.json").is_file():
        return len(_dataset(path))
    return sum(1 for folder in _class_folders(path) for _ in _image_files(folder))


def _class_names(path: Path, label_field: str) -> list[str] | None:
    """The names of the classes by number, where the files say them."""
    if path.is_dir():
        return (
            getattr(_dataset(path).features.get(label_field), "names", None)
            if (path / "state.json").is_file()
            else None
        )
    metadata = _parquet(path).schema_arrow.metadata or {}
    if b"classes" in metadata:
        return [str(name) for name in json.loads(metadata[b"classes"])]
    if b"huggingface" in metadata:
        feature = json.loads(metadata[b"huggingface"]).get("info", {}).get("features", {}).get(label_field, {})
        return feature.get("names")
    return None


def _records(path: Path, image_field: str, label_field: str, findings: Findings) -> Iterator[Record]:
    if path.is_dir() and not (path / "state.json").is_file():
        for folder in _class_folders(path):
            for file in _image_files(folder):
                yield repr(str(file)), file.read_bytes(), folder.name
        return
    if path.is_dir():
        found = _dataset(path)
        columns, rows = list(found.column_names), iter(found)
    else:
        file = _parquet(path)
        columns = file.schema_arrow.names
        wanted = [name for name in (image_field, label_field) if name in columns]
        rows = (row for batch in file.iter_batches(256, columns=wanted) for row in batch.to_pylist())
    missing = [name for name in (image_field, label_field) if name not in columns]
    for name in missing:
        fix = nearest(name, columns, "Name it with image_field or label_field.")
        findings.add(repr(str(path)), f"has no field {name!r}; it has {', '.join(columns)}.", fix)
    for number, row in enumerate(rows if not missing else (), 1):
        place = f"row {number} of {str(path)!r}"
        content, label = _content(row[image_field], path), row[label_field]
        if content is None:
            findings.add(
                place, f"field {image_field!r} holds {shorten(row[image_field])}, not an image file's content."
            )
        elif isinstance(label, bool) or not isinstance(label, str | int):
            findings.add(place, f"field {label_field!r} holds {shorten(label)}, neither text nor a whole number.")
        else:
            yield place, content, label


def _content(value: Any, beside: Path) -> bytes | None:
    if isinstance(value, Mapping):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            file = (beside.parent if beside.is_file() else beside) / value["path"]
            return file.read_bytes() if file.is_file() else None
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _classes_of(
    labels: list[str | int],
    places: list[str],
    names: list[str] | None,
    classes: Mapping[int, str],
    findings: Findings,
) -> list[int]:
    """Each label as a class of the model: by name where both have names, else by number."""
    unnamed = all(name == f"LABEL_{number}" for number, name in classes.items())
    known = {_plain(name): number for number, name in classes.items()}
    folders = sorted({label for label in labels if isinstance(label, str)})
    found = []
    for place, label in zip(places, labels, strict=True):
        name = names[label] if isinstance(label, int) and names is not None and 0 <= label < len(names) else label
        if unnamed and isinstance(label, str) and len(folders) == len(classes):
            number: int | None = folders.index(label)  # the model's classes have numbers alone
        elif isinstance(name, str) and not unnamed:
            number = known.get(_plain(name))
            if number is None:
                fix = nearest(name, classes.values(), "Rename it, or leave these images out.")
                findings.add(place, f"its class {name!r} is none of the model's.", fix)
        else:
            number = label if isinstance(label, int) and label in classes else None
            if number is None:
                findings.add(place, f"its label {label!r} is none of the model's {len(classes)} classes.")
        found.append(-1 if number is None else number)
    return found


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()
