"""What each token of a text stands for."""

from __future__ import annotations


def token_texts(text: str, offsets: list[tuple[int, int]], names: list[str]) -> list[str]:
    """The piece of the text that each token stands for; joined they give the text, special tokens apart.

    What lies between two tokens goes to the later one. A character that several tokens share goes to the first of
    them; the others show a dot. A special token shows its name.
    """
    pieces = []
    position = 0
    for (start, end), name in zip(offsets, names, strict=True):
        pieces.append(text[position:end] or (name if start == end else "·"))
        position = max(position, end)
    return pieces
