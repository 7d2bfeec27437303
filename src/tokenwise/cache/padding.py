"""Which tokens of a batch are padding, as an attention call tells it, and where the others stand.

Later turns of a conversation are padded, too, so that padding stands between the tokens of a row. For the row to be as
it is alone, its tokens have the places that they would have if all of its padding stood in front.

What is known of the padding are notes of a layer: ``pads``, how many columns of each row are padding, [batch], int64;
``shown``, until what is padding has been evicted, which are none, [batch, columns], bool; ``places``, where some
stands between tokens, the place of each column, [batch, columns], int64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import AttentionCall


def seen_columns(call: AttentionCall, ends: bool = True) -> Tensor | None:
    """The columns that the last query of each row sees, [batch, columns], bool; None where no mask hides any.

    Args:
        call: the attention of a prompt, or of a part of one.
        ends: whether the prompt ends with it; else the padding in front of a row may go on in the next part.

    Raises:
        InputError: when rows are padded behind their tokens, or so that no mask tells which.
    """
    if call.padding is not None and not bool(call.padding.all()):
        raise InputError(
            Problem(
                "model",
                f"{type(call.module).__name__} is given padding in a form that does not say which tokens each query "
                "sees.",
                "Load the model with attn_implementation='sdpa', or read one row at a time.",
            )
        )
    if call.mask is None:
        return None
    last = call.mask[:, 0, -1]
    last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    if ends:
        refuse_padded_ends(last)
    return last.expand(call.query.shape[0], -1)


def refuse_padded_ends(shown: Tensor) -> None:
    """Raise InputError where the last of the columns seen, [batch, columns], is padding behind tokens."""
    if bool((~shown[:, -1] & shown.any(1)).any()):
        raise InputError(
            Problem("attention_mask", "hides the last token of a row.", "Pad on the left: padding_side = 'left'.")
        )


def note_padding(notes: dict[str, Tensor], call: AttentionCall, seen: int, ends: bool) -> None:
    """Note which of the columns seen are padding.

    Args:
        notes: of the layer.
        call: the attention of a prompt, or of a part of one.
        seen: columns so far.
        ends: whether the prompt ends with it.
    """
    last = seen_columns(call, ends)
    notes.pop("places", None)
    if last is None:
        notes["pads"] = torch.zeros(call.query.shape[0], dtype=torch.long, device=call.query.device)
        return
    notes["pads"] = seen - last.sum(1)
    if not bool(last.all()):
        notes["shown"] = last
        if not torch.equal(last, torch.arange(seen, device=last.device) >= notes["pads"].unsqueeze(1)):
            # No token stands at the first place of a row that is padded.
            notes["places"] = (seen - last.flip(1).cumsum(1).flip(1)).masked_fill(~last, 0)


def take_padding(notes: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Take over what another layer has noted, which has seen less."""
    device = notes["pads"].device
    notes.pop("places", None)
    notes.update({name: others[name].to(device) for name in ("pads", "places") if name in others})


def in_front(notes: dict[str, Tensor], columns: Tensor, seen: int) -> Tensor:
    """The places of columns, if all padding stood in front.

    Args:
        notes: of the layer.
        columns: [batch, heads, any], int64; returned as they are where no padding stands between tokens.
        seen: how many there are.
    """
    places = _places(notes, seen)
    return columns if places is None else places.unsqueeze(1).expand(-1, columns.shape[1], -1).gather(2, columns)


def at_places(notes: dict[str, Tensor], values: Tensor) -> Tensor:
    """What is known of each column, [batch, columns], bool, by its place; of padding nothing."""
    places = _places(notes, values.shape[1])
    if places is not None:
        values = torch.zeros_like(values).scatter_(1, places, values)
    return values & (torch.arange(values.shape[1], device=values.device) >= notes["pads"].unsqueeze(1))


def given_places(notes: dict[str, Tensor], seen: int) -> Tensor | None:
    """Which places the user protects, [batch, seen], bool; None where none is given."""
    given = notes.get("given")
    return None if given is None else at_places(notes, pad(given, (0, seen - given.shape[1])))


def asking(notes: dict[str, Tensor], seen: int, tokens: int) -> Tensor | None:
    """Which of the last tokens seen are no padding, [batch, tokens], bool; None where all are known to be none."""
    shown = notes.get("shown")
    return None if shown is None else pad(shown, (0, seen - shown.shape[1]), value=True)[:, -tokens:]


def note_queries(notes: dict[str, Tensor], queries: Tensor, window: int, seen: int, follows: bool) -> None:
    """Note the last queries of each row, those of padding in front.

    Args:
        notes: of the layer. ``queries`` are set, [batch, heads, window or fewer, head_dim], and ``asked``, which of
            them are no padding, [batch, window or fewer], bool, where any is.
        queries: [batch, heads, tokens, head_dim].
        window: how many are to be noted.
        seen: columns so far.
        follows: whether these are the next after those that are noted.
    """
    batch, tokens = queries.shape[0], queries.shape[2]
    real, before = asking(notes, seen, tokens), notes.pop("queries", None)
    asked = notes.pop("asked", None)
    if before is None or not follows:
        before, asked = queries[:, :, :0], None
    if real is None and asked is None:
        recent = queries[:, :, -window:]
        joined = torch.cat([before, recent], 2)[:, :, -window:] if tokens < window else recent
        # Not to hold on to all of them.
        notes["queries"] = joined.clone() if tokens > window else joined
        return
    parts = [
        torch.ones(batch, each.shape[2], dtype=torch.bool, device=queries.device) if known is None else known
        for each, known in ((before, asked), (queries, real))
    ]
    asked = torch.cat(parts, 1)
    order = asked.long().argsort(dim=1, stable=True)[:, -window:]
    earlier = before.shape[2]
    found = _taken(queries, (order - earlier).clamp_min(0))
    if earlier:
        found = torch.where((order < earlier)[:, None, :, None], _taken(before, order.clamp_max(earlier - 1)), found)
    notes["queries"], asked = found, asked.gather(1, order)
    if real is None or not bool(asked.all()):
        notes["asked"] = asked


def _taken(queries: Tensor, index: Tensor) -> Tensor:
    """Of `queries` ([batch, heads, tokens, head_dim]) those at `index` ([batch, taken])."""
    return queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))


def _places(notes: dict[str, Tensor], seen: int) -> Tensor | None:
    """The place of each column, [batch, seen], or None where no padding stands between tokens."""
    places = notes.get("places")
    if places is None:
        return None
    batch, noted = places.shape
    following = torch.arange(noted, seen, device=places.device).expand(batch, -1)
    return torch.cat([places, following], 1)[:, :seen]
