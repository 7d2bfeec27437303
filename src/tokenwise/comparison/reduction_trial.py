"""One method on a few images: what a model answers with all tokens and with fewer, how fast, and what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import torch
from PIL import Image

from tokenwise.comparison.clock import now
from tokenwise.comparison.formatting import duration, plain, ratio
from tokenwise.comparison.pictures import draw, encode, picture_of, selected, selection_of
from tokenwise.errors import InputError, Problem
from tokenwise.files import write_binary, write_text
from tokenwise.method import Method
from tokenwise.models import load
from tokenwise.models.images import ImageInputs, load_classifier
from tokenwise.models.questions import QuestionInputs, load_vision_language
from tokenwise.reduction.apply import reduce
from tokenwise.reduction.base import EncoderReducer, TokenReducer
from tokenwise.reduction.decoder import DecoderReduction
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.inputs import InputReduction

REPEATS = 5
"""How often each of the two is timed, in turn, after one pass to warm up."""
CLASSES = 3
"""How many of the likeliest classes are said."""


@dataclass(frozen=True)
class Trial:
    """One image.

    Args:
        image: its file.
        answers: with all tokens, and with fewer.
        tokens: before and after.
        seconds: with all tokens, and with fewer.
        picture: what was kept, as `draw` takes it; None where tokens are not a plain grid.
        inside: where tokens go between the layers of a decoder: a name, before and after; else nothing.
    """

    image: Path
    answers: tuple[str, str]
    tokens: tuple[int, int]
    seconds: tuple[float, float]
    picture: dict[str, Any] | None
    inside: tuple[tuple[str, str, str], ...] = ()

    def lines(self) -> list[tuple[str, str, str]]:
        """What is shown: a name, before and after."""
        before, after = self.tokens
        name = "image tokens, last layer" if self.inside else "image tokens"
        return [
            ("answer", *self.answers),
            (name, str(before), f"{after} ({_percent(after / before)})"),
            *self.inside,
            (
                "time",
                duration(self.seconds[0]),
                f"{duration(self.seconds[1])} ({ratio(self.seconds[1] / self.seconds[0])})",
            ),
        ]


@dataclass(frozen=True)
class Trials:
    """All images.

    Args:
        method: what was tried, in words.
        question: what was asked; None of a classifier.
        remarks: what a reader should know.
        trials: one for each image.
    """

    method: str
    question: str | None
    remarks: list[str]
    trials: list[Trial]


def try_out(
    model: str, method: Method, images: Sequence[Path], question: str | None = None, max_new_tokens: int = 40
) -> Trials:
    """Show images to a model with all tokens and with fewer.

    Args:
        model: directory or hub id of an image classifier, or of a vision-language model with its processor.
        method: a reduction.
        images: image files.
        question: what to ask a vision-language model.
        max_new_tokens: of an answer.

    Raises:
        InputError: when the model is neither, the method does not fit it, or an image cannot be read.
    """
    if not isinstance(method, TokenReducer):
        raise InputError(Problem("--method", f"{method.card.id!r} is no token reduction.", "See tokenwise methods."))
    opened = [_open(path) for path in images]
    directory = load.locate(model, field="MODEL")
    load.check_weights(directory, "MODEL")
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SPEAKING

    kind = _model_type(directory)
    if kind in SPEAKING:
        if question is None:
            fix = "Add --question 'What is in the picture?'."
            raise InputError(Problem("--question", "is missing: a vision-language model answers questions.", fix))
        found = _ask(directory, method, images, opened, question, max_new_tokens)
    else:
        if question is not None:
            raise InputError(Problem("--question", f"a {kind} model answers no questions about images."))
        found = _classify(directory, method, images, opened)
    described = ", ".join(f"{name} {value}" for name, value in method.config().items() if value is not None)
    return Trials(f"{method.card.name} ({described})", question, *found)


def _open(path: Path) -> Any:
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise InputError(Problem("IMAGE", f"{str(path)!r} cannot be decoded as an image ({error}).")) from None
    return image.convert("RGB")


def _model_type(directory: Path) -> str:
    import json

    file = directory / "config.json"
    if not file.is_file():
        raise InputError(Problem("MODEL", f"{str(directory)!r} has no config.json."))
    return str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))


def _classify(
    directory: Path, method: TokenReducer, paths: Sequence[Path], images: list[Any]
) -> tuple[list[str], list[Trial]]:
    config = load.read_config(directory, "MODEL", "image")
    if not isinstance(method, EncoderReducer):
        message = f"{method.card.id!r} works at the site {method.site!r}, and the model is an encoder alone."
        raise InputError(Problem("--method", message, "Use one for encoders, such as tome or evit."))
    inputs = ImageInputs(directory, config, "MODEL")
    model = load_classifier(directory).to(_device())
    trials = []
    for path, image in zip(paths, images, strict=True):
        pixels = inputs([image]).to(model.device)

        def classify(pixels: Any = pixels) -> Any:
            return model(pixel_values=pixels).logits[0].float().softmax(-1)

        answers, seconds, handle = _both(model, method, classify, REPEATS)
        assert isinstance(handle, EncoderReduction)
        prefix, picture = handle.encoder.prefix, picture_of(handle, model, inputs, pixels, 0)
        tokens = (int(handle.stats["tokens_before"]) - prefix, int(handle.stats["tokens_after"]) - prefix)
        before, after = (_classes(answer, dict(config.id2label or {})) for answer in answers)
        trials.append(Trial(path, (before, after), tokens, seconds, picture))
    remarks = [
        f"{inputs.described[:1].upper()}{inputs.described[1:]}.",
        "Tokens are those after the last block; a keep that is a share is an average over the blocks.",
    ]
    return remarks, trials


def _classes(shares: Any, names: dict[Any, str]) -> str:
    top = shares.topk(min(CLASSES, len(shares)))
    pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return ", ".join(f"{names[index]} {plain(100 * share, 0)}%" for share, index in pairs)


def _ask(
    directory: Path,
    method: TokenReducer,
    paths: Sequence[Path],
    images: list[Any],
    question: str,
    max_new_tokens: int,
) -> tuple[list[str], list[Trial]]:
    if method.site == "encoder":
        message = f"{method.card.id!r} works at the site {method.site!r}, and the language model needs every patch."
        fix = "Use one for its input or its layers, such as faster_vlm or fast_v."
        raise InputError(Problem("--method", message, fix))
    inputs = QuestionInputs(directory, "MODEL")
    model = load_vision_language(directory).to(_device())
    trials = []
    for path, image in zip(paths, images, strict=True):
        batch = inputs(image, question).to(model.device)
        length = batch["input_ids"].shape[1]

        def generate(batch: Any = batch, length: int = length) -> str:
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            return inputs.text(ids[0, length:])

        answers, seconds, handle = _both(model, method, generate, 1)
        inside = _inside(handle) if isinstance(handle, DecoderReduction) else ()
        if isinstance(handle, DecoderReduction):
            before, after = int(handle.stats["candidates"]), int(handle.stats["candidates_after"])
        else:
            assert isinstance(handle, InputReduction)
            before, after = (
                int(handle.stats[f"image_tokens_{name}"] // handle.stats["batches"]) for name in ("before", "after")
            )
        pixels, picture = batch["pixel_values"], None
        if pixels.dim() == 4 and pixels.shape[0] == 1:
            group = handle.group[0] if isinstance(handle, InputReduction) else selected(handle.kept[0], before)
            picture = selection_of(group, model, pixels, image)
        trials.append(Trial(path, answers, (before, after), seconds, picture, inside))
    remarks = [
        f"{inputs.described[:1].upper()}{inputs.described[1:]}.",
        "Time is that of the whole answer: a longer one takes longer.",
    ]
    if method.site == "decoder":
        remarks.append("A picture shows what the last layer still worked on; the layers before it saw more.")
    return remarks, trials


def _inside(handle: DecoderReduction) -> tuple[tuple[str, str, str], ...]:
    """What became of the tokens between the layers of a language model."""
    assert handle.last is not None
    stats, layers = handle.stats, len(handle.last.layers)
    whole = int(stats["candidates"]) * layers
    left = round(whole * stats["mean_share"])
    runs = [(count, len(list(run))) for count, run in groupby(int(layer.sum()) for layer in handle.last.layers)]
    stored = ", ".join(f"{count} × {times}" for count, times in runs)
    return (
        ("image tokens × layers", str(whole), f"{left} ({_percent(stats['mean_share'])})"),
        ("cached tokens × layers", f"{int(stats['cached_before'])} × {layers}", stored),
        ("layers' arithmetic", "100%", _percent(stats["macs_share"])),
    )


def _percent(share: float) -> str:
    return f"{plain(100 * share, 0)}%"


def _both(
    model: Any, method: TokenReducer, answer: Callable[[], Any], repeats: int
) -> tuple[tuple[Any, Any], tuple[float, float], Any]:
    """The answers with all tokens and with fewer, the median time of each, and the reduction after its last pass."""
    times: dict[bool, list[float]] = {False: [], True: []}
    answers: dict[bool, Any] = {}
    handle = None
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for reduced in (False, True):
                with reduce(model, method) if reduced else nullcontext() as made:
                    start = now(model.device)
                    answers[reduced] = answer()
                    seconds = now(model.device) - start
                handle = made if reduced else handle
                if repeat:
                    times[reduced].append(seconds)
    return (answers[False], answers[True]), (median(times[False]), median(times[True])), handle


def _device() -> Any:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def write_picture(trial: Trial, path: Path) -> None:
    """Draw what was kept, as PNG."""
    assert trial.picture is not None
    drawn = draw(trial.picture)
    write_binary(path, lambda stream: drawn.save(stream, format="PNG"))


def write_page(trials: Trials, path: Path) -> None:
    """All answers and drawings as one HTML file that needs nothing else."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    shown = [
        {
            "trial": trial,
            "drawn": None if trial.picture is None else encode(draw(trial.picture)),
            "seen": None if trial.picture is None else trial.picture["image"],
        }
        for trial in trials.trials
    ]
    write_text(path, environment.get_template("reduction_trial.html").render(found=trials, shown=shown))
