"""The tasks in which a trained model is run with fewer tokens: nothing is trained, methods are measured at budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

from tokenwise.comparison.images import Pictures, find_images, read_pictures
from tokenwise.comparison.questions import Questions, named_images, read_questions
from tokenwise.comparison.sections import Files, Real, Section, Whole, folder_of, shorten
from tokenwise.comparison.task import MeasuredTask, told
from tokenwise.errors import InputError, Problem
from tokenwise.files import write_binary
from tokenwise.method import Method
from tokenwise.models import load


@dataclass(frozen=True)
class TrainedModel:
    """The model that every method makes cheaper.

    Args:
        written: as the plan names it.
        directory: where it lies.
        config: its configuration.
    """

    written: str
    directory: Path
    config: Any


def trained(head: load.Head, value: Any, info: ValidationInfo) -> TrainedModel:
    """The field `model` of a task that trains nothing."""
    if not isinstance(value, str) or not value:
        fix = "Write a directory or a hub id; it is not trained here, so it must have been."
        raise InputError(Problem("", f"{shorten(value)} is not a model.", fix))
    directory = load.locate(value, folder_of(info), "")
    config = load.read_config(directory, "", head)
    load.check_weights(directory, "")
    return TrainedModel(value, directory, config)


def _images(value: Any, info: ValidationInfo) -> tuple[Path, ...]:
    return find_images(value, folder_of(info))


def _falling(amounts: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(amounts)) < len(amounts):
        raise ValueError("holds an amount more than once")
    return tuple(sorted(amounts, reverse=True))


class Shares(Section):
    """How much every method may keep."""

    unit: Literal["keep", "flops"]
    """What is shared: tokens (``keep``), or the operations of the blocks of the encoder, or of the
    language model's layers (``flops``)."""
    amounts: Annotated[
        tuple[Annotated[Real, Field(gt=0, lt=1)], ...], Field(min_length=1), AfterValidator(_falling)
    ]  # fmt: skip
    """The shares that each method is run at."""

    def keep(self, share: float) -> float | str:
        """What a method's `keep` is at a share."""
        return share if self.unit == "keep" else f"{share:g} flops"

    def named(self, share: float) -> str:
        """A share, in words."""
        return f"keep {share:g}" if self.unit == "keep" else f"{share:g} of the FLOPs"

    def short(self, share: float) -> str:
        """A share, as it stands behind a method's name."""
        return f"{share:g}"

    def __str__(self) -> str:
        from tokenwise.comparison.formatting import listing

        shares = listing([f"{share:g}" for share in self.amounts])
        return f"keep {shares}" if self.unit == "keep" else f"{shares} of the FLOPs"


class ImageData(Section):
    """Where the labelled images are."""

    eval: Annotated[tuple[Path, ...], PlainValidator(_images)]
    """A folder with one folder of images for each class, Parquet files, or a folder that `datasets` saved."""
    image_field: Annotated[str, Field(min_length=1)] = "image"
    """Name of the field or column with the image file's content."""
    label_field: Annotated[str, Field(min_length=1)] = "label"
    """Name of the field or column with the class: text or a whole number."""
    limit: Annotated[Whole, Field(ge=1)] | None = None
    """Measure on so many images at most, evenly spread over all of them."""


class QuestionData(Section):
    """Where the questions are."""

    eval: Files
    """JSON lines, each {"image": ..., "question": ..., "answer": ...}; paths of images start at the file's folder."""
    limit: Annotated[Whole, Field(ge=1)] | None = None
    """Measure on so many questions at most, drawn by chance, the same ones every time."""


class ReductionTask(MeasuredTask):
    """A trained model is run with fewer tokens."""

    family: ClassVar[str] = "reduction"
    baseline: ClassVar[str] = "dense"
    budgets: ClassVar[type[Section]] = Shares
    nothing_saved: ClassVar[str] = "reduction/dense"
    sites: ClassVar[frozenset[str]]
    """Where its methods may act."""

    def unfit(self, methods: Sequence[tuple[str, str, Method, float | None]]) -> list[Problem]:
        plans = self.plans({label: method for label, _, method, _ in methods})
        dense = {
            label: method.replace(keep=1.0)
            for label, _, method, amount in methods
            if amount is not None and "keep" in type(method).model_fields
        }
        whole = self.plans(dense)
        problems = {}
        for label, series, _, _ in methods:
            plan = plans[label]
            if isinstance(plan, InputError):
                problems[series] = told(label, plan)
            elif plan == whole.get(label) and min(plan) < max(plan):
                message = "leaves the same tokens at every budget: a field of its own says how many."
                problems[series] = [Problem(f"methods ({series})", message, "Leave that field out.")]
        return [problem for found in problems.values() for problem in found]

    @abstractmethod
    def plans(self, methods: Mapping[str, Method]) -> dict[str, list[int] | InputError]:
        """What each method would leave of the model's tokens in each block, or why it cannot."""

    @classmethod
    def check_method(cls, method: Method, where: str) -> None:
        from tokenwise.reduction.base import TokenReducer

        if not isinstance(method, TokenReducer):
            raise InputError(Problem(where, f"{method.card.id!r} is no token reduction; this task compares these."))
        if method.site not in cls.sites and method.card.id != "reduction/dense":
            name = cls.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
            message = f"{method.card.id!r} works at the site {method.site!r}; {name} compares those at "
            raise InputError(Problem(where, f"{message}{', '.join(sorted(cls.sites))}."))


