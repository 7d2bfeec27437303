"""Write training data in which right and wrong worked solutions are mixed.

Usage: python examples/mixed_solutions/prepare.py FOLDER_WITH_SOLUTIONS FOLDER

Reads every ``*.jsonl`` of the first folder. A line is a word problem in one of two forms:

- ``{"question": ..., "answer": ...}``: one right solution, which ends with ``#### `` and the result, as in GSM8K;
- ``{"question": ..., "ground_truth": ..., NAME: {"solution": ..., "is_correct": true or false}, ...}``: the right
  solution, and attempts of models, each marked right or wrong. Solutions end with ``A: `` and the result.

Writes two files, the same on every run, split by problem: no problem is in both.

- train.jsonl: up to ATTEMPTS attempts at each problem, as they are. Their ``weight`` is 1 where the solution is marked
  right and WRONG_WEIGHT where it is marked wrong, for methods that read it (`loss_weights`);
- eval.jsonl: HELD_OUT problems with their right solutions, by which every method is judged.

Needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELD_OUT = 200
ATTEMPTS = 4
WRONG_WEIGHT = 0.1


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("Usage: python examples/mixed_solutions/prepare.py FOLDER_WITH_SOLUTIONS FOLDER")
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    problems = dict(read(source))
    if not problems:
        sys.exit(f"There is no problem with a right and an attempted solution in {source}/*.jsonl.")
    questions = sorted(problems, key=digest)  # an order that mixes the files and is the same everywhere
    held_out = questions[: min(HELD_OUT, len(questions) // 5)]
    rows = [row for question in questions[len(held_out) :] for row in problems[question]["attempts"]]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", rows)
    write(
        folder / "eval.jsonl", [{"question": question, "answer": problems[question]["right"]} for question in held_out]
    )
    wrong = sum(row["weight"] < 1 for row in rows)
    print(f"{len(rows)} solutions to train on, {wrong} of them marked wrong; {len(held_out)} problems held out.")


def read(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each question with its right solution and the solutions to train on."""
    for file in sorted(source.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            question = record["question"]
            if "answer" in record:
                attempts = [{"solution": record["answer"], "is_correct": True}]
                right = record["answer"]
            else:
                attempts = [value for value in record.values() if isinstance(value, dict)][:ATTEMPTS]
                right = record["ground_truth"]
            rows = [
                {
                    "question": question,
                    "answer": marked(attempt["solution"]),
                    "weight": 1.0 if attempt["is_correct"] else WRONG_WEIGHT,
                }
                for attempt in attempts
                if attempt["solution"].strip()
            ]
            yield question, {"right": marked(right), "attempts": rows}


def marked(solution: str) -> str:
    """The solution with its result behind ####, where it stands behind ``A:``."""
    steps, mark, result = solution.rpartition("\nA:")
    return f"{steps}\n#### {result.strip()}" if mark else solution


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
