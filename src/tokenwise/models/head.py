"""How a causal language model is laid out around its head: backbone, output weight, logit scale and soft cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.signals.head import OutputHead

# What configurations call the factor on the logits; logits_scaling divides, except where a model says otherwise.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def base_of(model: nn.Module) -> Any:
    """The model under a PEFT or data-parallel wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a causal language model, its tensors as they are now (shared, not copied).

    Raises:
        InputError: when the model has no linear output head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = type(model).__name__
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        raise InputError(
            Problem("model", f"{name} has no linear output head.", "Give a causal language model (…ForCausalLM).")
        )
    if hasattr(head, "lora_A"):
        raise InputError(
            Problem("model", "the output head carries a LoRA adapter, which the weighted loss does not apply.",
                    "Leave lm_head out of target_modules.")
        )  # fmt: skip
    config = model.config.get_text_config()
    scale = next((value for key in _FACTORS if (value := getattr(config, key, None)) is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(head.weight, getattr(head, "bias", None), 1.0 if scale is None else float(scale), softcap)


def run_backbone(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
    """The output of the model without its head."""
    inputs["use_cache"] = False
    inputs["return_dict"] = True
    backbone = model.base_model
    return backbone(*args, **inputs)


def last_hidden(model: PreTrainedModel, *args: Any, **inputs: Any) -> Tensor:
    """The hidden states that the head reads, [batch, tokens, hidden]."""
    return run_backbone(model, *args, **inputs).last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Check on four tokens that backbone and head, put together by us, give the model's own logits.

    Raises:
        InputError: when they do not, so that a model with an unknown layout never trains on a wrong loss.
    """
    head = output_head(model)
    was_training = model.training
    device = head.weight.device
    ids = torch.arange(4, device=device).unsqueeze(0) % head.vocabulary
    try:
        model.eval()
        ours = head.logits(last_hidden(model, input_ids=ids).to(head.weight.dtype)).float()
        # The class's forward: one left on the instance (accelerate's autocast, say) says nothing of the layout.
        theirs = type(model).forward(model, input_ids=ids, use_cache=False).logits.float()
    except (TypeError, AttributeError, NotImplementedError) as error:
        raise _unknown_layout(model, f"running its backbone alone failed: {error}") from error
    finally:
        model.train(was_training)
    tolerance = 1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2
    gap = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    if not gap <= tolerance * max(theirs.abs().max().item(), 1.0):
        raise _unknown_layout(model, f"its logits differ from backbone and head put together by {gap:.3g}")


def _unknown_layout(model: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        Problem(
            "model",
            f"{type(model).__name__} does something between its backbone and its logits that tokenwise does not know "
            f"({reason}).",
            "Use a model whose logits are a linear head with an optional scale and soft cap, or extend "
            "tokenwise.models.head.output_head.",
        )
    )
