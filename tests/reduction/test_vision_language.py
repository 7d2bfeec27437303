"""Every layout of vision-language models: all kept is the plain call, dropping is hiding, scores are in place."""

import functools
import sys

import pytest
import torch
import transformers
from torch.nn import functional

import tokenwise as tw
from small_vision_language import (
    CLASS_TOKEN,
    IMAGE,
    KINDS,
    ROWS,
    VIDEO,
    VIDEO_ROWS,
    VIDEOS,
    answers_only,
    batch_for,
    one_row,
    vision_language,
)
from tokenwise.errors import InputError
from tokenwise.models.encoders import find_encoder
from tokenwise.models.vision_language import LAYOUTS, Signal, vision_language_model
from tokenwise.reduction import InputReducer, Merge, keep_only, verify_inputs

COLUMNS = Signal("columns", 1)
HALF = tw.reduction.Random(keep=0.5)
MADE = [(kind, name, ROWS[name]) for kind in KINDS for name in ROWS] + [(kind, "videos", VIDEO_ROWS) for kind in VIDEOS]
CASES = [pytest.param(kind, rows, id=f"{kind}, {name}") for kind, name, rows in MADE]
OPTIONS = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "suppress_tokens": list(range(95, 99))}
model_of = functools.cache(vision_language)


class MostAttended(InputReducer):
    """Keeps what receives most attention: the mean over all queries."""

    def signals(self):
        return (COLUMNS,)

    def select(self, image, count):
        score = image.signals[COLUMNS].nan_to_num(torch.inf)
        return keep_only(score.argsort(descending=True, stable=True)[:count].sort().values.unsqueeze(0))


class Uneven(InputReducer):
    """Keeps more of some images than of others."""

    def counts_of(self, images):
        return [2 + int(100 * image.features.abs().sum()) % 3 for image in images]

    def select(self, image, count):
        return keep_only(torch.arange(count).unsqueeze(0))


class Pairs(InputReducer):
    """Merges neighbours."""

    def counts_of(self, images):
        return [(len(image.features) + 1) // 2 for image in images]

    def select(self, image, count):
        tokens = torch.arange(len(image.features)).unsqueeze(0)
        return Merge(tokens[:, ::2], tokens // 2)


def copied(inputs):
    return {name: value.clone() for name, value in inputs.items()}


def hidden_from(model, inputs, handle):
    """The dense model's inputs with the tokens that went hidden, at the positions they had."""
    mask, ids = inputs["attention_mask"].clone(), inputs["input_ids"]
    places = torch.cat([(ids == token).nonzero() for token in (IMAGE, VIDEO)])
    sizes = handle.rows
    start = 0
    for size, kept in zip(sizes, handle.kept, strict=True):
        gone = torch.ones(size, dtype=torch.bool).index_fill(0, kept, False)
        row, column = places[start : start + size][gone].unbind(1)
        mask[row, column] = 0
        start += size
    assert start == len(places)
    if hasattr(model.model, "get_rope_index"):
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
        given = {name: inputs[name] for name in names if name in inputs}
        positions, _ = model.model.get_rope_index(ids, attention_mask=inputs["attention_mask"], **given)
    else:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**inputs, "attention_mask": mask, "position_ids": positions}


def reduced(model, inputs, method, **options):
    """What the reduced model gives, and the handle with how many rows each image had."""
    layout = vision_language_model(model)
    with torch.no_grad():
        rows = [len(image.features) for image in layout.encode(inputs).images]
    with tw.reduce(model, method) as handle:
        found = model(**inputs, **options)
    handle.rows = rows
    return found, handle


@pytest.mark.parametrize(("kind", "rows"), CASES)
@torch.no_grad()
def test_keeping_all_is_the_plain_call_to_the_bit(kind, rows):
    model = model_of(kind)
    inputs = batch_for(kind, model, rows)
    before = copied(inputs)
    plain, ids = model(**inputs).logits, model.generate(**inputs, **OPTIONS)
    made = tw.prune_inputs(model, inputs, tw.reduction.Random(keep=1.0))
    assert torch.equal(model(**made).logits, plain)
    made = tw.prune_inputs(model, inputs, tw.reduction.Random(keep=1.0))
    assert torch.equal(model.generate(**made, **OPTIONS), ids)
    with tw.reduce(model, tw.reduction.Random(keep=1.0)):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **OPTIONS), ids)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("kind", "rows"), CASES)
