"""The methods of a comparison: the listed ones, the baseline and the controls, each with its label and role."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenwise import catalog
from tokenwise.comparison.sections import MISSING, collect
from tokenwise.comparison.tasks import Task
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.method import Method


@dataclass(frozen=True)
class Entry:
    """A method of the comparison.

    Args:
        label: its name in this comparison, unique.
        method: the method itself.
        role: baseline, control or candidate.
        written: how the plan names it: a name of the catalog, or ``file.py:Class``.
        control: label of the random choice at the same budget that runs beside it, or None.
    """

    label: str
    method: Method
    role: Literal["baseline", "control", "candidate"]
    written: str
    control: str | None = None

    @property
    def source(self) -> Path | None:
        """The user's file that defines the method; None for one of the catalog."""
        return Path(self.written.rpartition(":")[0]) if ".py:" in self.written else None

    @property
    def reference(self) -> str | None:
        """Name of the method's reference."""
        return getattr(self.method, "reference", None)

    def spec(self) -> dict[str, Any]:
        """As `catalog.build` takes it. A method of the user's own is named by its file without the folder."""
        if self.source is None:
            return self.method.spec()
        return {f"{self.source.name}:{self.written.rpartition(':')[2]}": self.method.config()}


@dataclass
class Listed:
    """One item of `methods` as it is written; `method` is None when it could not be built."""

    where: str
    written: str
    label: str | None = None
    method: Method | None = None
    spec: Any = None

    def names(self) -> set[str]:
        """By which a plan may call it its baseline, its final label apart."""
        found = {self.written, self.label}
        if self.method is not None:
            found |= {self.method.card.id, self.method.card.name, type(self.method).__name__}
        return {name for name in found if name is not None}

    def identity(self) -> str:
        """Equal for methods that do the same."""
        assert self.method is not None
        name = self.written if ".py:" in self.written else self.method.card.id
        return json.dumps([name, self.method.config()], sort_keys=True)


def read_methods(raw: list[Any] | None, folder: Path, problems: list[Problem], task: type[Task]) -> list[Listed]:
    """The items of `methods`, built where they can be; what is wrong with the others is added to `problems`."""
    if raw == []:
        problems.append(Problem("methods", "lists no method.", MISSING["methods"]))
    return [_read_method(item, f"methods[{index}]", folder, problems, task) for index, item in enumerate(raw or [])]


def _read_method(item: Any, where: str, folder: Path, problems: list[Problem], task: type[Task]) -> Listed:
    label, spec = None, item
    if isinstance(item, Mapping) and {"label", "method"} & set(item):
        with collect(problems):
            label = _label(item, where)
        where, spec = f"{where}.method", item.get("method")
        if spec is None:
            return Listed(where, "", label)
    entry = Listed(where, str(next(iter(spec), "") if isinstance(spec, Mapping) else spec), label, spec=spec)
    with collect(problems):
        try:
            method = catalog.build(spec, where, folder, task.family)
        except TypeError as error:  # an abstract class of the user's
            raise InputError(Problem(where, f"{entry.written} cannot be used: {error}.")) from error
        task.check_method(method, where)
        entry.method = method
        if ".py:" in entry.written:  # its file by its whole path, whatever folder the plan starts from
            file, _, name = entry.written.rpartition(":")
            entry.written = f"{(folder / file).resolve()}:{name}"
    return entry


def _label(item: Mapping[str, Any], where: str) -> str | None:
    form = "Write {label: ..., method: ...}; a method's own fields stand under its name."
    problems = [Problem(f"{where}.{key}", "is no part of it.", form) for key in item if key not in ("label", "method")]
    label = item.get("label")
    if item.get("method") is None:
        problems.append(Problem(where, "has a label but no method.", form))
    if label is not None and not (isinstance(label, str) and label.strip()):
        problems.append(Problem(f"{where}.label", f"{label!r} is not text.", "Write it in quotes."))
    if problems:
        raise InputError(problems)
    return label


