"""The methods of a comparison: the listed ones, the baseline and the controls, each with its label and role."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenwise import catalog
from tokenwise.comparison.sections import MISSING, collect
from tokenwise.comparison.task import BaseTask
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
        share: what it may keep, where the plan has several budgets, in (0, 1); None for the dense model.
        series: its name without the budget.
        way: the way in which it is run, where the plan has several.
    """

    label: str
    method: Method
    role: Literal["baseline", "control", "candidate"]
    written: str
    control: str | None = None
    share: float | None = None
    series: str = ""
    way: str = ""

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
    """One item of `methods` as it is written; `method` is None when it could not be built.

    Where the plan has budgets there is one for each, `share` in numbers and `shown` in words, and for each `way`.
    """

    where: str
    written: str
    label: str | None = None
    method: Method | None = None
    spec: Any = None
    share: float | None = None
    shown: str = ""
    way: str = ""
    series: str | None = None

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
        return json.dumps([name, self.method.config(), self.way], sort_keys=True)


def read_methods(raw: list[Any] | None, folder: Path, problems: list[Problem], task: type[BaseTask]) -> list[Listed]:
    """The items of `methods`, built where they can be; what is wrong with the others is added to `problems`."""
    if raw == []:
        problems.append(Problem("methods", "lists no method.", MISSING["methods"]))
    return [_read_method(item, f"methods[{index}]", folder, problems, task) for index, item in enumerate(raw or [])]


def _read_method(item: Any, where: str, folder: Path, problems: list[Problem], task: type[BaseTask]) -> Listed:
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


def make_entries(listed: list[Listed], baseline: str, problems: list[Problem], task: type[BaseTask]) -> list[Entry]:
    """The methods with their labels and roles: the listed ones, the baseline where it is not listed, the controls."""
    if not listed:
        return []
    if baseline == task.baseline and not any(baseline in entry.names() for entry in listed):
        method = catalog.build(baseline, "baseline", family=task.family)
        listed = [Listed("baseline", baseline, method=method), *listed]
    built = _without_repeats([entry for entry in listed if entry.method is not None], problems)
    control_of = {entry.identity(): control for entry in built if (control := _control(entry)) is not None}
    controls = {control.identity(): control for control in control_of.values()}
    here = {entry.identity() for entry in built}
    everything = built + [control for identity, control in controls.items() if identity not in here]
    labels = _labels(everything)
    series = _labels([replace(entry, label=entry.series) for entry in everything], apart=False)
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
    for entry, label, name in zip(everything, labels, series, strict=True):
        assert entry.method is not None
        control = control_of.get(entry.identity())
        control_label = label_of[control.identity()] if control is not None else None
        made.append(Entry(label, entry.method, role(entry), entry.written, control_label, entry.share, name, entry.way))
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
    # A token reduction always leaves out some tokens.
    if not getattr(method, "selects", entry.share is not None) or not method.card.control or keep in (None, 1):
        return None
    control_class = catalog.load_class(method.card.control, entry.where)
    scope = getattr(method, "scope", "token")
    same = {"keep": keep} | ({"scope": scope} if scope != "token" and "scope" in control_class.model_fields else {})
    if entry.share is not None and {"layer"} & method.model_fields_set & control_class.model_fields.keys():
        same["layer"] = method.layer  # type: ignore[attr-defined]  # tokens go where the method's do
    where = f"the control of {entry.where}"
    return replace(
        entry, where=where, written=method.card.control, label=None, series=None, method=control_class(**same)
    )


def _labels(entries: list[Listed], apart: bool = True) -> list[str]:
    """The label given, or else the method's name, followed by the fields in which methods of one name differ.

    Args:
        entries: the methods.
        apart: whether a method at several budgets is told apart by them.
    """
    named = [
        (entry.method.card.name, _differing_fields(entry, entry.method.config(), apart))
        for entry in entries
        if entry.method
    ]
    labels, several = [], len({entry.way for entry in entries if entry.share is not None}) > 1
    for entry, (name, config) in zip(entries, named, strict=True):
        group = [other for its_name, other in named if its_name == name]
        differing = [key for key in config if any(other.get(key) != config[key] for other in group)]
        described = ", ".join(f"{key}={config[key]}" if key else str(config[key]) for key in differing)
        labels.append(entry.label or " ".join(part for part in (name, described, entry.way * several) if part))
    return labels


def _differing_fields(entry: Listed, config: dict[str, Any], apart: bool) -> dict[str, Any]:
    """The fields that may tell methods of one name apart; a budget of the plan has no name."""
    if entry.share is None:
        return config
    others = {name: value for name, value in config.items() if name != "keep"}
    return {"": entry.shown, **others} if apart else others
