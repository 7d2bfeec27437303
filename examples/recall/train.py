"""Train a small language model to recall what a context says.

Usage: python examples/recall/train.py FOLDER [--seed N]

A context holds PAIRS names, each followed by what belongs to it, a colour and an animal ("anna red fox"), and filler
words between them. A question names one of them ("ask anna"), and the answer is the two words that followed it. So two
tokens of a context, of which a quarter could be asked for, are enough for each question, but which ones only the
question says: what a method can know without it is which words are no filler.

Writes, the same on every run on the same machine:

- model/: a Llama of 173,000 parameters with its tokenizer, trained from scratch;
- recall.jsonl: EVAL contexts never trained on, each with one question: {"context": ..., "question": ...,
  "answer": ..., "depth": where the asked one stands, from 0, the beginning, to 1};
- text.jsonl: half as many contexts, cut before all that belongs to the names that are asked for one after the other:
  {"context": ..., "target": ...}.

Each seed has weights, training contexts and held-out contexts of its own. Takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES, COLOURS, ANIMALS, FILLER = (
    line.split()
    for line in (
        "anna ben clara david ella finn greta hugo ida jonas karl lena mia nils olga paul quinn rosa sam tina uwe vera "
        "willi xenia yara zoe adam berta carl dora emil frida",
        "red green blue yellow black white brown grey pink purple orange golden silver beige teal violet crimson amber "
        "ivory olive navy coral ruby indigo",
        "fox cat dog owl bear wolf hare deer goat frog swan crow duck mole seal lynx toad hawk ant bee crab dove eel "
        "gull",
        "then and so while there once more again later now still yet also here soon often maybe thus but when",
    )
)
SPECIAL = ("<pad>", "</s>", "<unk>")
ASK = "ask"
PAIRS, LENGTH = 12, 160
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LEVELS = ((4, 20), (8, 48), (12, 80), (12, 120), (PAIRS, LENGTH))
"""How many names, in how many words at most."""
LEARNT = 0.1
"""The loss at which the next level begins."""
PATIENCE = 1200
"""Steps in which the first level must be learnt; 300 to 700 are enough where it is learnt at all."""
MOST_STEPS, LAST_STEPS, BATCH, LEARNING_RATE = 12000, 600, 32, 3e-3
NOISE = 0.03
"""Standard deviation of the noise on the first weights of the queries; their own is 0.125."""
EVAL = 400

Context = tuple[list[str], list[tuple[str, str, str]], list[int]]


def draw(generator: np.random.Generator, pairs: int, length: int) -> Context:
    """A context by chance: its words, what it tells, and the place of each name."""
    told = list(zip(*(generator.permutation(words)[:pairs] for words in (NAMES, COLOURS, ANIMALS)), strict=True))
    filler = length - 3 * pairs
    # So many filler words in front of each; the rest at the end.
    gaps = np.sort(generator.integers(0, filler + 1, pairs))
    others = generator.choice(FILLER, filler).tolist()
    words: list[str] = []
    places, used = [], 0
    for gap, told_of in zip(gaps.tolist(), told, strict=True):
        words += others[used:gap]
        used = gap
        places.append(len(words))
        words += told_of
    return words + others[used:], told, places


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, ASK, *NAMES, *COLOURS, *ANIMALS, *FILLER])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        **SIZES,
    )
    model = LlamaForCausalLM(config)
    heads, groups = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    for layer in model.model.layers:
        # Heads that begin by looking for what equals the query, and by copying it, learn to recall much sooner. Without
        # noise those that share a key would begin alike, and stay so.
        attention = layer.self_attn
        keys, values = (nn.init.orthogonal_(part.weight.data) for part in (attention.k_proj, attention.v_proj))
        queries = keys.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1)
        attention.q_proj.weight.data = queries + NOISE * torch.randn_like(queries)
        copied = values.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0).flatten(0, 1).T
        attention.o_proj.weight.data = (copied * groups / heads).contiguous()
    return model


def train(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model that has learned to recall; weights that do not begin to are drawn anew."""
    torch.manual_seed(seed)
    generator = np.random.default_rng([seed, 0])
    while (model := train_once(tokenizer, generator)) is None:
        print(f"not learned in {PATIENCE} steps: again with other weights", flush=True)
    return model


