"""`tokenwise explain --data`: how much each labelled text of a file weighs under a classifier's method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.errors import InputError, Problem, nearest

if TYPE_CHECKING:
    from tokenwise.cli.example_view import ExampleView
    from tokenwise.weighting.classification import ClassObjective

SHOWN = 50
"""So many examples are weighed, as one micro-batch; classes are counted in all."""


@dataclass(frozen=True)
class _Example:
    """A labelled text.

    Args:
        place: where it stands, for messages.
        text: the text.
        label: a class, by name or number; with several labels a list of them.
    """

    place: str
    text: str
    label: Any


def explain_examples(model_name: str, data: Path, method_name: str, fields: dict[str, Any]) -> ExampleView:
    """The weight that a method gives to each of the first `SHOWN` examples of a file.

    Args:
        model_name: folder or hub id of a classifier of whole texts (…ForSequenceClassification).
        data: a .jsonl, .json or .parquet file or a folder of datasets, whose rows have ``text`` and ``label``: a class
            by its name in the model's configuration or its number, or for several labels a list of them.
        method_name: as `catalog.load_class` takes it, of a `ClassObjective`.
        fields: the method's fields. Class counts are those of the file unless given.

    Raises:
        InputError: when the model, the data or the method cannot be used.
    """
    from tokenwise import catalog
    from tokenwise.cli.example_view import ExampleRow, ExampleView
    from tokenwise.models import load
    from tokenwise.weighting.classification import ClassObjective

    method: Any = catalog.build({method_name: fields}, "--method")
    assert isinstance(method, ClassObjective)
    examples = _read(data)
    directory = load.locate(model_name, field="MODEL")
    config: Any = load.read_config(directory, "MODEL", "classification")
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        message = f"{model_name!r} has no classifier of texts ({', '.join(config.architectures or ['unknown'])})."
        raise InputError(Problem("MODEL", message, "Give one saved from a …ForSequenceClassification."))
    tokenizer = load.load_tokenizer(directory, "MODEL")
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    several = config.problem_type == "multi_label_classification"
    classes = _classes(examples, names, several)
    if "counts" in method.reads and getattr(method, "counts", None) is None:
        method = _counted(method, classes, names, several)
    model = load.make_or_load_classifier(directory, 0, tokenizer, names, "MODEL").eval()
    if several:
        model.config.problem_type = "multi_label_classification"
    shown = examples[:SHOWN]
    found, cut = _weigh(model, tokenizer, method, shown, classes[: len(shown)], several)
    settings = f" ({', '.join(f'{name} {value}' for name, value in fields.items())})" if fields else ""
    return ExampleView(
        title=f"{method_name}{settings} on {model_name}",
        rows=[
            ExampleRow(example.text, ", ".join(names[index] for index in own) or "none", weight, loss)
            for example, own, weight, loss in zip(shown, classes[:SHOWN], found.weights, found.nll, strict=True)
        ],
        examples=len(examples),
        cut=cut,
        starts=type(method).start is not ClassObjective.start,
    )


def _read(data: Path) -> list[_Example]:
    from tokenwise.documents import find_files, read_records

    examples: list[_Example] = []
    problems: list[Problem] = []
    for place, row in read_records(find_files(str(data), Path.cwd(), "--data"), "--data"):
        if not isinstance(row, Mapping):
            problems.append(Problem("--data", f"{place} is no object with text and label."))
            continue
        missing = [name for name in ("text", "label") if row.get(name) is None]
        problems += [
            Problem(
                "--data",
                f"{place} has no field {name!r}; it has {', '.join(row) or 'none'}.",
                nearest(name, row, "Each row needs a text and its label."),
            )
            for name in missing
        ]
        if not missing:
            if not isinstance(row["text"], str):
                problems.append(Problem("--data", f"field 'text' of {place} holds {row['text']!r}, which is no text."))
            examples.append(_Example(place, str(row["text"]), row["label"]))
    if not problems and not examples:
        problems.append(Problem("--data", f"{str(data)!r} holds no row.", "Give rows with text and label."))
    _raise(problems)
    return examples


def _raise(problems: list[Problem]) -> None:
    """The first problems; of many rows with the same mistake a few say it all."""
    if problems:
        raise InputError(problems[:5])


def _classes(examples: list[_Example], names: list[str], several: bool) -> list[list[int]]:
    """The classes of each example, by number."""
    found, problems = [], []
    for example in examples:
        given = example.label if several else [example.label]
        own = []
        if several and not isinstance(given, list):
            message = f"field 'label' of {example.place} holds {given!r}; this model's texts have several labels."
            problems.append(Problem("--data", message, "Write a list of classes, which may be empty."))
            given = []
        for label in given:
            if isinstance(label, str) and label in names:
                own.append(names.index(label))
            elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
                own.append(label)
            else:
                message = f"the label {label!r} of {example.place} is none of the model's {len(names)} classes."
                fix = f"Known: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}; or 0 to {len(names) - 1}."
                problems.append(Problem("--data", message, nearest(str(label), names, fix)))
        found.append(own)
    _raise(problems)
    return found


def _counted(method: ClassObjective, classes: list[list[int]], names: list[str], several: bool) -> ClassObjective:
    """The method with the number of examples of each class."""
    import torch

    numbers = Counter(index for own in classes for index in own)
    counts = [numbers[index] for index in range(len(names))]
    if method.problems(torch.tensor(counts, dtype=torch.float64), several):
        absent = ", ".join(name for name, count in zip(names, counts, strict=True) if not count)
        message = f"{type(method).__name__} reads how often each class occurs, and the file has none of {absent}."
        raise InputError(Problem("--data", message, "Give the counts of your training data: -p counts=[760, 40]."))
    return method.replace(counts=counts)


def _weigh(
    model: Any,
    tokenizer: Any,
    method: ClassObjective,
    examples: list[_Example],
    classes: list[list[int]],
    several: bool,
) -> tuple[Any, int]:
    """The weights, and how many texts were cut to what the model reads."""
    import torch

    from tokenwise.models.load import max_positions, padding_id
    from tokenwise.weighting.example_weights import example_weights

    ids = tokenizer([example.text for example in examples], verbose=False)["input_ids"]
    limit = max_positions(model.config)
    cut = 0 if limit is None else sum(len(row) > limit for row in ids)
    if cut:
        ids = tokenizer([example.text for example in examples], truncation=True, max_length=limit)["input_ids"]
    empty = [example.place for example, row in zip(examples, ids, strict=True) if not row]
    if empty:
        raise InputError(Problem("--data", f"the text of {empty[0]} has no token.", "Leave it out."))
    longest = max(map(len, ids))
    padding = padding_id(tokenizer)
    batch = {
        "input_ids": torch.tensor([row + [padding] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }
    if several:
        batch["labels"] = torch.zeros(len(ids), model.config.num_labels)
        for row, own in enumerate(classes):
            batch["labels"][row, own] = 1.0
    else:
        batch["labels"] = torch.tensor([own[0] for own in classes])
    return example_weights(model, method, batch), cut
