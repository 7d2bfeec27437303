"""FILA: start LoRA in the directions that matter to what is forgotten and not to what is kept (LoKU, ICLR 2025).

Checked against the official code (csm9493/efficient-llm-unlearning), run on a small model: importances, factors and
residual weights are its own. Two things differ on purpose: the residual is taken from the factors as they are stored,
so that their rounding does not change the model; and the gradients are taken in evaluation mode, without dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.batch_gradients import Batches, for_each_gradient

if TYPE_CHECKING:
    from peft import PeftModel

_SMALLEST_RETAIN = 1e-5
_SMALLEST_ROW = 1e-5


def row_importance(forget: Tensor, retain: Tensor) -> Tensor:
    """Importance of each output row: ``sqrt(sum_j forget_ij / (1e-5 + retain_ij))``, shape [rows].

    Args:
        forget: Fisher information of a weight on the data to forget, [rows, columns], at least 0.
        retain: the same on the data to keep.
    """
    return (forget / (_SMALLEST_RETAIN + retain)).sum(1).sqrt()


def weighted_factors(
    weight: Tensor, importance: Tensor, rank: int, scaling: float, iterations: int | None = 2
) -> tuple[Tensor, Tensor]:
    """The low-rank part of a weight that is closest where rows matter: minimises ``||diag(importance) (W - s B A)||``.

    Args:
        weight: [rows, columns], fp32.
        importance: [rows], at least 0.
        rank: of the factors, at most the smaller side.
        scaling: LoRA's s.
        iterations: of the randomised decomposition, which draws from torch's generator; None for the exact one.

    Returns:
        A [rank, columns] and B [rows, rank].
    """
    scaled = importance.unsqueeze(1) * weight
    if iterations is None:
        left, singular, right = torch.linalg.svd(scaled, full_matrices=False)
        left, singular, right = left[:, :rank], singular[:rank], right[:rank].T
    else:
        left, singular, right = torch.svd_lowrank(scaled, q=rank, niter=iterations)
    root = (singular / scaling).sqrt()
    return (right * root).T, (left * root) / (importance + _SMALLEST_ROW).unsqueeze(1)


def fisher_information(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Batches, field: str = "batches"
) -> dict[str, Tensor]:
    """Mean over batches, weighted by their labels, of the squared gradient of the batch's mean loss: fp32.

    The official code's estimate: gradients are squared after the mean over a batch, so it depends on the batch size.

    Args:
        model: a causal language model.
        parameters: those to measure, by any name; frozen ones too.
        batches: the model's inputs with ``labels``.
        field: what an error calls the batches.

    Raises:
        InputError: when there is no batch.
    """
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
    total = 0

    def counted() -> Iterator[Mapping[str, Any]]:
        nonlocal total
        for batch in batches:
            total += int(batch["labels"].ne(IGNORED).sum())
            yield batch

    def add(name: str, gradient: Tensor, batch: Mapping[str, Any]) -> None:
        sums[name].add_(gradient.float().square_() * batch["labels"].ne(IGNORED).sum())

    for_each_gradient(model, parameters, counted(), field, add)
    return {name: values.div_(max(total, 1)) for name, values in sums.items()}


def fila_initialize(
    model: PeftModel, forget: Batches, retain: Batches, *, iterations: int | None = 2, seed: int = 0
) -> None:
    """Set LoRA's factors, and the weights beneath them, to the part of the model that forgetting should change.

    A and B become the low-rank part of each target weight in the rows that matter to `forget` more than to `retain`,
    and the weight beneath becomes the rest, so that the model computes what it did. Takes two fp32 copies of the
    target weights meanwhile.

    The adapter alone, saved as usual, does not fit the original model any more. Either save the whole model
    (``model.merge_and_unload()``), or let PEFT turn it into a plain LoRA of twice the rank for the original weights::

        model.save_pretrained("initial")                   # right after this call
        ...                                                # training
        model.save_pretrained("adapter", path_initial_model_for_weight_conversion="initial")

    Args:
        model: with one fresh LoRA adapter on linear layers (B is zero, as `get_peft_model` leaves it).
        forget: batches of what is to be unlearnt, with ``labels``.
        retain: batches of what is to be kept.
        iterations: of the randomised decomposition, as the official code takes it; None for the exact one, which takes
            minutes for large matrices.
        seed: of the randomised decomposition; torch's own generator stays as it is.

    Raises:
        InputError: when the adapter is not a fresh plain LoRA on linear floating-point layers, or there is no batch.
    """
    layers = _layers(model)
    adapter = model.active_adapter
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    of_forget = fisher_information(model, weights, forget, "forget")
    of_retain = fisher_information(model, weights, retain, "retain")
    devices = {weight.device for weight in weights.values() if weight.device.type != "cpu"}
    with torch.no_grad(), torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]):
        torch.manual_seed(seed)
        for name, layer in layers.items():
            turned = layer.fan_in_fan_out
            weight, forgotten, kept = (
                values.T if turned else values for values in (weights[name], of_forget.pop(name), of_retain.pop(name))
            )
            scaling = layer.scaling[adapter]
            found = weighted_factors(
                weight.float(), row_importance(forgotten, kept), layer.r[adapter], scaling, iterations
            )
            for factor, values in zip((layer.lora_A, layer.lora_B), found, strict=True):
                factor[adapter].weight.copy_(values)
            stored = [factor[adapter].weight.float() for factor in (layer.lora_B, layer.lora_A)]
            weight.copy_(weight.float() - scaling * stored[0] @ stored[1])


def _layers(model: Any) -> dict[str, Any]:
    """The LoRA layers by name.

    Raises:
        InputError: with everything that is not as it must be.
    """
    if not hasattr(model, "peft_config"):
        raise InputError(Problem("model", f"{type(model).__name__} carries no adapter.", "Use peft.get_peft_model."))
    from peft.tuners.lora import Linear  # no requirement of tokenwise, but there where an adapter is

    if len(model.peft_config) != 1:
        message = f"carries {len(model.peft_config)} adapters, and the others would lose the weights beneath them."
        raise InputError(Problem("model", message, "Keep one."))
    adapter = model.active_adapter
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
    }
    problems = [] if layers else [Problem("model", "has no LoRA layer.", "Use a LoraConfig.")]
    for name, layer in layers.items():
        linear = isinstance(layer, Linear)
        if not linear or layer.get_base_layer().weight.dim() != 2:
            problems.append(
                Problem(name, f"is a {type(layer).__name__}, not linear.", "Take it out of target_modules.")
            )
        elif not layer.get_base_layer().weight.is_floating_point():
            problems.append(Problem(name, "is quantised.", "Load the model without quantisation."))
        elif layer.lora_variant or layer.merged:
            problems.append(Problem(name, "is no plain LoRA layer, or is merged.", "Use a plain LoraConfig."))
        elif layer.lora_B[adapter].weight.count_nonzero():
            problems.append(Problem(name, "has a factor B other than zero.", "Initialise a fresh adapter."))
        elif layer.r[adapter] > min(layer.get_base_layer().weight.shape):
            problems.append(Problem(name, f"has a rank of {layer.r[adapter]}, more than its smaller side."))
    if problems:
        raise InputError(problems)
    return layers
