"""The verb: `reduce` a model."""

from __future__ import annotations

from torch import nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.encoders import find_encoder
from tokenwise.reduction.base import EncoderReducer, InputReducer, TokenReducer
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.inputs import InputReduction


def reduce(model: nn.Module, method: TokenReducer, *, masked: bool = False) -> Handle:
    """Compute on fewer tokens from now on, until the handle is undone or its ``with`` block left.

    Hooks on the model's instance; after undoing, outputs are the same to the bit as before. A full budget installs
    nothing.

    Args:
        model: for a method at the site ``encoder`` an image classifier, a vision tower or a text encoder; a
            vision-language model stands for its vision tower.
        method: the method.
        masked: compute on all tokens and hide those that would be gone: slow, and the reference for what the
            reduction itself changes.

    Returns:
        A handle with `stats`.

    Raises:
        InputError: when the model's layout is not known, lacks what the method reads or answers for each token,
            before anything is patched; in a pass, before its first block, when it asks for hidden states of differing
            lengths, checkpoints gradients, or is padded at the beginning.
    """
    if not isinstance(method, TokenReducer):
        raise InputError(Problem("method", f"{method!r} is no token reducer.", "See `tokenwise methods`."))
    if isinstance(method, InputReducer):
        return InputReduction(model, method, masked=masked)
    assert isinstance(method, EncoderReducer)
    return EncoderReduction(find_encoder(model), method, masked, model)
