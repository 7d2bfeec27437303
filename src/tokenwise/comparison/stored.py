"""Token scores in the place of a reference model: whether they fit a plan, and what they cost."""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenwise import fingerprint
from tokenwise.errors import InputError, Problem
from tokenwise.method import Method
from tokenwise.scores.layout import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenwise.scores.rows import Source

_ROWS_AT_ONCE = 1000


def check_fits(scores: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None, where: str) -> None:
    """Check that the scores were made with this tokenizer, by a model with as many logits as the compared one.

    Args:
        scores: the folder.
        tokenizer: what the plan's data is tokenised with.
        vocabulary: logits of the compared model; None where it is made to fit the tokenizer.
        where: the field to name in an error.

    Raises:
        InputError: when they were not.
    """
    manifest = Manifest.read(scores, where)
    fix = "Token ids mean other text to them: score with a model that has the same tokenizer."
    ours = fingerprint.of_vocabulary(tokenizer)
    if manifest.tokenizer not in (None, ours):
        message = f"the scores in {str(scores)!r} were made with another tokenizer "
        message += f"(vocabulary {str(manifest.tokenizer)[:12]}, here {ours[:12]})."
        raise InputError(Problem(where, message, fix))
    if vocabulary is not None and manifest.vocabulary != vocabulary:
        message = f"the scores in {str(scores)!r} are of a model with {manifest.vocabulary} logits, "
        message += f"the compared one has {vocabulary}."
        raise InputError(Problem(where, message, fix))


def check_method(method: Method, scores: Path, where: str) -> None:
    """Check that the method can do with what the scores hold.

    Raises:
        InputError: when it needs the reference model itself.
    """
    from tokenwise.weighting.objective import Objective

    if isinstance(method, Objective):
        method.check_stored(Manifest.read(scores, where).columns, where)


def check_rows(scores: Path, rows: Iterable[NDArray[np.int32]], where: str, plan: Path) -> None:
    """Check that every row that is trained on has been scored.

    Args:
        scores: the folder.
        rows: token ids of each row, [tokens].
        where: the field to name in an error.
        plan: the plan's file, for the fix.

    Raises:
        InputError: with how many rows are missing, and the first of them.
    """
    from tokenwise.scores.store import ScoreStore

    store = ScoreStore(scores, where)
    count, missing, first = 0, 0, ""
    for row in rows:
        ids = row.tolist()
        if ids not in store:
            first = first or f"row {count}, {len(ids)} tokens: {' '.join(map(str, ids[:6]))}{' ...' * (len(ids) > 6)}"
            missing += 1
        count += 1
    if missing:
        message = f"{missing:,} of {count:,} rows of task.data.train are not in {str(scores)!r} (first {first})."
        command = shlex.join(["tokenwise", "score", "MODEL", str(plan), "--out", "DIR"])
        raise InputError(Problem(where, message, f"Score the rows as this plan trains on them: {command}"))


def charged(scores: Path) -> dict[str, Any]:
    """What making the scores cost, as the fields of `Costs`; what is not known, or was timed elsewhere, is None."""
    import torch

    from tokenwise.models.machine import speed_of

    manifest = Manifest.read(scores, "reference")
    here = speed_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    seconds = manifest.cost.seconds if manifest.cost.machine == here else None
    return {"flops": manifest.cost.flops, "wall_seconds": seconds, "tokens_seen": manifest.tokens, "tokens_trained": 0}


@contextmanager
def rows_of_plan(plan: Path, model: str | Path) -> Iterator[Source]:
    """What `tokenwise.scores.score` reads to score the rows that a plan trains on, as they are trained on.

    Args:
        plan: the plan's file; its references need not exist yet.
        model: what is to score them: a directory or a hub id.

    Raises:
        InputError: when the plan's task or data cannot be used, or the model has another vocabulary.
    """
    import pyarrow
    from pyarrow import parquet

    from tokenwise.comparison.plan import read_training_data
    from tokenwise.models.load import check_same_vocabulary, locate
    from tokenwise.scores.rows import open_source

    read = read_training_data(plan)
    with tempfile.TemporaryDirectory(prefix="tokenwise-") as folder:
        read.prepare(Path(folder))
        check_same_vocabulary(read.tokenizer(Path(folder)), locate(model, field="MODEL"), "MODEL")
        file = Path(folder) / "rows.parquet"
        schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32()))])
        with parquet.ParquetWriter(file, schema) as writer:
            rows = read.training_rows(Path(folder))
            while batch := [row.tolist() for row in itertools.islice(rows, _ROWS_AT_ONCE)]:
                writer.write_table(pyarrow.table({"input_ids": batch}, schema))
        yield replace(open_source(str(file), "input_ids"), names=[str(plan)])
