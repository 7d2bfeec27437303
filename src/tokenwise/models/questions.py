"""Questions about an image as a vision-language model wants them, and such models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwise.errors import InputError, Problem
from tokenwise.models.images import require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image


class QuestionInputs:
    """Turns an image and a question into what a model reads: by its own processor, with its chat template where it
    has one; else with a placeholder for the image, and the question on a line of its own.

    Args:
        directory: of the model.
        field: the field to name in an error.

    Attributes:
        processor: the model's own.
        described: what is done, in words.

    Raises:
        InputError: when the processor is missing or cannot be used, or Pillow is not installed.
    """

    def __init__(self, directory: Path | str, field: str = "model"):
        require_pillow(field)
        from transformers import AutoProcessor

        files = ("processor_config.json", "preprocessor_config.json")
        if Path(directory).is_dir() and not any(Path(directory, name).is_file() for name in files):
            fix = "Save the processor beside the model: processor.save_pretrained(...)."
            raise InputError(Problem(field, f"{str(directory)!r} has no processor, which makes tokens of images.", fix))
        try:
            self.processor: Any = AutoProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
        except Exception as error:  # the processor classes raise errors of many kinds of their own
            message = f"its processor cannot be used: {' '.join(str(error).split()).rstrip('.')}."
            raise InputError(Problem(field, message, "Save the processor beside the model.")) from error
        if not (hasattr(self.processor, "tokenizer") and hasattr(self.processor, "image_processor")):
            message = f"its {type(self.processor).__name__} does not prepare images and text."
            raise InputError(Problem(field, message, "Save the processor beside the model."))
        self._templated = bool(getattr(self.processor, "chat_template", None))
        self.described = (
            "the question is written by the processor's chat template"
            if self._templated
            else "the processor has no chat template: the image, then the question on a line of its own"
        )

    def prompt(self, question: str) -> str:
        """The text with a placeholder for the image."""
        if self._templated:
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            written: str = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            return written
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}\n"

    def __call__(self, image: Image, question: str) -> Any:
        """The model's inputs for one question, as a batch of 1."""
        return self.processor(images=image.convert("RGB"), text=self.prompt(question), return_tensors="pt")

    def answer_ids(self, question: str, answer: str) -> list[int]:
        """Token ids of an answer where it follows the question; the end of the text is not among them."""
        tokenizer, prompt = self.processor.tokenizer, self.prompt(question)
        between = "" if prompt[-1:].isspace() else " "
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + between + answer)["input_ids"]
        if whole[: len(before)] == before:
            return list(whole[len(before) :])
        # Where the tokenizer joins the prompt's end with the answer, or ends every text with a token of its own.
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])

    def text(self, ids: Any) -> str:
        """What token ids say, special ones left out."""
        return str(self.processor.batch_decode([ids], skip_special_tokens=True)[0]).strip()


def load_vision_language(directory: Path | str) -> Any:
    """A vision-language model in evaluation mode, in the type it was saved in, on the CPU. Weights are read from
    safetensors alone."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(directory, use_safetensors=True, trust_remote_code=False)
    return model.eval()


def empty_vision_language(config: Any) -> Any:
    """The same model without weights: nothing is allocated."""
    import copy

    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    return model.eval()
