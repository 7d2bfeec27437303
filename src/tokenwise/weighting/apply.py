"""The verb: `weigh` a trainer or a model, or compute one weighted loss by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from tokenwise.errors import InputError, Problem, nearest
from tokenwise.models.head import base_of, check_head, last_hidden
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.base import Normalize, Run, State, TokenWeighter
from tokenwise.weighting.class_training import weigh_classes
from tokenwise.weighting.classification import ClassObjective
from tokenwise.weighting.columns import TrainingColumns
from tokenwise.weighting.forward import COLUMNS, WeightedForward, shifted
from tokenwise.weighting.objective import Objective, ObjectiveForward, ObjectiveWeighing, load_frozen
from tokenwise.weighting.objective_weights import Quantity, objective_weights
from tokenwise.weighting.sft_trainer import is_sft_trainer
from tokenwise.weighting.trainer import check_trainer, connect
from tokenwise.weighting.weighing import Weighing, check_not_weighed, replace_forward

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def weigh(
    target: Trainer | nn.Module,
    method: TokenWeighter | Objective | ClassObjective,
    *,
    seed: int = 0,
    low_memory: bool = False,
    normalize: Normalize = "none",
) -> Weighing:
    """Train with weighted tokens: from now on the model's loss while training is the method's.

    Patches `forward` on the model's instance (in evaluation mode it does what it always did), so that data
    parallelism and PEFT work as before; on a Trainer also the counting of labels, the correction of denominators that
    depend on the weights themselves, and the checkpoints (the method's state is saved and restored with them).

    Args:
        target: a transformers Trainer, TRL's SFTTrainer, or a causal language model for a loop of your own. In a
            loop with gradient accumulation pass ``num_items_in_batch`` to the model, and call
            `Weighing.correct_gradients`. For a `ClassObjective` the model is a classifier, and the handle a
            `ClassWeighing`.
        method: the method.
        seed: seed of the method's own draws; on a Trainer its `args.seed` is used.
        low_memory: use a third of the tile in which logits exist.
        normalize: ``none`` divides by the method's own denominator. ``mean`` divides by the sum of the weights of the
            optimizer step instead (of their absolute values, and where the method's reduction is ``sequence_mean``,
            each over its sequence's length first), so that the effective learning rate is that of uniform weights:
            what a method does is then not mixed up with what smaller steps do.

    Returns:
        A handle: `undo()` or leaving its ``with`` block puts everything back.

    Raises:
        InputError: when the model or the trainer's settings cannot work with it, before anything is patched.
    """
    if isinstance(method, ClassObjective):
        if normalize != "none":
            message = f"{normalize!r} does not fit {type(method).__name__}, which gives no weights to tokens."
            raise InputError(Problem("normalize", message, "Leave it out."))
        return weigh_classes(target, method, seed)
    if not isinstance(method, TokenWeighter | Objective):
        raise InputError(Problem("method", f"{method!r} is no weighting method.", "See `tokenwise methods`."))
    if normalize not in get_args(Normalize):
        raise InputError(
            Problem("normalize", f"{normalize!r} is not known.", nearest(str(normalize), get_args(Normalize)))
        )
    if isinstance(method, Objective) and normalize != "none":
        message = f"{normalize!r} does not fit {type(method).__name__}, whose terms have denominators of their own."
        raise InputError(Problem("normalize", message, "Leave it out."))
    if isinstance(target, Trainer):
        check_trainer(target, method, normalize)
        assert target.model is not None
        tokenizer = getattr(target, "processing_class", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = None
        columns = TrainingColumns(target, method)
        handle = _weigh_model(
            target.model,
            method,
            target.args.seed,
            target.args.process_index,
            low_memory,
            normalize,
            tokenizer,
            # SFTTrainer adds a router loss to ours itself.
            router_loss=is_sft_trainer(target),
        )
        connect(target, handle, columns)
        return handle
    return _weigh_model(target, method, seed, 0, low_memory, normalize)


def _weigh_model(
    target: nn.Module,
    method: TokenWeighter | Objective,
    seed: int,
    rank: int,
    low_memory: bool,
    normalize: Normalize,
    tokenizer: PreTrainedTokenizerBase | None = None,
    router_loss: bool = False,
) -> Weighing:
    model = base_of(target)
    check_model(model, router_loss)
    forward: WeightedForward | ObjectiveForward
    handle: Weighing
    if isinstance(method, Objective):
        forward = ObjectiveForward(model, method, load_frozen(target, model, method, tokenizer), low_memory)
        handle = ObjectiveWeighing(forward)
    else:
        state = method.start(Run(seed=seed, rank=rank, device=model.device, model=model))
        reference = method.open_reference(model, state, tokenizer)
        forward = WeightedForward(model, method, state, reference, low_memory, normalize)
        handle = Weighing(forward)
    forward.observe = handle.observe
    replace_forward(handle, forward, labels=("labels", "shift_labels"), columns=COLUMNS)
    return handle


def check_model(model: Any, router_loss: bool = False) -> None:
    """Refuse what the weighted loss does not know, before anything is patched.

    Args:
        model: the model.
        router_loss: whether the caller adds the router loss of a mixture of experts itself.

    Raises:
        InputError: naming what does not fit and the way out.
    """
    if isinstance(model, nn.DataParallel):
        message = "is wrapped in nn.DataParallel, whose copies would each weigh a part of the batch."
        raise InputError(Problem("model", message, "Start one process per GPU with torchrun, or weigh model.module."))
    if not isinstance(model, PreTrainedModel):
        raise InputError(Problem("model", f"{type(model).__name__} is no transformers model."))
    check_not_weighed(model)
    if model.config.is_encoder_decoder:
        raise InputError(
            Problem(
                "model", f"{type(model).__name__} is an encoder-decoder model.", "Weighting needs a decoder-only one."
            )
        )
    if not router_loss and getattr(model.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            Problem(
                "model.config.output_router_logits",
                "adds a router loss to the model's loss, which the weighted loss would drop.",
                "Set it to False.",
            )
        )
    check_head(model)


def weighted_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    method: TokenWeighter | Objective,
    *,
    state: State | None = None,
    low_memory: bool = False,
) -> Tensor:
    """The weighted loss of one batch, for hand-written loops: nothing is patched, nothing remembered.

    Divided by the denominator of this batch alone; a loop that accumulates gradients uses `weigh` and
    `Weighing.correct_gradients`.

    Args:
        model: a causal language model.
        batch: the model's inputs with ``labels`` [batch, tokens] (-100 where there is none), and the columns the
            method reads (``loss_weights``, ``reference_nll``), index t speaking of label t. A method with a reference
            model reads ``reference_nll`` here; `weigh` loads the reference itself, once.
        method: the method.
        state: what ``method.start(...)`` gave, for methods that keep a state.
        low_memory: use a third of the tile in which logits exist.

    Returns:
        A scalar with gradient; a differentiable zero when every label is -100.

    Raises:
        InputError: when labels or a column are missing.
    """
    if batch.get("labels") is None:
        raise InputError(
            Problem("batch.labels", "is missing.", "Give labels [batch, tokens], -100 where there is none.")
        )
    forward: WeightedForward | ObjectiveForward
    if isinstance(method, Objective):
        if method.needs_reference():
            raise InputError(
                Problem("method", f"{type(method).__name__} reads a reference model, which is not here.", "Use weigh.")
            )
        forward = ObjectiveForward(model, method, None, low_memory)
    else:
        # What needs no loading is here as it is under `weigh`.
        reference = None if getattr(method, "reference", None) else method.open_reference(model, state)
        forward = WeightedForward(model, method, state, reference, low_memory)
    loss = forward(**batch).loss
    assert loss is not None
    return loss


@dataclass
class TokenWeights:
    """What a method makes of one text.

    Args:
        weights: weight of each token; None for the first, which has no prediction, and those without a label. Before
            the division by tokens or sequences.
        nll: loss of each token in nats; None for these too, and where the method never computed it.
        prompt_attention: share of its attention that each token pays to unlabelled tokens before it; None for methods
            that do not read it.
        quantity: what `weights` are: of a `TokenWeighter` ``weight``; of an `Objective` ``factor``, by which it
            multiplies the gradient of the token's loss (below 0 the loss is raised), or where it does more than that
            ``gradient``, the norm of its gradient at the logits (below 0 the token's own logit falls).
    """

    weights: list[float | None]
    nll: list[float | None]
    prompt_attention: list[float | None] | None = None
    quantity: Quantity = "weight"


@torch.no_grad()
def token_weights(
    model: PreTrainedModel,
    method: TokenWeighter | Objective,
    input_ids: Tensor | list[int],
    seed: int = 0,
    labels: Tensor | list[int] | None = None,
    columns: Mapping[str, Tensor | Sequence[float]] | None = None,
) -> TokenWeights:
    """The weight that a method gives each token of a text, under the model as it is.

    Args:
        model: a causal language model.
        method: the method; its reference is loaded where it has one.
        input_ids: the text, [tokens] or [1, tokens], at least two tokens.
        seed: seed of the method's own draws.
        labels: shaped as `input_ids`, -100 where nothing is to be learnt; every token but the first unless given.
        columns: what the method reads of the data (``loss_weights`` and the like), shaped as `input_ids`, index t
            speaking of token t. Objectives that read ``forget`` need it: 1 where a token is to be forgotten, else 0.

    Raises:
        InputError: when the text is too short, a column is missing, or the model cannot be weighed.
    """
    ids = torch.as_tensor(input_ids, device=model.device).reshape(1, -1)
    if ids.shape[1] < 2:
        raise InputError(Problem("text", "has fewer than two tokens, so nothing is predicted.", "Give a longer text."))
    check_model(model)
    was_training = model.training
    model.eval()
    try:
        own = ids if labels is None else torch.as_tensor(labels, device=ids.device).view_as(ids)
        targets, inputs = shifted(own, IGNORED), {"input_ids": ids}
        given = {
            name: shifted(torch.as_tensor(values, device=ids.device).reshape(ids.shape), 0)
            for name, values in (columns or {}).items()
        }
        if isinstance(method, Objective):
            terms = ObjectiveForward(model, method, load_frozen(model, model, method))
            seen = objective_weights(terms, targets, given, inputs)
            weights, nll = _by_token(ids.shape[1], seen.rows, seen.weights, seen.nll)
            return TokenWeights(weights, nll, quantity=seen.quantity)
        state = method.start(Run(seed, device=model.device, model=model))
        forward = WeightedForward(model, method, state, method.open_reference(model, state))
        if "prompt_attention" in method.reads:
            outputs, attention = forward.run_with_prompt_attention(targets, own.eq(IGNORED), (), inputs)
            hidden, given["prompt_attention"] = outputs.last_hidden_state, attention
        else:
            hidden = last_hidden(model, **inputs)
        found = forward.weigh(hidden, targets, given, (), inputs)
    finally:
        model.train(was_training)
    weights, nll = _by_token(ids.shape[1], found.rows, found.weights, found.nll)
    if "prompt_attention" not in method.reads:
        return TokenWeights(weights, nll)
    (attended,) = _by_token(ids.shape[1], found.rows, given["prompt_attention"].reshape(-1)[found.rows])
    return TokenWeights(weights, nll, attended)


def _by_token(tokens: int, rows: Tensor, *values: Tensor) -> list[list[float | None]]:
    """What was found at the positions that predict, for each token; None for the others and for NaN."""
    spread = []
    for found in values:
        by_token: list[float | None] = [None] * tokens
        for row, value in zip(rows.tolist(), found.tolist(), strict=True):
            by_token[row + 1] = None if math.isnan(value) else value
        spread.append(by_token)
    return spread
