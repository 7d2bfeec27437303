"""Folders with a tiny image classifier and images of two classes."""

import io

import numpy as np
import pyarrow as pa
import torch
import yaml
from PIL import Image
from pyarrow import parquet
from transformers import ViTConfig, ViTForImageClassification

CLASSES = ("blue", "light red")


def image(number, size=16):
    """Class 0 or 1 by the parity of `number`; a bright square somewhere, so that patches differ."""
    drawn = np.random.default_rng(number).integers(0, 80, size=(size, size, 3), dtype=np.uint8)
    drawn[:, :, 0 if number % 2 else 2] += 120
    row, column = divmod(number % 16, 4)
    drawn[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 250
    return Image.fromarray(drawn)


def content(number):
    stream = io.BytesIO()
    image(number).save(stream, format="PNG")
    return stream.getvalue()


def class_folders(folder, count):
    for number in range(count):
        path = folder / CLASSES[number % 2].replace(" ", "_") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
    return folder


def parquet_file(path, count, labels=None, metadata=None):
    labels = [number % 2 for number in range(count)] if labels is None else labels
    table = pa.table({"image": [content(number) for number in range(count)], "label": labels})
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def classifier(folder, names=CLASSES):
    """A ViT with matrices large enough that attention is not uniform."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    return folder


def image_plan(folder, **changes):
    """A plan with its model and data."""
    classifier(folder / "vit")
    parquet_file(folder / "images.parquet", 20)
    plan = {
        "task": {
            "kind": "image_classification",
            "model": "./vit",
            "data": {"eval": "images.parquet"},
            "batch_size": 8,
            **changes.pop("task", {}),
        },
        "budget": {"unit": "keep", "amounts": [0.75, 0.5]},
        "seeds": [0, 1],
        "methods": ["tome", "evit"],
        **changes,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "plan.yaml"
