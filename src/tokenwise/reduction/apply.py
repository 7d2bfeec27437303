"""The verb: `reduce` a model."""

from __future__ import annotations

from torch import nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.decoders import find_decoder
from tokenwise.models.encoders import find_encoder
from tokenwise.reduction.base import DecoderReducer, EncoderReducer, InputReducer, TokenReducer
from tokenwise.reduction.decoder import DecoderReduction
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.inputs import InputReduction, Positions


def reduce(
    model: nn.Module, method: TokenReducer, *, masked: bool = False, positions: Positions = "original"
) -> Handle:
    """Compute on fewer tokens from now on, until the handle is undone or its ``with`` block left.

    Hooks on the model's instance; after undoing, outputs are the same to the bit as before. A full budget installs
    nothing.

    Args:
        model: for a method at the site ``encoder`` an image classifier, a vision tower or a text encoder; a
            vision-language model stands for its vision tower. At the site ``decoder`` a vision-language model, or a
            Llama-like model of text.
        method: the method.
        masked: compute on all tokens and hide those that would be gone: slow, and the reference for what the
            reduction itself changes.
        positions: for a method at the site ``input``: ``original`` leaves every token the position it had, ``compact``
            numbers the tokens that are left.

    A method for the input and one in the layers of the language model can be in effect together.

    Returns:
        A handle with `stats`.

    Raises:
        InputError: when the model's layout is not known, lacks what the method reads, answers for each token or is
            being reduced in a way that does not go together, before anything is patched; in a pass, before its first
            block, when it asks for hidden states of differing lengths, checkpoints gradients, or is padded at the
            beginning.
    """
    if not isinstance(method, TokenReducer):
        raise InputError(Problem("method", f"{method!r} is no token reducer.", "See `tokenwise methods`."))
    if not isinstance(model, nn.Module):
        raise InputError(Problem("model", f"{type(model).__name__} is no model.", "Give a torch.nn.Module."))
    if positions not in ("original", "compact"):
        raise InputError(Problem("positions", f"{positions!r} is unknown.", "Write 'original' or 'compact'."))
    if positions == "compact" and (masked or not isinstance(method, InputReducer)):
        what = "with masked=True all tokens stay" if masked else f"{type(method).__name__} is not for the input"
        fix = "Leave it out: tokens keep their positions."
        raise InputError(Problem("positions", f"'compact' numbers the tokens of a shorter prompt; {what}.", fix))
    if isinstance(method, InputReducer):
        return InputReduction(model, method, positions, masked=masked)
    if isinstance(method, DecoderReducer):
        return DecoderReduction(find_decoder(model), model, method, masked)
    assert isinstance(method, EncoderReducer)
    return EncoderReduction(find_encoder(model), method, masked, model)
