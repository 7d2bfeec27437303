"""The answer to TRL's call with ``fused_lm_head=True``: its own output class, carrying the method's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenwise.weighting.forward import Weighed


def fused_output(
    weighed: Weighed, targets: Tensor, scale: Tensor | float, last_column: bool, aux_loss: Tensor | None = None
) -> Any:
    """What TRL's `SFTTrainer` makes its loss and its metrics from.

    TRL's loss is minus the sum of `log_probs` over a count of its own. Each token's entry is minus its weighted loss;
    the gradient of the whole sum hangs on a single entry, so that it is passed on exactly and once.

    Args:
        weighed: the weighted sum of the micro-batch, with its statistics.
        targets: the labels where they are predicted, [batch, tokens].
        scale: factor on the weighted sum.
        last_column: whether the last column of `targets` is one that TRL has.
        aux_loss: the load-balancing loss of a mixture of experts.

    Returns:
        A FusedCausalLMOutput of [batch, tokens] or, without the last column, [batch, tokens - 1].
    """
    from trl.trainer.utils import FusedCausalLMOutput

    assert weighed.entropy is not None
    assert weighed.is_top1 is not None

    def placed(values: Tensor) -> Tensor:
        flat = torch.zeros(targets.numel(), dtype=values.dtype, device=values.device)
        whole = flat.index_copy_(0, weighed.rows, values).view(targets.shape)
        return whole if last_column else whole[:, :-1].contiguous()

    losses = placed(weighed.values * scale)
    one = torch.zeros_like(losses)
    one.view(-1)[:1] = 1
    total = weighed.total * scale
    # A label that the data gives no weight counts in TRL's metrics no more than one that is masked.
    mask = targets.ne(-100) if weighed.counted is None else placed(weighed.counted)
    return FusedCausalLMOutput(
        log_probs=one * (total.detach() - total) - losses,
        entropy=placed(weighed.entropy),
        is_top1=placed(weighed.is_top1),
        label_mask=mask if last_column or weighed.counted is not None else mask[:, :-1],
        aux_loss=aux_loss,
    )


def load_balancing_loss(model: PreTrainedModel, outputs: Any, inputs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of a mixture of experts; None unless router logits were asked for.

    Args:
        model: the model.
        outputs: what its backbone gave.
        inputs: the backbone's inputs.
    """
    if not inputs.get("output_router_logits"):
        return None
    # Every family of transformers takes this loss from Mixtral.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )
    return cast("Tensor", loss)
