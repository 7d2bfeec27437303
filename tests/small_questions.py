"""Folders with a tiny vision-language model, its processor, and questions about images."""

import json

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from small_images import image

WORDS = ("<pad>", "</s>", "<unk>", "<image>", "user:", "which", "colour", "is", "it", "blue", "light", "red")
TEMPLATE = "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}user: <image> {% else %}"
TEMPLATE += "{{ part['text'] }}{% endif %}{% endfor %}"


def processor(template=None):
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def speaker(folder, template=None):
    """A LLaVA with three layers, and matrices large enough that attention is not uniform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **sizes),
        text_config=LlamaConfig(
            vocab_size=len(WORDS), num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0, **sizes
        ),
        image_token_id=WORDS.index("<image>"),
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    processor(template).save_pretrained(folder)
    return folder


def question_rows(folder, count):
    """Two questions about each image."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = f"images/{number // 2}.png"
        image(number // 2).save(folder / name)
        answer = "blue" if number % 3 else "light red"
        rows.append({"image": name, "question": "which colour is it" if number % 2 else "which", "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "questions.jsonl"


def question_plan(folder, **changes):
    """A plan with its model and questions."""
    speaker(folder / "vlm")
    question_rows(folder, 8)
    plan = {
        "task": {
            "kind": "visual_question_answering",
            "model": "./vlm",
            "data": {"eval": "questions.jsonl"},
            "max_new_tokens": 3,
            **changes.pop("task", {}),
        },
        "budget": {"unit": "keep", "amounts": [0.5]},
        "seeds": [0, 1],
        "methods": ["faster_vlm", {"fast_v": {"layer": 1}}],
        **changes,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "plan.yaml"
