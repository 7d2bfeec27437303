"""Folders with a tiny language model, its tokenizer, and questions about contexts."""

import json

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrst", "ask")
TEMPLATE = "{% for turn in messages %}a {{ turn['content'] }} b{% endfor %}{% if add_generation_prompt %} c{% endif %}"
LAYERS, TOKEN = 3, 2 * 2 * 8 * 4
"""Of the model; bytes of one token's key and value in one layer: two heads of eight in fp32."""


def remember(folder, template=None, **changes):
    """A Llama, its matrices large enough that attention is not uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0, **sizes
    )
    for name, value in changes.items():
        setattr(config, name, value)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    tokenizer.save_pretrained(folder)
    return folder


def context_rows(folder, count=8, continued=False):
    """Contexts of 24 words and more, each with a question or a continuation."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        draw = torch.randint(3, 23, (27 + number,), generator=generator).tolist()
        words = [WORDS[index] for index in draw]
        row = {"context": " ".join(words[3:]), "depth": number / count}
        if continued:
            row = {"context": row["context"], "target": " ".join(words[:3])}
        else:
            row |= {"question": f"ask {words[0]}", "answer": " ".join(words[1:3])}
        rows.append(row)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def context_plan(folder, continued=False, **changes):
    """A plan with its model and rows."""
    remember(folder / "model")
    context_rows(folder, continued=continued)
    task = {"kind": "long_context", "model": "./model", "data": {"eval": "rows.jsonl"}}
    plan = {
        "task": {**task, **({} if continued else {"max_new_tokens": 3}), **changes.pop("task", {})},
        "budget": {"unit": "keep", "amounts": [0.5]},
        "seeds": [0, 1],
        "methods": ["k_norm", {"h2o": {"recent": 2}}],
        **changes,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "plan.yaml"