class ImageClassification(ReductionTask):
    """Images are put into classes by a trained model."""

    runs_in: ClassVar[str] = "tokenwise.comparison.image_classification"
    head: ClassVar[load.Head] = "image"
    sites: ClassVar[frozenset[str]] = frozenset({"encoder"})

    kind: Literal["image_classification"]
    """The kind of task."""
    model: Annotated[TrainedModel, PlainValidator(partial(trained, "image"))]
    """A directory or a hub id of a trained image classifier."""
    data: ImageData
    """{eval: ...}."""
    batch_size: Annotated[Whole, Field(ge=1)] = 32
    """Images that go through the model at once."""

    @property
    def described(self) -> str:
        return f"image classification, {self.batch_size} images at once"

    def settings(self) -> dict[str, Any]:
        fields = {name: getattr(self.data, name) for name in ("image_field", "label_field", "limit")}
        return {**fields, "batch_size": self.batch_size}

    def prepare(self, path: Path) -> None:
        if path.is_file():
            return
        data = self.data
        classes = {int(number): str(name) for number, name in self.model.config.id2label.items()}
        found = read_pictures(data.eval, data.image_field, data.label_field, data.limit, classes, "task.data.eval")
        write_binary(path, found.save)

    def remark(self, path: Path) -> str:
        from tokenwise.models.images import ImageInputs

        found = Pictures.load(path)
        some = f" of {found.total:,}" if found.total > len(found) else ""
        return f" ({len(found):,}{some} images); {ImageInputs(self.model.directory, self.model.config).described}"

    def plans(self, methods: Mapping[str, Method]) -> dict[str, list[int] | InputError]:
        from tokenwise.models.encoders import find_encoder
        from tokenwise.models.images import ImageInputs, empty_classifier
        from tokenwise.reduction.encoder import EncoderReduction

        inputs = ImageInputs(self.model.directory, self.model.config, "task.model")
        from PIL import Image  # the line above says what to install where it is missing

        shape = inputs([Image.new("RGB", (64, 64))]).shape
        empty = empty_classifier(self.model.config)
        try:
            encoder = find_encoder(empty)
        except InputError as error:
            raise InputError(Problem("task.model", part.message, part.fix) for part in error.problems) from None
        tokens = _tokens(empty, encoder, shape)
        found: dict[str, list[int] | InputError] = {}
        for name, method in methods.items():
            try:
                reduction = EncoderReduction(encoder, method, model=empty)  # type: ignore[arg-type]
                with reduction:
                    found[name] = reduction.plan(tokens)
            except InputError as error:
                found[name] = error
        return found


class VisualQuestionAnswering(ReductionTask):
    """Questions about images are answered by a trained vision-language model."""

    runs_in: ClassVar[str] = "tokenwise.comparison.visual_question_answering"
    head: ClassVar[load.Head] = "vision_language"
    sites: ClassVar[frozenset[str]] = frozenset({"input", "decoder"})

    kind: Literal["visual_question_answering"]
    """The kind of task."""
    model: Annotated[TrainedModel, PlainValidator(partial(trained, "vision_language"))]
    """A directory or a hub id of a trained vision-language model with its processor."""
    data: QuestionData
    """{eval: ...}."""
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 32
    """Tokens that an answer may have."""

    @property
    def described(self) -> str:
        return f"visual question answering, answers of at most {self.max_new_tokens} tokens"

    def settings(self) -> dict[str, Any]:
        return {"limit": self.data.limit, "max_new_tokens": self.max_new_tokens}

    def sources(self) -> list[Path]:
        return [*self.data.eval, *named_images(self.data.eval, "task.data.eval")]

    def prepare(self, path: Path) -> None:
        if not path.is_file():
            write_binary(path, read_questions(self.data.eval, self.data.limit, "task.data.eval").save)

    def remark(self, path: Path) -> str:
        from tokenwise.models.questions import QuestionInputs

        found = Questions.load(path)
        some = f" of {found.total:,}" if found.total > len(found) else ""
        return f" ({len(found):,}{some} questions); {QuestionInputs(self.model.directory).described}"

    def plans(self, methods: Mapping[str, Method]) -> dict[str, list[int] | InputError]:
        from tokenwise.models.questions import QuestionInputs, empty_vision_language
        from tokenwise.models.vision_language import vision_language_model
        from tokenwise.reduction.apply import reduce
        from tokenwise.reduction.decoder import DecoderReduction

        inputs = QuestionInputs(self.model.directory, "task.model")
        from PIL import Image  # the line above says what to install where it is missing

        empty = empty_vision_language(self.model.config)
        batch = inputs(Image.new("RGB", (64, 64)), "What is this?")
        tokens = int(vision_language_model(empty).places(batch["input_ids"]).sum())
        found: dict[str, list[int] | InputError] = {}
        for name, method in methods.items():
            try:
                # At the input the number may follow the image, and is the same for all layers.
                found[name] = [tokens]
                if method.card.id != "reduction/dense":
                    with reduce(empty, method) as reduction:  # type: ignore[arg-type]
                        if isinstance(reduction, DecoderReduction):
                            found[name] = reduction.plan(tokens, batch["input_ids"].shape[1])
            except InputError as error:
                found[name] = error
        return found


def _tokens(empty: Any, encoder: Any, shape: Any) -> int:
    """How many tokens an image is."""
    import torch

    seen: list[int] = []

    def note(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append((args[0] if args else options["hidden_states"]).shape[1])

    hook = encoder.blocks[0].module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            empty(pixel_values=torch.empty(shape, device="meta"))
    finally:
        hook.remove()
    return seen[0]
