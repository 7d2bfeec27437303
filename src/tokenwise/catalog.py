"""The catalog of methods: looked up from a generated JSON file, so that listing and "did you mean" need no torch.

``python -m tokenwise.catalog`` writes the file anew from the classes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.errors import InputError, Problem, missing_file, nearest

if TYPE_CHECKING:
    from tokenwise.method import Method

_FILE = Path(__file__).with_name("catalog.json")
FAMILIES = ("weighting", "reduction", "cache")


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """The catalog: id to entry (class, summary, paper, needs, status, fields), in plain JSON values."""
    if not _FILE.exists():
        return {}
    return {entry["id"]: entry for entry in json.loads(_FILE.read_text(encoding="utf-8"))}


def find(name: str, where: str = "method", family: str | None = None) -> dict[str, Any]:
    """The entry of `name`: an id (``weighting/excess_loss``), a name (``excess_loss``) or a class name.

    Of several families that have the name, `family` is meant where it is given.

    Raises:
        InputError: when no method is called so (the nearest is suggested), or several families have one.
    """
    known = entries()
    if name in known:
        return known[name]
    found = [entry for entry in known.values() if name in (entry["name"], entry["class"])]
    if len(found) > 1:
        found = [entry for entry in found if entry["family"] == family] or found
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(entry["id"] for entry in found)
        raise InputError(Problem(where, f"{name!r} is in several families.", f"Write one of {choices}."))
    names = [entry["name"] for entry in known.values() if family in (None, entry["family"])]
    raise InputError(Problem(where, f"there is no method {name!r}.", nearest(name, names)))


def load_class(name: str, where: str = "method", folder: Path | None = None, family: str | None = None) -> type[Method]:
    """The class of a method by catalog name, or ``./file.py:ClassName`` for one of the user's own.

    Args:
        name: as in `find`, or a path to a Python file, a colon and a class name.
        where: the field to name in an error.
        folder: where relative paths start; the current folder unless given.
        family: the one that is meant where several have the name.
    """
    from tokenwise.method import Method

    if ".py:" not in name:
        entry = find(name, where, family)
        return getattr(importlib.import_module(entry["module"]), entry["class"])
    file, _, attribute = name.rpartition(":")
    path = (folder or Path.cwd()) / file
    if not path.is_file():
        raise InputError(missing_file(where, path))
    spec = importlib.util.spec_from_file_location(f"tokenwise_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(Problem(where, f"{path.name} cannot be imported: {error!r}.")) from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Method)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Method)]
        raise InputError(Problem(where, f"{path.name} has no method class {attribute!r}.", nearest(attribute, classes)))
    return found


def build(spec: Any, where: str = "method", folder: Path | None = None, family: str | None = None) -> Method:
    """A method from what a plan or a command line says: a name, or ``{name: {field: value}}``.

    Raises:
        InputError: with every problem of the spec, the fields named as ``<where>.<name>.<field>``.
    """
    if isinstance(spec, str):
        name, fields = spec, dict[str, Any]()
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, fields = next(iter(spec.items()))
        fields = {} if fields is None else fields
    else:
        raise InputError(Problem(where, f"{spec!r} is not a method.", "Write a name, or {name: {field: value}}."))
    if not isinstance(name, str) or not isinstance(fields, Mapping):
        raise InputError(Problem(where, f"{spec!r} is not a method.", "Write a name, or {name: {field: value}}."))
    method_class = load_class(name, where, folder, family)
    try:
        return method_class(**{str(key): value for key, value in fields.items()})
    except InputError as error:
        owner = method_class.__name__
        raise InputError(
            Problem(f"{where}.{name}" + problem.field.removeprefix(owner), problem.message, problem.fix)
            for problem in error.problems
        ) from None


def generate() -> list[dict[str, Any]]:
    """The catalog's entries, read from the classes."""
    from tokenwise.method import UNCHECKED, Method

    for family in FAMILIES:
        package = importlib.import_module(f"tokenwise.{family}")
        for file in sorted(Path(package.__path__[0]).glob("*.py")):
            importlib.import_module(f"tokenwise.{family}.{file.stem}")

    def leaves(parent: type[Method]) -> list[type[Method]]:
        return [child for sub in parent.__subclasses__() for child in [sub, *leaves(sub)]]

    classes = {c for c in leaves(Method) if c.__module__.startswith("tokenwise.")}
    found = [_entry(c) for c in classes if not inspect.isabstract(c) and c.card.checked != UNCHECKED]
    return sorted(found, key=lambda entry: entry["id"])


def _entry(method_class: type[Method]) -> dict[str, Any]:
    card = method_class.card
    schema = method_class.model_json_schema()["properties"] if method_class.model_fields else {}
    fields: dict[str, dict[str, Any]] = {}
    for name, field in method_class.model_fields.items():
        description = schema[name]
        limits = [
            f"{sign} {description[key]:g}"
            for key, sign in (
                ("exclusiveMinimum", ">"),
                ("minimum", ">="),
                ("exclusiveMaximum", "<"),
                ("maximum", "<="),
            )
            if key in description
        ]
        choices = [str(choice) for choice in description.get("enum", [])]
        fields[name] = {
            "description": description.get("description", ""),
            "range": description.get("range") or ", ".join(limits or choices),
            **({"required": True} if field.is_required() else {"default": description.get("default")}),
        }
    traits = {
        trait: sorted(value) if isinstance(value := getattr(method_class, trait), frozenset) else value
        for trait in getattr(method_class, "traits", ())
    }
    return {
        "id": card.id,
        "name": card.name,
        "family": card.family,
        "class": method_class.__name__,
        "module": method_class.__module__,
        "summary": method_class.summary(),
        "paper": card.paper.model_dump() | {"url": card.paper.url} if card.paper else None,
        "needs": list(card.needs),
        "status": card.status,
        "checked": card.checked,
        "control": card.control,
        "traits": traits,
        "fields": fields,
    }


def write() -> None:
    """Write the catalog's file anew."""
    _FILE.write_text(json.dumps(generate(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from tokenwise import catalog  # the module under its own name, not __main__

    catalog.write()
