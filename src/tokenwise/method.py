"""What every method of every family is: validated hyper-parameters with a card."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenwise.errors import InputError, Problem, nearest


class Paper(BaseModel):
    """Where a method was published.

    Args:
        title: the paper's title.
        arxiv: its arXiv id, or None where there is none.
        venue: conference or journal with the year, empty where unpublished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    arxiv: str | None = None
    venue: str = ""

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


class Card(BaseModel):
    """What a user should know of a method before running it.

    Args:
        id: ``family/name``.
        paper: its source, or None for controls and standard practice.
        needs: what must be there to run it, in plain words ("a reference model").
        status: ``VERIFIED`` when the formula was checked, ``RECONSTRUCTION`` where a part of it is ours.
        checked: against what it was checked, or which part is reconstructed.
        control: the id of the method that should run beside it in a comparison (a random choice at the same budget).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    paper: Paper | None = None
    needs: tuple[str, ...] = ()
    status: Literal["VERIFIED", "RECONSTRUCTION"]
    checked: str
    control: str | None = None

    @property
    def family(self) -> str:
        return self.id.split("/", 1)[0]

    @property
    def name(self) -> str:
        return self.id.split("/", 1)[1]


def snake_case(name: str) -> str:
    """``ExcessLoss`` to ``excess_loss``; acronyms stay together (``DFT`` to ``dft``)."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


UNCHECKED = "a method of your own: nothing was checked"
"""What stands in the card of a class that brings none."""


class Method(BaseModel):
    """A named composition of signal, policy and action; its fields are its hyper-parameters.

    Frozen and stateless: what a run accumulates lives in a State that the action creates. Every field has a
    range, a unit where it has one, and a description; that one definition serves validation, plans, the command
    line, the catalog and the saved config.

    Raises:
        InputError: when a field is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    card: ClassVar[Card]
    version: ClassVar[int] = 1
    """Raised when the results of a method change; stored results of older versions are then not reused."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InputError(problems_of(error, type(self), type(self).__name__)) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "card" not in cls.__dict__ and not cls.__name__.startswith("_"):
            family = getattr(cls, "family", "user")
            cls.card = Card(
                id=f"{family}/{snake_case(cls.__name__)}",
                status="RECONSTRUCTION",
                checked=UNCHECKED,
            )

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())

    def config(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON values."""
        return self.model_dump(mode="json")

    def spec(self) -> dict[str, dict[str, Any]]:
        """The method as a plan writes it: ``{name: {field: value}}``."""
        return {self.card.name: self.config()}

    def replace(self, **fields: Any) -> Self:
        """The same method with some fields changed, validated again."""
        return type(self)(**{**self.config(), **fields})


def problems_of(error: ValidationError, owner: type[BaseModel], where: str) -> list[Problem]:
    """Pydantic's findings as problems that name the field as the user wrote it, the value and the fix."""
    problems = []
    for item in error.errors():
        location = [str(part) for part in item["loc"] if not str(part).startswith("function-")]
        # A union reports one finding per alternative; the alternative's name is no field of the user's.
        name = location[0] if location else ""
        field = f"{where}.{name}" if name else where
        if item["type"] == "extra_forbidden":
            problems.append(Problem(field, f"there is no field {name!r}.", nearest(name, owner.model_fields)))
        elif item["type"] == "missing":
            described = owner.model_fields[name].description if name in owner.model_fields else None
            problems.append(Problem(field, "is missing.", f"It is: {described}" if described else ""))
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            problems.append(Problem(field, f"{item['input']!r} {message}.".replace("..", ".")))
    return [
        problem for index, problem in enumerate(problems) if problem.field not in {p.field for p in problems[:index]}
    ]


class Handle(AbstractContextManager["Handle"]):
    """What a verb that patches returns: ends its effect exactly once, by `undo()` or by leaving a ``with`` block.

    Attributes:
        stats: what the verb observed so far, in plain numbers.
    """

    def __init__(self) -> None:
        self.stats: dict[str, float] = {}
        self._undos = ExitStack()

    def on_undo(self, undo: Callable[[], object]) -> None:
        """Run `undo` when the handle ends; last registered runs first."""
        self._undos.callback(undo)

    def undo(self) -> None:
        """Put everything back as it was. A second call does nothing."""
        self._undos.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
