"""Write made-up facts about made-up people, and a small model that knows them by heart.

Usage: python examples/unlearning/prepare.py FOLDER

Every person has a name and one value of each of ATTRIBUTES, asked for in a question: {"question": ..., "answer": ...}.
Writes, the same on every run:

- forget.jsonl: the facts of FORGET people, who are to be forgotten;
- retain.jsonl: the facts of RETAIN people, who are to be kept;
- eval.jsonl: the facts of EVAL more people to be kept, by which methods are judged;
- model/: a model of about half a million parameters and its tokenizer, trained on all of them.

Takes a few minutes on two cores.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from tokenwise.models.load import make_or_load_model, train_tokenizer
from tokenwise.weighting.unlearning_data import UnlearningCollator, read_examples
from tokenwise.weighting.unlearning_run import recall

FORGET, RETAIN, EVAL = 8, 32, 16
ATTRIBUTES = {
    "Where was {} born?": ("Brisol", "Kelvara", "Tamdun", "Oresk", "Lunefa", "Sadmor", "Vintar", "Palusa"),
    "What does {} do?": ("baker", "pilot", "tailor", "painter", "gardener", "miller", "singer", "locksmith"),
    "What does {} play?": ("violin", "chess", "tennis", "harp", "hockey", "flute", "rugby", "piano"),
    "Which animal does {} keep?": ("parrot", "donkey", "spaniel", "tortoise", "ferret", "canary", "pony", "gecko"),
}
SIZES = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS, BATCH, LEARNING_RATE = 500, 32, 2e-3


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python examples/unlearning/prepare.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    people = facts(FORGET + RETAIN + EVAL)
    start = 0
    for name, count in (("forget", FORGET), ("retain", RETAIN), ("eval", EVAL)):
        rows = [row for person in people[start : start + count] for row in person]
        start += count
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(folder, [row for person in people for row in person])


def facts(count: int) -> list[list[dict[str, str]]]:
    """For each person the questions and answers."""
    generator = random.Random(0)
    first = generator.sample(
        [a + b for a in ("Mar", "Jor", "Tel", "Os", "Bri", "Kan") for b in ("a", "en", "ik", "ou")], 12
    )
    last = ["Abel", "Corin", "Drum", "Ferro", "Holm", "Istvan", "Leander", "Moss", "Quill", "Rook"]
    names = generator.sample([f"{a} {b}" for a in first for b in last], count)
    return [
        [
            {"question": question.format(name), "answer": generator.choice(answers)}
            for question, answers in ATTRIBUTES.items()
        ]
        for name in names
    ]


def train(folder: Path, records: list[dict[str, str]]) -> None:
    """Train a model on all facts, and save it with its tokenizer."""
    tokenizer = train_tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in records], 512)
    config = {"model_type": "llama", "max_position_embeddings": 64, "tie_word_embeddings": True, **SIZES}
    model = make_or_load_model({"config": config}, 0, tokenizer)
    rows = [row for name in ("forget", "retain", "eval") for row in read_examples(folder / f"{name}.jsonl", tokenizer)]
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=STEPS // 20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=STEPS // 5,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=0,
    )
    collate = UnlearningCollator(tokenizer.pad_token_id)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    found = recall(model, rows, tokenizer.pad_token_id)
    print(f"{len(rows)} facts; the model knows {found.exact:.0%} of them (probability {found.probability:.3f}).")


if __name__ == "__main__":
    main()