def train_once(tokenizer: PreTrainedTokenizerFast, generator: np.random.Generator) -> LlamaForCausalLM | None:
    """A model trained on contexts drawn as they are needed, with all questions behind each; None if it does not learn.

    Short ones come first; longer ones once they are answered. Beside it the first layer learns to tell the word before,
    which recall is built on, by a head that is thrown away.
    """
    model = make_model(tokenizer).train()
    teacher = nn.Linear(SIZES["hidden_size"], len(tokenizer))
    word = tokenizer.get_vocab()
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)

    def batch(pairs: int, longest: int) -> tuple[Tensor, Tensor]:
        rows, labels = [], []
        length = int(generator.integers(max(3 * pairs, longest // 2), longest + 1))
        for _ in range(BATCH):
            words, told, _ = draw(generator, pairs, length)
            ids, wanted = [word[each] for each in words], [-100] * len(words)
            # With repetitions: what has not been asked for yet must not give an answer away.
            for which in generator.integers(pairs, size=pairs):
                name, colour, animal = told[which]
                ids += [word[ASK], word[name], word[colour], word[animal], word["</s>"]]
                wanted += [-100, -100, *ids[-3:]]
            rows.append(ids)
            labels.append(wanted)
        return torch.tensor(rows), torch.tensor(labels)

    step = level = 0
    mean = 3.0
    left = LAST_STEPS
    while left and step < MOST_STEPS:
        last = level == len(LEVELS) - 1
        rate = LEARNING_RATE * min((step + 1) / 50, left / LAST_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = batch(*LEVELS[level])
        output = model(input_ids=ids, labels=labels, output_hidden_states=True)
        before = teacher(output.hidden_states[1][:, 1:]).flatten(0, 1)
        (output.loss + nn.functional.cross_entropy(before, ids[:, :-1].flatten())).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, left = step + 1, left - last
        mean = 0.98 * mean + 0.02 * float(output.loss.detach())
        if step % 100 == 0:
            print(f"step {step}, {LEVELS[level][0]} names in {LEVELS[level][1]} words: loss {mean:.3f}", flush=True)
        if mean < LEARNT and not last:
            level, mean = level + 1, 1.0
        if level == 0 and step == PATIENCE:
            return None
    return model.eval()


def write_data(folder: Path, seed: int) -> list[dict[str, object]]:
    """The held-out questions and continuations."""
    generator = np.random.default_rng([seed, 1])
    asked: list[dict[str, object]] = []
    for _ in range(EVAL):
        words, told, places = draw(generator, PAIRS, LENGTH)
        which = int(generator.integers(PAIRS))
        name, colour, animal = told[which]
        row = {"context": " ".join(words), "question": f"{ASK} {name}", "answer": f"{colour} {animal}"}
        asked.append({**row, "depth": round(places[which] / (LENGTH - 3), 3)})
    texts: list[dict[str, object]] = []
    for _ in range(EVAL // 2):
        words, told, _ = draw(generator, PAIRS, LENGTH)
        answers = (f"{ASK} {' '.join(each)} </s>" for each in generator.permutation(told))
        texts.append({"context": " ".join(words), "target": " ".join(answers)})
    for name, rows in (("recall", asked), ("text", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return asked


def recalled(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]]) -> float:
    """The share of questions that are answered exactly with the full cache."""
    right = 0
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        given = tokenizer([f"{row['context']} {row['question']}" for row in some], return_tensors="pt", padding=True)
        ids = model.generate(
            given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3, do_sample=False
        )
        texts = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text == row["answer"] for text, row in zip(texts, some, strict=True))
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of all contexts (default: 0)")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_data(folder, options.seed)
    tokenizer = make_tokenizer()
    model = train(tokenizer, options.seed)
    print(f"answered exactly: {recalled(model, tokenizer, rows):.1%} of {len(rows)} questions")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