@torch.no_grad()
def test_dropping_equals_hiding(kind, rows, padding):
    model = model_of(kind)
    inputs = batch_for(kind, model, rows, padding)
    dense = model(**inputs).logits
    for method in (HALF, MostAttended(keep=0.5)):
        found, handle = reduced(model, inputs, method)
        assert handle.stats["image_tokens_after"] == sum(map(len, handle.kept)) < handle.stats["image_tokens_before"]
        whole = hidden_from(model, inputs, handle)
        expected, mask = model(**whole).logits, whole["attention_mask"].bool()
        for row in range(2):
            own = expected[row][mask[row]]
            mine = found.logits[row, -len(own) :] if padding == "left" else found.logits[row, : len(own)]
            assert torch.allclose(mine, own, atol=1e-5)
        assert not torch.allclose(expected[mask], dense[mask], atol=1e-3)
        assert verify_inputs(model, inputs, method) < 1e-5


@pytest.mark.parametrize(("kind", "rows"), CASES)
@torch.no_grad()
def test_generated_ids_keep_the_whole_prompt(kind, rows):
    model = model_of(kind)
    inputs = batch_for(kind, model, rows)
    length = inputs["input_ids"].shape[1]
    single = one_row(kind, model, rows, 0)
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with tw.reduce(model, HALF):
        found = model.generate(**inputs, **options)
        # Without padding, and so without a mask, and without a cache.
        alone = [model.generate(**single, **options, use_cache=use_cache) for use_cache in (True, False)]
    with tw.reduce(model, HALF, masked=True):
        hidden = model.generate(**inputs, **options)
    assert torch.equal(found.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(found.sequences, hidden.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(hidden.logits), atol=1e-5)
    for run in alone:
        assert torch.equal(found.sequences[0, length:], run.sequences[0, -4:])
        assert torch.allclose(torch.stack(found.logits)[:, :1], torch.stack(run.logits), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_beams_get_the_images_of_their_row(kind):
    model, rows = model_of(kind), ROWS["several images"]
    inputs = batch_for(kind, model, rows)
    length = inputs["input_ids"].shape[1]
    beams = {**OPTIONS, "num_beams": 2, "num_return_sequences": 2}
    beams |= {"return_dict_in_generate": True, "output_scores": True}
    for method in (HALF, Uneven()):
        with tw.reduce(model, method) as handle:
            found = model.generate(**inputs, **beams)
            counts = {len(kept) for kept in handle.kept}
            single = model.generate(**one_row(kind, model, rows, 1), **beams)
        assert torch.equal(found.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
        assert torch.equal(found.sequences[2:, length:], single.sequences[:, -4:])
        assert torch.allclose(found.sequences_scores[2:], single.sequences_scores, atol=1e-6)
        assert len(counts) > 1 or method is HALF


@torch.no_grad()
def test_lengths_count_the_whole_prompt():
    model = model_of("llava")
    inputs = batch_for("llava", model, ROWS["several images"])
    length = inputs["input_ids"].shape[1] + 3
    config = transformers.GenerationConfig(max_length=length, min_length=length, eos_token_id=99, do_sample=False)
    with tw.reduce(model, HALF):
        assert model.generate(**inputs, generation_config=config).shape[1] == length
        found = model.generate(**inputs, max_length=length, min_length=length, do_sample=False)
    assert found.shape[1] == config.max_length == length


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_training_loss_is_that_of_hiding(kind, padding):
    model = model_of(kind)
    inputs = batch_for(kind, model, ROWS["several images"], padding)
    labels = answers_only(inputs)
    found, handle = reduced(model, inputs, HALF, labels=labels)
    expected = model(**hidden_from(model, inputs, handle), labels=labels).loss
    assert torch.allclose(found.loss, expected, atol=1e-5)
    assert not torch.allclose(found.loss, model(**inputs, labels=labels).loss, atol=1e-5)
    tower = vision_language_model(model).tower
    [*weights] = torch.autograd.grad(found.loss, list(tower.parameters()), allow_unused=True)
    assert sum(weight.abs().sum() for weight in weights if weight is not None) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_token_that_is_missing_is_refused(kind):
    model = model_of(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    if kind in CLASS_TOKEN:
        assert verify_inputs(model, inputs, tw.FasterVLM(keep=0.5)) < 1e-5
        return
    with pytest.raises(InputError, match=r"no class token.*hi_prune"):
        tw.reduce(model, tw.FasterVLM(keep=0.5))


def eager_columns(kind, model, inputs, module):
    """Column means of the eager attention map, one tensor [images or tiles, keys] for each call of `module`."""
    place = sys.modules[type(module).__module__]
    original, calls = place.eager_attention_forward, []

    def recording(owner, *args, **options):
        output, weights = original(owner, *args, **options)
        if owner is module:
            calls.append(weights.mean(1))
        return output, weights

    place.eager_attention_forward = recording
    before = module.config._attn_implementation
    module.config._attn_implementation = "eager"
    try:
        model(**inputs)
    finally:
        place.eager_attention_forward = original
        module.config._attn_implementation = before
    return calls


def pooled(columns):
    """[tiles, 16 patches] as [tiles, 4 rows]: means over 2 by 2 neighbours."""
    return functional.avg_pool2d(columns.unflatten(1, (1, 4, 4)), 2).flatten(1)


def windowed(maps, grids):
    """Rows of the language model in the order in which windows of 2 by 2 take them, for grids of (t, h, w)."""
    order, start = [], 0
    for times, rows, columns in grids:
        whole = torch.arange(start, start + times * rows * columns).view(times, rows, columns)
        for frame in whole:
            for top in range(0, rows, 2):
                for left in range(0, columns, 2):
                    order += frame[top : top + 2, left : left + 2].flatten().tolist()
        start += times * rows * columns
    values = torch.empty(start)
    values[order] = maps
    return values


def tiled(columns, rows, width):
    """One image of base tile and two tiles side by side, `rows` of its 4 rows of patches unpadded, newlines NaN."""
    grid = columns[1:].view(2, 4, 4).transpose(0, 1).flatten(1)[rows]
    return torch.cat([columns[0], functional.pad(grid[:, :width], (0, 1), value=torch.nan).flatten()])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_columns_are_those_of_the_eager_map(kind, layer):
    model = model_of(kind)
    layout = vision_language_model(model)
    rows = [[2, "a", 4], [3]] if kind.startswith("llava_") else ROWS["several images"]
    inputs = batch_for(kind, model, rows)
    signal = Signal("columns", layer)
    found = torch.cat([image.signals[signal] for image in layout.encode(inputs, [signal]).images])
    calls = eager_columns(kind, model, inputs, layout.attention_modules()[layer])
    if kind.startswith("qwen"):
        # Each image's map is a diagonal of windows' maps: a mean over all its queries is their sum over its patches.
        sums = torch.cat([weights[0].sum(0) for weights in calls])
        merged = sums.view(-1, 4).mean(1)
        grids = [(t, h // 2, w // 2) for t, h, w in inputs["image_grid_thw"].tolist()]
        expected = windowed(merged, grids) if kind == "qwen2_5_vl" else merged
        if kind == "qwen2_5_vl" and layer == 0:
            assert len(calls) > len(grids)
        patches = torch.cat([torch.full((t * h * w,), 4 * t * h * w) for t, h, w in grids])
        expected = expected / patches
    else:
        columns = torch.cat(calls).mean(1)[:, layout.prefix() :]
        if kind.startswith("llava_"):
            expected = tiled(columns, slice(1, 3), 8)
        elif kind in ("internvl", "idefics3", "smolvlm"):
            expected = pooled(columns).flatten()
        else:
            expected = columns.flatten()
    assert torch.allclose(found, expected, atol=1e-7, equal_nan=True)
    assert found[~found.isnan()].std() > 1e-4


@torch.no_grad()
def test_a_resized_grid_has_resized_scores():
    model = model_of("llava_onevision")
    layout = vision_language_model(model)
    inputs = batch_for("llava_onevision", model, [[2, "c", 4]])
    [image] = layout.encode(inputs, [COLUMNS, Signal("keys", 1)]).images
    [weights] = eager_columns("llava_onevision", model, inputs, layout.attention_modules()[1])
    columns = weights.mean(1)
    grid = columns[1:].view(2, 2, 4, 4).permute(0, 2, 1, 3).reshape(1, 1, 8, 8)
    grid = functional.interpolate(grid, [5, 5], mode="bilinear")[0, 0]
    expected = torch.cat([columns[0], functional.pad(grid, (0, 1), value=torch.nan).flatten()])
    assert torch.allclose(image.signals[COLUMNS], expected, atol=1e-7, equal_nan=True)
    assert image.signals[Signal("keys", 1)].shape == (16 + 30, 8)
    assert torch.equal(image.patch, ~expected.isnan())
    tiles = image.tile[16:].view(5, 6)
    assert tiles[:, 5].unique().tolist() == [-1]
    assert tiles[[0, 0, 4, 4], [0, 4, 0, 4]].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "rows"), CASES)
@torch.no_grad()
def test_every_signal_has_a_row_for_every_feature(kind, rows):
    model = model_of(kind)
    wanted = {Signal("keys", 1): (8,), Signal("keys", 1, "one"): (32,), Signal("columns", -1, "sum"): ()}
    images = vision_language_model(model).encode(batch_for(kind, model, rows), wanted).images
    assert images
    for image in images:
        for signal, shape in wanted.items():
            values = image.signals[signal]
            assert values.shape == (len(image.features), *shape)
            assert torch.equal(values.isfinite().view(len(values), -1).all(1), image.patch)


@torch.no_grad()
def test_tiles_and_grids():
    for kind in ("llava_next", "llava_onevision"):
        model = model_of(kind)
        inputs = batch_for(kind, model, [[1, "a", 2]])
        [image] = vision_language_model(model).encode(inputs).images
        row = [1] * 4 + [2] * 4 + [-1]
        assert image.tile.tolist() == [0] * 16 + row + row
        assert (image.grid, image.tile_grid) == (None, (1, 2))
    model = model_of("qwen2_vl")
    picture, film = vision_language_model(model).encode(batch_for("qwen2_vl", model, [[1, "a", 2, "v", 1]])).images
    assert (picture.grid, picture.tile, picture.modality) == ((2, 3), None, "image")
    assert (film.grid, film.tile.tolist(), film.modality) == ((2, 3), [0] * 6 + [1] * 6, "video")
    for method in (tw.reduction.Grid(keep=0.5), tw.reduction.AveragePool(keep=0.5)):
        kept = method.select(film, 6).kept[0]
        assert kept.tolist() == [row + start for start in (0, 6) for row in kept[:3].tolist()]
        assert len({row // 3 for row in kept[:3].tolist()}) == 1


@pytest.mark.parametrize("kind", VIDEOS)
@torch.no_grad()
def test_columns_of_a_video(kind):
    model = model_of(kind)
    layout = vision_language_model(model)
    inputs = batch_for(kind, model, [[2, "v", 4]])
    [image] = layout.encode(inputs, [COLUMNS]).images
    calls = eager_columns(kind, model, inputs, layout.attention_modules()[1])
    if kind == "llava_onevision":
        expected = functional.pad(pooled(calls[0].mean(1)).flatten(), (0, 1), value=torch.nan)
    else:
        assert len(calls) == 2  # one for each frame
        expected = torch.cat([weights[0].sum(0) for weights in calls]).view(-1, 4).mean(1) / 48
        expected = windowed(expected, [(2, 2, 3)]) if kind == "qwen2_5_vl" else expected
    assert torch.allclose(image.signals[COLUMNS], expected, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_one_call_for_all_images_reads_as_one_for_each(kind):
    """Flash attention gets all images at once, with the places where each begins."""
    model = vision_language(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    layout = vision_language_model(model)
    expected = [image.signals[COLUMNS] for image in layout.encode(inputs, [COLUMNS]).images]
    calls = []

    def like_flash(module, query, key, value, attention_mask, cu_seq_lens_q, **options):
        calls.append(1)
        lengths = cu_seq_lens_q.diff().tolist()
        parts = zip(*(values.split(lengths, 2) for values in (query, key, value)), strict=True)
        made = [functional.scaled_dot_product_attention(*part, scale=options["scaling"]) for part in parts]
        return torch.cat(made, 2).transpose(1, 2), None

    transformers.AttentionInterface.register("like_flash", like_flash)
    layout.attention_modules()[1].config._attn_implementation_internal = "like_flash"
    try:
        found = [image.signals[COLUMNS] for image in layout.encode(inputs, [COLUMNS]).images]
    finally:
        transformers.AttentionInterface._global_mapping.pop("like_flash")
    assert len(calls) == 3
    assert all(torch.allclose(*pair, atol=1e-7) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_rows_are_means_wherever_they_go(kind):
    model = model_of(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    layout = vision_language_model(model)
    first = layout.encode(inputs).images[0]
    made = tw.prune_inputs(model, inputs, Pairs())["mm_encoder_outputs"]["image"]

    def mean(values):
        return torch.stack([part.mean(0) for part in values.split(2)])

    assert torch.allclose(torch.cat(list(made.pooler_output))[: (len(first.features) + 1) // 2], mean(first.features))
    assert len(first.deeper) == (2 if kind == "qwen3_vl" else 0)
    for index, values in enumerate(first.deeper):
        assert torch.allclose(made.deepstack_features[index][0], mean(values))
    assert verify_inputs(model, inputs, Pairs()) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_the_model_remembers_is_put_back(kind):
    model = model_of(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    remembered = torch.tensor([[-3], [4]])

    def failing(method):
        with tw.reduce(model, method):
            model.generate(**inputs, **OPTIONS)
            raise RuntimeError("stop")

    for method in (HALF, tw.reduction.Random(keep=1.0)):
        model.model.rope_deltas = remembered
        with tw.reduce(model, method):
            model(**inputs)
            model.generate(**inputs, **OPTIONS)
        assert model.model.rope_deltas is remembered
        with pytest.raises(RuntimeError, match="stop"):
            failing(method)
        assert model.model.rope_deltas is remembered
    tw.prune_inputs(model, inputs, HALF)
    assert model.model.rope_deltas is remembered
    assert not {"forward", "generate"} & vars(model).keys()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_have_the_features_that_were_used(kind):
    model = model_of(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    with tw.reduce(model, HALF) as handle:
        found = model(**inputs)
        whole = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    assert whole.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    if getattr(found, "image_hidden_states", None) is not None and kind != "smolvlm":
        assert found.image_hidden_states.flatten(0, -2).shape[0] == handle.stats["image_tokens_after"] / 2


@torch.no_grad()
def test_conversations_that_go_on_are_refused():
    model = model_of("qwen2_5_vl")
    inputs = batch_for("qwen2_5_vl", model, ROWS["several images"])
    with tw.reduce(model, HALF):
        output = model(**inputs)
        with pytest.raises(InputError, match="holds tokens already"):
            model(**inputs, past_key_values=output.past_key_values)
        with pytest.raises(InputError, match="fewer tokens than its ids"):
            model(input_ids=inputs["input_ids"][:, -1:], past_key_values=output.past_key_values)
        found = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
        with pytest.raises(InputError, match="fewer tokens than its ids"):
            model.generate(found.sequences, past_key_values=found.past_key_values, **OPTIONS)
        plain = model(input_ids=inputs["input_ids"][:, -3:])
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=plain.past_key_values)


@torch.no_grad()
def test_positional_arguments_are_understood():
    model = model_of("llava")
    inputs = batch_for("llava", model, ROWS["several images"])
    with tw.reduce(model, HALF) as handle:
        found = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
        assert torch.equal(found, model(**inputs).logits)
    assert handle.stats["batches"] == 2


@torch.no_grad()
def test_hiding_gives_rows_for_every_token():
    model = model_of("llava_next")
    inputs = batch_for("llava_next", model, ROWS["several images"])
    labels = answers_only(inputs)
    with tw.reduce(model, HALF, masked=True) as handle:
        slow = model(**inputs, labels=labels)
        assert handle.stats["image_tokens_after"] < handle.stats["image_tokens_before"]
    fast, _ = reduced(model, inputs, HALF, labels=labels)
    assert slow.logits.shape[:2] == inputs["input_ids"].shape
    assert torch.allclose(slow.loss, fast.loss, atol=1e-5)


def test_bad_input_is_refused_before_any_work():
    model = model_of("qwen2_vl")
    inputs = batch_for("qwen2_vl", model, ROWS["several images"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])

    def refused(match, **changed):
        made = {name: value for name, value in {**inputs, **changed}.items() if value is not None}
        with pytest.raises(InputError, match=match):
            tw.prune_inputs(model, made, HALF)

    refused("placeholders cannot be told apart", input_ids=None, inputs_embeds=embeds)
    refused("batch.input_ids: is missing", input_ids=None)
    refused("batch.mm_token_type_ids: is missing", mm_token_type_ids=None)
    refused("batch.image_grid_thw: is missing", image_grid_thw=None)
    refused("not of the shape", attention_mask=torch.ones(2, 1, 4, 4))
    packed = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1) % 7
    refused("begin anew within a row", attention_mask=None, position_ids=packed)
    refused("hides placeholders", attention_mask=torch.zeros_like(inputs["attention_mask"]))
    with pytest.raises(InputError, match="positions in time and space"):
        tw.prune_inputs(model, inputs, HALF, positions="compact")
    model.train()
    with pytest.raises(InputError, match="in training mode"):
        verify_inputs(model, inputs, HALF)
    model.eval()


@torch.no_grad()
def test_verifying_finds_what_is_wrong(monkeypatch):
    model = model_of("qwen2_vl")
    inputs = batch_for("qwen2_vl", model, ROWS["several images"])
    layout = type(vision_language_model(model))
    right = layout.position_ids
    calls = []

    def wrong(self, batch, mask):
        calls.append(1)
        return right(self, batch, mask) * (2 if len(calls) == 1 else 1)

    monkeypatch.setattr(layout, "position_ids", wrong)
    assert verify_inputs(model, inputs, HALF) > 1e-3


def test_encoders_of_these_models():
    encoder = find_encoder(model_of("idefics3"))
    assert (encoder.prefix, encoder.has_class_token, len(encoder.blocks)) == (0, False, 3)
    with pytest.raises(InputError, match="no encoder of a known layout"):
        find_encoder(model_of("internvl").model.vision_tower)


def test_every_layout_is_tried():
    assert set(LAYOUTS) == set(KINDS)
