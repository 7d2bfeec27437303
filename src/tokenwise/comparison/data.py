"""From documents to token ids: blocks to train on, and windows in which every held-out token is scored once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

_PIECE = 200_000
"""Characters: longer documents are tokenized in pieces, or one large file would cost a hundred times its size."""
_BATCH = 4_000_000
"""Characters tokenized at once."""


def joint_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens between two documents, the last of which the next document's first token is predicted from.

    EOS, then BOS where the tokenizer itself begins texts with it; BOS alone for a tokenizer without EOS; none for one
    without either.
    """
    begins = tokenizer("a")["input_ids"][:1]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [eos, bos] if begins == [bos] or eos is None else [eos]
    return [token for token in ids if token is not None]


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    """Token ids of each document in turn, without special tokens.

    Documents beyond 200,000 characters are tokenized in pieces that end at a line's end where there is one.
    """
    for _, pieces in itertools.groupby(_encoded_pieces(documents, tokenizer), key=itemgetter(0)):
        arrays = [ids for _, ids in pieces]
        yield arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _encoded_pieces(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    for batch in _batches((index, piece) for index, text in enumerate(documents) for piece in _pieces(text)):
        encoded = tokenizer(
            [piece for _, piece in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for (index, _), ids in zip(batch, encoded, strict=True):
            yield index, np.array(ids, dtype=np.int32)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        # Behind a line's end that no blank follows: tokenizers end a token there anyway.
        end = start + _PIECE
        while end > start + 1 and not (text[end - 1] == "\n" and not text[end].isspace()):
            end = text.rfind("\n", start, end - 1) + 1
        end = end if end > start + 1 else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _batches(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for index, piece in pieces:
        batch.append((index, piece))
        characters += len(piece)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def token_blocks(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    at_least: int = 1,
    field: str = "data.train",
) -> NDArray[np.int32]:
    """The documents in one row, joined as `joint_ids` says and cut into blocks; what is left over is dropped.

    Args:
        documents: texts.
        tokenizer: makes the token ids.
        sequence_length: tokens of a block.
        at_least: how many blocks there must be.
        field: the field to name in an error.

    Returns:
        Token ids, shape [blocks, sequence_length].

    Raises:
        InputError: when the documents are too short for `at_least` blocks.
    """
    joint = np.array(joint_ids(tokenizer), dtype=np.int32)
    parts = [joint[-1:]]
    for ids in encode(documents, tokenizer):
        parts += [ids, joint]
    stream = np.concatenate(parts)
    blocks = len(stream) // sequence_length
    if blocks < at_least:
        needed = at_least * sequence_length
        message = f"too short: {len(stream):,} tokens, and {needed:,} are needed"
        message += f" (a batch of {at_least} sequences of {sequence_length} tokens)."
        raise InputError(Problem(field, message, "Add text, or lower sequence_length or batch_size."))
    return stream[: blocks * sequence_length].reshape(blocks, sequence_length)


@dataclass(frozen=True)
class Windows:
    """Held-out documents cut into sequences, every token of a document predicted in exactly one of them.

    A document's windows overlap by one token, so that each begins with the token before the first one it scores.
    Documents with nothing to score are left out.

    Args:
        input_ids: token ids, padded on the right, shape [windows, sequence_length].
        labels: the same ids where they are scored, -100 elsewhere, shape [windows, sequence_length]. As the models of
            transformers want them: label t is predicted from the tokens before t, and column 0 is always -100.
        lengths: tokens of each window without padding, shape [windows].
        document: which document each window is of, in order, shape [windows].
        text_bytes: UTF-8 bytes of each document that its scored tokens cover, shape [documents].
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int32]
    document: NDArray[np.int32]
    text_bytes: NDArray[np.int64]

    def save(self, stream: IO[bytes]) -> None:
        """Write to an open file."""
        np.savez(stream, **vars(self))

    @classmethod
    def load(cls, path: Path | str) -> Windows:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def held_out_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    field: str = "data.eval",
) -> Windows:
    """Windows of at most `sequence_length` tokens in which to score the documents.

    The first token of a document is predicted from the token that also stands before it in training (see
    `joint_ids`); for a tokenizer without BOS and EOS it is not scored.

    Raises:
        InputError: when there is no token to score.
    """
    start = np.array(joint_ids(tokenizer)[-1:], dtype=np.int32)
    stride = sequence_length - 1
    windows: list[NDArray[np.int32]] = []
    document: list[int] = []
    covered: list[int] = []
    kept, encoded = itertools.tee(documents)
    for text, ids in zip(kept, encode(encoded, tokenizer), strict=True):
        row = np.concatenate([start, ids])
        if len(row) < 2:
            continue
        windows += [row[begin : begin + sequence_length] for begin in range(0, len(row) - 1, stride)]
        document += [len(covered)] * -(-(len(row) - 1) // stride)
        unscored = 0 if len(start) else len(str(tokenizer.decode(ids[:1])).encode())
        covered.append(len(text.encode()) - unscored)
    if not windows:
        raise InputError(Problem(field, "too short: there is no token to score.", "Add held-out text."))
    padding = tokenizer.pad_token_id or 0
    input_ids = np.full((len(windows), sequence_length), padding, dtype=np.int32)
    labels = np.full_like(input_ids, IGNORED)
    for index, window in enumerate(windows):
        input_ids[index, : len(window)] = window
        labels[index, 1 : len(window)] = window[1:]
    return Windows(
        input_ids,
        labels,
        np.array([len(window) for window in windows], dtype=np.int32),
        np.array(document, dtype=np.int32),
        np.array(covered, dtype=np.int64),
    )
