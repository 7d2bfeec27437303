"""Small vision-language models with random weights, and batches for them as their processors would make them."""

import torch
import transformers

from small_models import spread

IMAGE, VIDEO, END = 98, 97, 99
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TILE = {**_VISION, "image_size": 16, "patch_size": 4}
_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
_QWEN = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_POINTS = [[16, 32], [32, 16], [32, 32]]
SIZES = {"a": (10, 30), "b": (30, 12), "c": (30, 28)}
GRIDS = {"a": (1, 4, 6), "b": (1, 8, 4), "c": (1, 4, 4), "v": (2, 4, 6)}
TILES = {"a": 1, "b": 2, "c": 3}

KINDS = (
    "llava",
    "paligemma",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
)
VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLASS_TOKEN = ("llava", "llava_next", "internvl")


def vision_language(kind, seed=0):
    torch.manual_seed(seed)
    tokens = {"image_token_id": IMAGE}
    qwen = {**tokens, "video_token_id": VIDEO, "vision_start_token_id": 95, "vision_end_token_id": 96}
    if kind == "llava":
        vision, text = transformers.CLIPVisionConfig(**_TILE), transformers.LlamaConfig(**_TEXT)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, **tokens)
    elif kind == "paligemma":
        vision = transformers.SiglipVisionConfig(vision_use_head=False, **_TILE)
        text = transformers.GemmaConfig(head_dim=8, **_TEXT)
        config = transformers.PaliGemmaConfig(
            vision_config=vision, text_config=text, projection_dim=32, hidden_size=32, vocab_size=100, **tokens
        )
    elif kind == "llava_next":
        vision, text = transformers.CLIPVisionConfig(**_TILE), transformers.LlamaConfig(**_TEXT)
        config = transformers.LlavaNextConfig(
            vision_config=vision, text_config=text, image_grid_pinpoints=_POINTS, **tokens
        )
    elif kind == "llava_onevision":
        vision = transformers.SiglipVisionConfig(vision_use_head=False, **_TILE)
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision,
            text_config=transformers.Qwen2Config(**_TEXT),
            image_grid_pinpoints=_POINTS,
            vision_aspect_ratio="anyres_max_2",
            video_token_id=VIDEO,
            **tokens,
        )
    elif kind == "qwen2_vl":
        vision = {**_QWEN, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(
            vision_config=vision, text_config={**_TEXT, "rope_parameters": _ROPE}, **qwen
        )
    elif kind == "qwen2_5_vl":
        vision = {**_QWEN, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16}
        vision["fullatt_block_indexes"] = [1]
        config = transformers.Qwen2_5_VLConfig(
            vision_config=vision, text_config={**_TEXT, "rope_parameters": _ROPE}, **qwen
        )
    elif kind == "qwen3_vl":
        vision = {**_QWEN, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        rope = {**_ROPE, "mrope_interleaved": True}
        config = transformers.Qwen3VLConfig(
            vision_config=vision, text_config={**_TEXT, "head_dim": 8, "rope_parameters": rope}, **qwen
        )
    elif kind == "internvl":
        vision = transformers.InternVLVisionConfig(**{**_TILE, "image_size": [16, 16], "patch_size": [4, 4]})
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**_TEXT), image_seq_length=4, **tokens
        )
    else:
        family = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}[kind]
        config = family(
            vision_config=_TILE, text_config=transformers.LlamaConfig(**_TEXT), scale_factor=2, pad_token_id=0, **tokens
        )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    return spread(model, 2)


ROWS = {
    "one row without images": [[3, "a", 2, "b", 4], [7]],
    "several images": [[2, "b", 5], [1, "a", 1, "c", 6]],
}
VIDEO_ROWS = [[2, "v", 4], [1, "a", 3, "v", 5]]


