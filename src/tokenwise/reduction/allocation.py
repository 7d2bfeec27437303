"""Making plans: a budget spread over the blocks by a rule, by what attention looks like, or by search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.encoders import Encoder, find_encoder
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.policies.allocators import (
    at_most_half,
    counts_by_weight,
    counts_on_shifted_cosine,
    entropy_weights,
    linear_weights,
)
from tokenwise.policies.budget import parse_keep
from tokenwise.policies.plans import Shape, fit
from tokenwise.reduction.base import EncoderReducer
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.plan import Plan

Batches = Iterable[Mapping[str, Any]]
"""Batches as the model takes them: ``model(**batch)``."""


def shape_of(model: nn.Module, batch: Mapping[str, Any]) -> Shape:
    """The shape of a model's encoder on a batch, found by running its first block."""
    encoder = find_encoder(model)
    seen: list[int] = []

    def look(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append((args[0] if args else options["hidden_states"]).shape[1])
        raise _Enough

    handle = encoder.blocks[0].module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return encoder_shape(encoder, seen[0])


def encoder_shape(encoder: Encoder, tokens: int) -> Shape:
    """The shape of an encoder when `tokens` come in, protected ones included."""
    return Shape(tokens, len(encoder.blocks), encoder.prefix, encoder.width, encoder.hidden_width, encoder.gated)


class _Enough(Exception):
    """Ends a forward pass of which no more is needed."""


def allocate(
    shape: Shape,
    keep: float | str,
    rule: Literal["constant", "linear", "shifted_cosine"] = "constant",
    *,
    inflection: float = -1.0,
    halving: bool = False,
) -> Plan:
    """A plan by a rule that knows nothing of model or data.

    Args:
        shape: of the model, as `shape_of` gives it.
        keep: a share of the tokens that the feed-forward layers work on, averaged over the blocks; or ``"N tokens"``
            after the last block; or ``"X flops"``, a share of the dense encoder's.
        rule: ``constant`` takes as many out in each block; ``linear`` by a line (`inflection`); ``shifted_cosine``
            leaves the first blocks dense and goes down half a cosine wave to a share of 0.15 of the unprotected
            tokens, as p-MoD's schedule does (arXiv 2412.04449).
        inflection: of ``linear``, in [-1, 1]: -1 takes most out in the first blocks, 1 in the last.
        halving: whether a block can take out half of the unprotected tokens at most, as methods that merge pairs do.

    Raises:
        InputError: when the rule is not known.
    """
    if rule == "shifted_cosine":
        counts = _fit(lambda shift: counts_on_shifted_cosine(shape, shift - 1), keep, shape, halving, 2.0)
    elif rule in ("constant", "linear"):
        weights = linear_weights(shape.layers, inflection if rule == "linear" else 0.0)
        counts = _by_weight(weights, keep, shape, halving)
    else:
        raise InputError(Problem("rule", f"{rule!r} is not known.", "Known: constant, linear, shifted_cosine."))
    return Plan(allocator=rule, tokens=shape.tokens, prefix=shape.prefix, counts=tuple(counts))


def allocate_by_entropy(model: nn.Module, batches: Batches, keep: float | str, *, halving: bool = False) -> Plan:
    """A plan that takes more out of blocks whose attention is concentrated on few tokens.

    The weights of the blocks are FlowCut's (arXiv 2505.19536), which follows each image; here they are means over
    samples, and a plan for all.

    What is concentrated is the class token's row, or the mean over all queries where there is no class token; the
    entropies are means over the samples of the batches, which all have as many tokens.

    Args:
        model: with an encoder of a known layout; it is run densely, without gradients.
        batches: a few samples, as the model takes them.
        keep, halving: as for `allocate`.
    """
    encoder = find_encoder(model)
    layers = len(encoder.blocks)
    totals, samples = [0.0] * layers, 0
    prefix = encoder.prefix

    def reader(layer: int) -> Callable[[AttentionCall], None]:
        def read(call: AttentionCall) -> None:
            first = torch.zeros(1, dtype=torch.long, device=call.query.device)
            heads = call.rows(first)[:, :, 0] if encoder.has_class_token else call.columns()
            share = heads.mean(1)[:, prefix:].double()
            share = share / share.sum(1, keepdim=True)
            totals[layer] += float(-torch.special.xlogy(share, share).sum())

        return read

    batches, again = itertools.tee(batches)
    shape = shape_of(model, _first(again))
    stops = [listen(block.attention, reader(layer)) for layer, block in enumerate(encoder.blocks)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
                samples += len(next(value for value in batch.values() if isinstance(value, Tensor)))
    finally:
        for stop in stops:
            stop()
    weights = entropy_weights([total / samples for total in totals], shape.tokens - shape.prefix)
    counts = _by_weight(weights, keep, shape, halving)
    return Plan(allocator="entropy", tokens=shape.tokens, prefix=shape.prefix, counts=tuple(counts))


def allocate_by_search(
    model: nn.Module,
    method: EncoderReducer,
    batches: Sequence[Mapping[str, Any]],
    keep: float | str,
    *,
    rounds: int = 2,
) -> tuple[Plan, float]:
    """The plan at a budget whose final state is closest to the dense model's; needs no labels.

    The objective is that of VFlowOpt's calibration (arXiv 2508.05211), the search ours.
    One block after the other is tried at a quarter, half, twice and four times what it takes out, the budget kept by
    the others; what helps stays. The same model, method and batches give the same plan.

    Args:
        model: with an encoder of a known layout, in evaluation mode.
        method: what the plan is for; its other fields stay as they are.
        batches: a few samples, as the model takes them; all have as many tokens.
        keep: as for `allocate`.
        rounds: how often each block is visited, at most; a round without improvement is the last.

    Returns:
        The plan, and its distance: the mean over samples of the squared distance of the final states, as a share of
        the dense state's square. The final state is the class token's, or the mean of the tokens where there is none.
    """
    encoder = find_encoder(model)
    shape = shape_of(model, _first(batches))
    dense = [_final_state(model, encoder, batch, None) for batch in batches]

    def plan_of(weights: list[float]) -> Plan:
        counts = _by_weight(weights, keep, shape, method.halving)
        return Plan(allocator="search", tokens=shape.tokens, prefix=shape.prefix, counts=tuple(counts))

    measured: dict[tuple[int, ...], float] = {}

    def distance(plan: Plan) -> float:
        if plan.counts not in measured:
            parts = []
            for batch, goal in zip(batches, dense, strict=True):
                found = _final_state(model, encoder, batch, method.replace(plan=plan))
                parts.append((found - goal).square().sum(1) / goal.square().sum(1))
            measured[plan.counts] = float(torch.cat(parts).mean())
        return measured[plan.counts]

    weights = [1.0] * shape.layers
    best = distance(plan_of(weights))
    for _ in range(rounds):
        before = best
        for layer, factor in itertools.product(range(shape.layers), (0.25, 0.5, 2.0, 4.0)):
            trial = [*weights[:layer], weights[layer] * factor, *weights[layer + 1 :]]
            found = distance(plan_of(trial))
            if found < best:
                weights, best = trial, found
        if best == before:
            break
    return plan_of(weights), best


def _final_state(model: nn.Module, encoder: Encoder, batch: Mapping[str, Any], method: EncoderReducer | None) -> Tensor:
    """The state after the last block that stands for the whole input, [batch, channels], fp64."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append((hidden[:, 0] if encoder.has_class_token else hidden.mean(1)).double())

    reduction = None if method is None else EncoderReduction(encoder, method)
    # Registered after the reduction's own hook, so that it sees what that one leaves.
    handle = encoder.blocks[-1].module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        handle.remove()
        if reduction is not None:
            reduction.undo()
    return states[0]


def _by_weight(weights: Sequence[float], keep: float | str, shape: Shape, halving: bool) -> list[int]:
    return _fit(lambda rate: counts_by_weight(shape, rate, weights), keep, shape, halving, float(shape.tokens))


def _fit(
    counts: Callable[[float], list[int]], keep: float | str, shape: Shape, halving: bool, largest: float
) -> list[int]:
    def plan(rate: float) -> list[int]:
        return at_most_half(shape, counts(rate)) if halving else counts(rate)

    if not (isinstance(keep, str) and keep.endswith(" flops")):
        try:
            keep = parse_keep(keep)
        except ValueError as error:
            raise InputError(Problem("keep", f"{keep!r} {error}.")) from None
    return fit(plan, keep, shape, between=True, largest=largest)


def _first(batches: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    for batch in batches:
        return batch
    raise InputError(Problem("batches", "are empty.", "Give a few samples."))
