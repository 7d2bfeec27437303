"""Plans: how many tokens stay after each block, kept as portable JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tokenwise.errors import InputError, Problem, missing_file
from tokenwise.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenwise.policies.plans import Shape

_Count = Annotated[int, Field(ge=1)]


class Plan(BaseModel):
    """How many tokens stay after each block of one shape of model; a few whole numbers that travel as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal["tokenwise reduction plan 1"] = "tokenwise reduction plan 1"
    """What the file is, and the version of its layout."""
    allocator: str
    """What decided the numbers."""
    tokens: _Count
    """Tokens at the beginning, protected ones included."""
    prefix: Annotated[int, Field(ge=0)] = 0
    """How many of them, at the beginning, are protected."""
    counts: tuple[_Count, ...]
    """Tokens after each block, protected ones included; never rising."""
    dropped_to: tuple[_Count, ...] | None = None
    """Tokens left in each block after dropping and before merging, for methods that do both."""
    thresholds: tuple[float, ...] | None = None
    """Similarity above which tokens merge in each block, for methods whose counts follow the input; `counts` is then
    what they were calibrated for."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("dropped_to", "thresholds"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.counts):
                raise ValueError(f"has {len(given)} {name} for {len(self.counts)} blocks")
        between = self.dropped_to or self.counts
        for block, (before, first, after) in enumerate(zip(self._before(), between, self.counts, strict=True)):
            if not before >= first >= after:
                raise ValueError(f"has rising counts in block {block}: {before}, {first}, {after}")
        if not self.counts or self.counts[-1] <= self.prefix:
            raise ValueError(f"leaves no token beside the {self.prefix} protected ones")
        return self

    @classmethod
    def dropping_and_merging(
        cls, allocator: str, tokens: int, prefix: int, dropped_to: Sequence[int], merged_to: Sequence[int]
    ) -> Plan:
        """A plan from the numbers that a block would drop and then merge to; where it has fewer tokens, all stay."""
        first, after, left = [], [], tokens
        for drop, merge in zip(dropped_to, merged_to, strict=True):
            first.append(min(left, drop))
            left = min(first[-1], merge)
            after.append(left)
        return cls(allocator=allocator, tokens=tokens, prefix=prefix, counts=tuple(after), dropped_to=tuple(first))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            InputError: when the file is missing or no plan.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(missing_file("plan", path))
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            message = f"{str(path)!r} is no plan: {where + ': ' if where else ''}{first['msg']}."
            raise InputError(Problem("plan", message, "Write one with Plan.save.")) from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), json.dumps(self.model_dump(mode="json", exclude_none=True)) + "\n")

    def counts_for(self, shape: Shape, halving: bool = False) -> list[int]:
        """Tokens after each block of a model.

        Args:
            shape: the model's.
            halving: whether a block can take out half of the unprotected tokens at most.

        Raises:
            InputError: when the plan was made for another shape, or takes out more than can go.
        """
        own = (self.tokens, len(self.counts), self.prefix)
        if own != (shape.tokens, shape.layers, shape.prefix):
            raise InputError(
                Problem(
                    "plan",
                    f"was made for {own[0]} tokens, {own[2]} of them protected, in {own[1]} blocks; here are "
                    f"{shape.tokens}, {shape.prefix} of them protected, in {shape.layers}.",
                    "Make a plan for this model and size of input.",
                )
            )
        for block, (before, after) in enumerate(zip(self._before(), self.counts, strict=True)):
            if halving and before - after > (before - self.prefix) // 2:
                raise InputError(
                    Problem(
                        "plan",
                        f"takes {before - after} of {before} tokens out of block {block}, where at most half of the "
                        f"unprotected ones can merge.",
                        "Spread them over more blocks.",
                    )
                )
        return list(self.counts)

    def _before(self) -> list[int]:
        return [self.tokens, *self.counts[:-1]]


def _read(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    try:
        return Plan.load(value)
    except InputError as error:
        problem = error.problems[0]
        raise ValueError(f"cannot be used: {problem.message} {problem.fix}".rstrip(" .")) from None


PlanFile = Annotated[Plan, BeforeValidator(_read, json_schema_input_type=str | Plan)]
"""The type of a `plan` field: a `Plan`, its content, or a path to its JSON."""

PLAN_RANGE: dict[str, Any] = {"range": "a path to a plan's JSON, or its content"}
"""What the catalog shows as the range of a `plan` field."""