def batch_for(kind, model, rows, padding="left", seed=1):
    """Inputs with text of given lengths and images (`a`, `b`, `c` of several sizes, `v` videos) between."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    made = {}
    names = [[item for item in row if isinstance(item, str)] for row in rows]
    images = [name for row in names for name in row if name != "v"]
    videos = [name for row in names for name in row if name == "v"]
    if kind.startswith("qwen"):
        for modality, own, pixels in (("image", images, "pixel_values"), ("video", videos, "pixel_values_videos")):
            if own:
                made[f"{modality}_grid_thw"] = torch.tensor([GRIDS[name] for name in own])
                made[pixels] = noise(int(made[f"{modality}_grid_thw"].prod(1).sum()), 3 * 2 * 4 * 4)
        if videos and kind == "qwen2_5_vl":
            made["second_per_grid_ts"] = torch.tensor([0.5] * len(videos))
        counts = {name: grid[0] * grid[1] * grid[2] // 4 for name, grid in GRIDS.items()}
    elif kind in ("llava_next", "llava_onevision"):
        counts = _tiled(kind, model, names, images, videos, noise, made)
    elif kind == "internvl":
        made["pixel_values"] = noise(sum(TILES[name] for name in images), 3, 16, 16)
        counts = {name: 4 * tiles for name, tiles in TILES.items()}
    elif kind in ("idefics3", "smolvlm"):
        most = max(sum(TILES[name] for name in row) for row in names)
        made["pixel_values"] = torch.zeros(len(rows), most, 3, 16, 16)
        made["pixel_attention_mask"] = torch.zeros(len(rows), most, 16, 16, dtype=torch.long)
        for index, row in enumerate(names):
            tiles = sum(TILES[name] for name in row)
            made["pixel_values"][index, :tiles] = noise(tiles, 3, 16, 16)
            made["pixel_attention_mask"][index, :tiles] = 1
        counts = {name: 4 * tiles for name, tiles in TILES.items()}
    else:
        made["pixel_values"] = noise(len(images), 3, 16, 16)
        counts = dict.fromkeys(TILES, 16)
    return made | _tokens(kind, rows, counts, padding, generator)


def _tiled(kind, model, names, images, videos, noise, made):
    counts = {}
    if images:
        numbers = [sum(name != "v" for name in row) for row in names]
        alone = [number == 1 or kind == "llava_next" for number in numbers for _ in range(number)]
        tiles = [{"a": 3, "b": 3, "c": 5}[name] if single else 1 for name, single in zip(images, alone, strict=True)]
        made["pixel_values"] = noise(len(images), max(tiles), 3, 16, 16)
        made["image_sizes"] = torch.tensor([SIZES[name] for name in images])
        if kind == "llava_onevision":
            made["batch_num_images"] = torch.tensor([number for number in numbers if number])
        with torch.no_grad():
            features = model.model.get_image_features(**made, return_dict=True).pooler_output
        counts = {name: [] for name in images}
        for name, part in zip(images, features, strict=True):
            counts[name].append(len(part))
    if videos:
        made["pixel_values_videos"] = noise(len(videos), 2, 3, 16, 16)
        counts["v"] = 2 * 4 + 1
    return counts


def _tokens(kind, rows, counts, padding, generator):
    taken = {name: list(count) if isinstance(count, list) else None for name, count in counts.items()}
    written = []
    for row in rows:
        ids = []
        for item in row:
            if isinstance(item, int):
                ids += torch.randint(3, 90, (item,), generator=generator).tolist()
                continue
            count = taken[item].pop(0) if taken[item] is not None else counts[item]
            if kind == "qwen3_vl" and item == "v":  # each frame on its own, behind its time
                ids += [90, *[VIDEO] * (count // 2)] * 2
            elif kind in ("idefics3", "smolvlm"):
                ids += [91, *[IMAGE] * 4] * (count // 4)
            else:
                ids += [VIDEO if item == "v" else IMAGE] * count
        written.append(ids)
    longest = max(map(len, written))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(written):
        place = slice(longest - len(row), None) if padding == "left" else slice(len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    made = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("qwen"):
        made["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if kind == "paligemma":
        made["token_type_ids"] = torch.zeros_like(ids)
    return made


def answers_only(inputs, count=2):
    """Labels for the last `count` tokens of each row."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"]):
        places = mask.nonzero()[-count:, 0]
        labels[row, places] = inputs["input_ids"][row, places]
    return labels


def one_row(kind, model, rows, index, padding="left"):
    """Row `index` of the batch as a batch of its own, with the same pixels."""
    whole = batch_for(kind, model, rows, padding)
    single = batch_for(kind, model, [rows[index]], padding)
    mask = whole["attention_mask"][index].bool()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in whole:
            single[name] = whole[name][index : index + 1, mask]
    for pixels, modality in (("pixel_values", "image"), ("pixel_values_videos", "video")):
        if pixels not in whole or pixels not in single:
            continue
        if kind in ("idefics3", "smolvlm"):
            tiles = single[pixels].shape[1]
            single[pixels] = whole[pixels][index : index + 1, :tiles]
            continue
        before = [_amount(kind, name, modality) for row in rows[:index] for name in row if isinstance(name, str)]
        start = sum(before)
        single[pixels] = whole[pixels][start : start + len(single[pixels])]
        if pixels == "pixel_values" and kind in ("llava_next", "llava_onevision"):
            wanted = batch_for(kind, model, [rows[index]], padding)[pixels].shape[1]
            single[pixels] = single[pixels][:, :wanted]
    return single


def _amount(kind, name, modality):
    """Rows of the pixels that an image takes."""
    if (name == "v") != (modality == "video"):
        return 0
    if kind.startswith("qwen"):
        times, rows, columns = GRIDS[name]
        return times * rows * columns
    return TILES[name] if kind == "internvl" else 1