def reference_of(entry: Listed) -> Any:
    """What the item says under `reference`, also where the method could not be built."""
    if entry.method is not None:
        return getattr(entry.method, "reference", None)
    fields = next(iter(entry.spec.values()), None) if isinstance(entry.spec, Mapping) else None
    return fields.get("reference") if isinstance(fields, Mapping) else None


def make_entries(listed: list[Listed], baseline: str, problems: list[Problem]) -> list[Entry]:
    """The methods with their labels and roles: the listed ones, the baseline where it is not listed, the controls."""
    if not listed:
        return []
    if baseline == "uniform" and not any(baseline in entry.names() for entry in listed):
        listed = [Listed("baseline", "uniform", method=catalog.build("uniform", "baseline")), *listed]
    built = _without_repeats([entry for entry in listed if entry.method is not None], problems)
    control_of = {entry.identity(): control for entry in built if (control := _control(entry)) is not None}
    controls = {control.identity(): control for control in control_of.values()}
    here = {entry.identity() for entry in built}
    everything = built + [control for identity, control in controls.items() if identity not in here]
    labels = _labels(everything)
    for label, count in Counter(labels).items():
        if count > 1:
            where = [entry.where for entry, its_label in zip(everything, labels, strict=True) if its_label == label]
            problems.append(Problem(where[-1], f"the label {label!r} is taken by {where[0]}.", "Choose another."))

    matching = [entry for entry, label in zip(everything, labels, strict=True) if label == baseline]
    matching = matching or [entry for entry in listed if baseline in entry.names()]
    if not matching:
        known = [*labels, *(name for entry in listed for name in entry.names())]
        problems.append(Problem("baseline", f"{baseline!r} is not among the methods.", nearest(baseline, known)))
    elif len(matching) > 1:
        among = ", ".join(entry.where for entry in matching)
        fix = "Give the one you mean a label, {label: ..., method: ...}, and name that."
        problems.append(Problem("baseline", f"{baseline!r} may be any of {among}.", fix))
    elif len(listed) == 1:
        problems.append(Problem("methods", "there is nothing to compare the baseline with.", "Add a method."))

    def role(entry: Listed) -> Literal["baseline", "control", "candidate"]:
        if matching and entry is matching[0]:
            return "baseline"
        return "control" if entry.identity() in controls else "candidate"

    label_of = {entry.identity(): label for entry, label in zip(everything, labels, strict=True)}
    made = []
    for entry, label in zip(everything, labels, strict=True):
        assert entry.method is not None
        control = control_of.get(entry.identity())
        control_label = label_of[control.identity()] if control is not None else None
        made.append(Entry(label, entry.method, role(entry), entry.written, control_label))
    return made


def _without_repeats(built: list[Listed], problems: list[Problem]) -> list[Listed]:
    first: dict[str, Listed] = {}
    for entry in built:
        same = first.setdefault(entry.identity(), entry)
        if same is not entry:
            problems.append(Problem(entry.where, f"is the same method as {same.where}.", "Remove one of them."))
    return list(first.values())


def _control(entry: Listed) -> Listed | None:
    """The method that keeps as much as a selecting one does, by another rule; none where everything is kept."""
    method = entry.method
    assert method is not None
    keep = getattr(method, "keep", None)
    if not getattr(method, "selects", False) or not method.card.control or keep in (None, 1):
        return None
    control_class = catalog.load_class(method.card.control, entry.where)
    scope = getattr(method, "scope", "token")
    same = {"keep": keep} | ({"scope": scope} if scope != "token" and "scope" in control_class.model_fields else {})
    return Listed(f"the control of {entry.where}", method.card.control, method=control_class(**same))


def _labels(entries: list[Listed]) -> list[str]:
    """The label given, or else the method's name, followed by the fields in which methods of one name differ."""
    named = [(entry.method.card.name, entry.method.config()) for entry in entries if entry.method]
    labels = []
    for entry, (name, config) in zip(entries, named, strict=True):
        group = [other for its_name, other in named if its_name == name]
        differing = [key for key in config if any(other.get(key) != config[key] for other in group)]
        described = ", ".join(f"{key}={config[key]}" for key in differing)
        labels.append(entry.label or f"{name} {described}".strip())
    return labels
