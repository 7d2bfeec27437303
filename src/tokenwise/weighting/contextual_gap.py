"""Weights by how much a context helps: the same tokens scored with and without it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.method import Card, Paper
from tokenwise.models.attention import visible_positions
from tokenwise.models.head import last_hidden, output_head
from tokenwise.policies.weights import mean_one
from tokenwise.signals.head import token_statistics
from tokenwise.weighting.base import State, TokenBatch, TokenWeighter
from tokenwise.weighting.forward import sequence_ids


class ContextualGap(TokenWeighter):
    """Weigh each token by how much less it is predictable without a context: the prompt, what is far away, an image.

    The weight is the loss without the context minus the loss with it, between 0 and a ceiling, averaging to 1 in each
    sequence (uniform where the context helps nowhere). The losses without come from a second pass of the same model,
    or from the data.

    With both losses from the model in training, a token that it predicts badly with the context has a small gap too,
    and weighs little: the weights tell where the context is used, and do not teach its use from nothing.
    """

    card: ClassVar[Card] = Card(
        id="weighting/contextual_gap",
        paper=Paper(
            title="Towards Generalization of Block Attention via Automatic Segmentation and Block Distillation",
            arxiv="2605.15913",
        ),
        needs=("a second forward pass with eager or sdpa attention, or a column reference_nll",),
        status="RECONSTRUCTION",
        checked="the masks against the model run on the shortened text; the weight (clipped, mean 1) and its use on "
        "the cross-entropy are ours, the paper distils",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "reference_nll"})
    scope: ClassVar[str] = "sequence"

    without: Literal["prompt", "blocks", "column"] = "prompt"
    """What the second pass leaves out: the tokens without a label; everything before the token's own block; or no
    pass at all, the losses come as the data's column reference_nll (scored without an image or a retrieved text)."""
    block_size: int | None = Field(None, ge=1)
    """Tokens in a block, for `without` blocks."""
    ceiling: float = Field(5.0, gt=0)
    """Largest gap that counts, in nats."""

    @model_validator(mode="after")
    def _check_block_size(self) -> Self:
        if (self.without == "blocks") != (self.block_size is not None):
            raise ValueError("needs block_size exactly where without is 'blocks'")
        return self

    def has_reference(self) -> bool:
        return self.without != "column"

    def open_reference(
        self, model: PreTrainedModel, state: State | None, tokenizer: object = None
    ) -> LimitedContext | None:
        return None if self.without == "column" else LimitedContext(model, self.block_size)

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.nll is not None
        assert batch.reference_nll is not None
        gap = (batch.reference_nll - batch.nll).clamp(0, self.ceiling)
        return mean_one(gap, batch.sequence, batch.sequences)


class LimitedContext:
    """The model in training, seeing less: labels alone (and what stands right before them), or blocks alone.

    Positions stay as they are, so that nothing but the attention differs.

    Args:
        model: a causal language model with eager or sdpa attention.
        block_size: tokens that see each other, counted from the beginning of each sequence; None hides all tokens
            without a label, except the one from which the first label after them is predicted.

    Raises:
        InputError: when the model's attention takes no mask of its own.
    """

    def __init__(self, model: PreTrainedModel, block_size: int | None = None):
        self.model = model
        self.block_size = block_size
        implementation = model.config.get_text_config()._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise InputError(
                Problem(
                    "model",
                    f"its attention {implementation!r} takes no mask for each pair of tokens.",
                    "Load it with attn_implementation='sdpa', or use without='column'.",
                )
            )
        self._check_masks()

    @torch.no_grad()
    def nll(self, rows: Tensor, labels: Tensor, *args: Any, **inputs: Any) -> Tensor:
        """Negative log-likelihood of the labels at `rows` of the flattened batch, in nats: [tokens].

        Raises:
            InputError: when a sliding window is shorter than the batch.
        """
        given = inputs.get("inputs_embeds", inputs.get("input_ids", args[0] if args else None))
        assert given is not None
        shape = given.shape[:2]
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window is not None and window < shape[1]:
            raise InputError(
                Problem(
                    "model",
                    f"has a sliding window of {window} tokens, the batch {shape[1]}; its layers would need two masks.",
                    "Use shorter texts, or without='column'.",
                )
            )
        seen = self._seen(shape, rows, inputs.pop("attention_mask", None), inputs.get("position_ids"))
        hidden = last_hidden(self.model, *args, **inputs, attention_mask=self._mask(seen))
        head = output_head(self.model)
        return token_statistics(hidden.reshape(-1, hidden.shape[-1]), head, labels, rows=rows).nll

    def _seen(self, shape: torch.Size, rows: Tensor, valid: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Which keys each query sees, [batch, tokens, tokens], bool."""
        device = rows.device
        sequences = sequence_ids(torch.empty(shape, device=device), position_ids).clone()
        shown = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid.bool()
        if self.block_size is None:
            labelled = torch.zeros(shape, dtype=torch.bool, device=device).view(-1)
            labelled[rows] = True
            labelled[(rows + 1).clamp_max(labelled.shape[0] - 1)] = True
            shown = shown & labelled.view(shape)
        else:
            blocks = _places(sequences, shown) // self.block_size
            sequences = sequences * shape[1] + blocks
        everyone = torch.arange(shape[1], device=device)
        seen = torch.stack([visible_positions(everyone, sequences[index], shown[index]) for index in range(shape[0])])
        # A query that sees nothing has no softmax.
        return seen | torch.eye(shape[1], dtype=torch.bool, device=device)

    def _mask(self, seen: Tensor) -> Tensor:
        seen = seen.unsqueeze(1)
        if self.model.config.get_text_config()._attn_implementation == "sdpa":
            return seen
        smallest = torch.finfo(self.model.dtype).min
        return torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device).masked_fill_(~seen, smallest)

    @torch.no_grad()
    def _check_masks(self) -> None:
        ids = torch.arange(4, device=self.model.device).unsqueeze(0)
        was_training = self.model.training
        try:
            self.model.eval()
            plain = last_hidden(self.model, input_ids=ids)
            causal = self._mask(torch.ones(1, 4, 4, dtype=torch.bool, device=ids.device).tril())
            alone = self._mask(torch.eye(4, dtype=torch.bool, device=ids.device).unsqueeze(0))
            same = torch.allclose(plain, last_hidden(self.model, input_ids=ids, attention_mask=causal), atol=1e-2)
            other = last_hidden(self.model, input_ids=ids, attention_mask=alone)
            heeded = not torch.equal(plain[:, -1], other[:, -1])
        except (TypeError, ValueError, RuntimeError, IndexError):
            same = heeded = False
        finally:
            self.model.train(was_training)
        if not (same and heeded):
            raise InputError(
                Problem(
                    "model",
                    f"{type(self.model).__name__} does not take a mask for each pair of tokens.",
                    "Use without='column', with losses scored beforehand.",
                )
            )


def _places(sequences: Tensor, valid: Tensor) -> Tensor:
    """How many tokens of its own sequence stand before each one, padding not counted: [batch, tokens]."""
    before = valid.long().cumsum(1) - valid.long()
    starts = torch.nn.functional.pad(sequences.diff(dim=1) != 0, (1, 0), value=True)
    return before - (before * starts).cummax(1).values
