"""Methods at the input of a language model: official numbers, exact counts, explicit matrices, what each one reads."""

import copy
import json
from pathlib import Path

import pytest
import torch

import tokenwise as tw
from small_models import llava, pictures
from tokenwise.errors import InputError
from tokenwise.models import vision_language
from tokenwise.models.vision_language import PROJECTOR_INPUTS, EncodedImage, vision_language_model
from tokenwise.reduction.hi_prune import anchors_and_registers
from tokenwise.reduction.hi_red import tile_budgets
from tokenwise.reduction.inputs import prune
from tokenwise.reduction.patches import rectangles
from tokenwise.reduction.pru_merge import outliers

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "input_reduction.json").read_text(encoding="utf-8"))

SELECTING = {
    "div_prune": lambda keep: tw.DivPrune(keep=keep),
    "hi_prune": lambda keep: tw.HiPrune(keep=keep, object_layer=1, alpha=1.0),
    "hi_red": lambda keep: tw.HiRED(keep=keep),
    "to_dre": lambda keep: tw.ToDRE(keep=keep),
    "to_dre_nearest": lambda keep: tw.ToDRE(keep=keep, rule="nearest"),
    "zoo_prune": lambda keep: tw.ZooPrune(keep=keep, directions=4),
}
MERGING = {
    "vision_zip": lambda keep: tw.VisionZip(keep=keep, contextual=0.4),
    "vision_zip_average": lambda keep: tw.VisionZip(keep=keep, contextual=0.4, average=True),
    "pru_merge": lambda keep: tw.PruMerge(keep=keep, neighbours=5),
    "pru_merge_plus": lambda keep: tw.PruMergePlus(keep=keep, neighbours=5),
    "vq_token": lambda keep: tw.VQToken(keep=keep),
}
COARSER = {
    "grid": lambda keep: tw.Grid(keep=keep),
    "average_pool": lambda keep: tw.AveragePool(keep=keep),
    "token_flex": lambda keep: tw.TokenFlex(keep=keep),
    "fourier_vlm": lambda keep: tw.FourierVLM(keep=keep),
}
EXACT = {**SELECTING, **MERGING}
ALL = {**EXACT, **COARSER}
WITHOUT_ATTENTION = ("div_prune", "zoo_prune", "vq_token", *COARSER)


def batch():
    ids = torch.randint(1, 90, (2, 22), generator=torch.Generator().manual_seed(1))
    ids[0, 3:19] = ids[1, 5:21] = 98
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures()}


def values(*shape, salt):
    """What the official numbers were computed from."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) ** 2 * salt).reshape(shape).float()


def an_image(method, features, *signals, **options):
    patch = torch.ones(len(features), dtype=torch.bool)
    found = dict(zip(method.signals(), signals, strict=True))
    return EncodedImage(features, found, **{"patch": patch, **options})


def a_tiled_image(method, seed=0):
    """An overview of 4 x 4 patches, then 2 x 2 tiles of 3 x 4 patches, line by line with a newline behind each."""
    tile = [0] * 16
    for above in (1, 3):
        tile += 3 * ([above] * 4 + [above + 1] * 4 + [-1])
    tile = torch.tensor(tile)
    patch = tile >= 0
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for signal in method.signals():
        shape = (len(tile), 6) if signal.kind in ("keys", "projector_inputs") else (len(tile),)
        signals[signal] = torch.rand(shape, generator=generator)
        signals[signal][~patch] = torch.nan
    torch.manual_seed(seed)
    projector = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    features = torch.randn(len(tile), 8, generator=generator)
    return EncodedImage(features, signals, patch, None, tile.clamp_min(0), (2, 2), projector)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_rows_are_those_of_the_explicit_matrix(name):
    model, inputs = llava(), batch()
    layout, method = vision_language_model(model), ALL[name](0.25)
    encoded = layout.encode(inputs, (*method.signals(), PROJECTOR_INPUTS))
    pruned = prune(layout, inputs, method)
    projector = copy.deepcopy(model.model.multi_modal_projector).double()
    found = pruned.batch["mm_encoder_outputs"]["image"].pooler_output
    for image, rows, kept, group in zip(encoded.images, found, pruned.kept, pruned.group, strict=True):
        matrix = method.select(image, 4).matrix(torch.ones(1, 16))[0]
        if method.before_projector:
            expected = projector(matrix @ image.signals[PROJECTOR_INPUTS].double())
        else:
            expected = matrix @ image.features.double()
        torch.testing.assert_close(rows.double(), expected, atol=1e-5, rtol=1e-5)
        assert (kept.diff() > 0).all()
        most = matrix.abs().amax(0)
        assert (group == -1).eq(most == 0).all()
        assert matrix.abs()[group.clamp_min(0), torch.arange(16)].eq(most).all()
        assert name not in ("average_pool", "vq_token", "pru_merge") or (group >= 0).all()
    assert pruned.after == 8
    assert torch.isfinite(model(**pruned.batch).logits).all()


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_counts_are_exact(name):
    layout, inputs = vision_language_model(llava()), batch()
    for count in range(1, 17):
        pruned = prune(layout, inputs, EXACT[name](f"{count} tokens"))
        assert [len(kept) for kept in pruned.kept] == [count, count]
        assert int((pruned.batch["input_ids"] == 98).sum()) == 2 * count


@pytest.mark.parametrize("name", COARSER)
@torch.no_grad()
def test_coarser_grids_take_the_next_smaller_shape(name):
    layout, inputs = vision_language_model(llava()), batch()
    for count, made in ((1, 1), (4, 4), (5, 4), (8, 8), (11, 9), (15, 12)):
        pruned = prune(layout, inputs, COARSER[name](f"{count} tokens"))
        assert [len(kept) for kept in pruned.kept] == [made, made]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_keeping_all_is_the_plain_call_to_the_bit(name):
    model, inputs = llava(), batch()
    plain = model(**inputs).logits
    with tw.reduce(model, ALL[name](1.0)):
        assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
@torch.no_grad()
def test_no_tap_where_no_attention_is_read(name, monkeypatch):
    def refuse(*_):
        raise AssertionError("the attention is tapped")

    monkeypatch.setattr(vision_language, "listen", refuse)
    model = llava()
    prune(vision_language_model(model), batch(), ALL[name](0.5))
    assert not model.model.multi_modal_projector._forward_pre_hooks


@pytest.mark.parametrize("name", [name for name in ALL if name != "hi_red"])
def test_newlines_of_tiles_stay_and_count(name):
    method = ALL[name](0.5)
    image = a_tiled_image(method)
    change = method.select(image, 30)
    kept = change.kept[0]
    assert len(kept) == 30 if name in EXACT else 15 < len(kept) <= 30
    assert (kept.diff() > 0).all()
    newlines = (~image.patch).nonzero()[:, 0]
    assert set(newlines.tolist()) <= set(kept.tolist())
    rows = change.apply(image.features.unsqueeze(0), torch.ones(1, len(image.patch)))[0]
    assert torch.equal(rows[torch.isin(kept, newlines)], image.features[newlines])
    matrix = change.matrix(torch.ones(1, len(image.patch)))[0]
    assert matrix[~torch.isin(kept, newlines)][:, newlines].abs().sum() == 0
    if name in ("vision_zip", "hi_prune"):  # 24 patches on five tiles
        assert image.tile[kept[image.patch[kept]]].bincount().tolist() == [5, 5, 5, 5, 4]
    with pytest.raises(InputError, match="leave no patch"):
        method.select(image, 6)


def test_tiles_are_rectangles():
    assert [grid for _, grid in rectangles(a_tiled_image(tw.DivPrune()))] == [(4, 4), (3, 4), (3, 4), (3, 4), (3, 4)]
    with pytest.raises(InputError, match="no grid that is known"):
        tw.AveragePool().select(EncodedImage(torch.ones(7, 2), {}, torch.ones(7, dtype=torch.bool)), 3)


def test_vision_zip_official():
    golden, method = GOLDEN["vision_zip"], tw.VisionZip(contextual=4 / 13)
    attention = values(1, 3, 37, 37, salt=0.317).mul(2).softmax(-1)[0, :, 0, 1:].sum(0)
    features, keys = values(37, 8, salt=0.913)[1:], values(37, 6, salt=0.457)[1:]
    image = an_image(method, features, attention, keys)
    change = method.select(image, golden["dominant"] + golden["contextual"])
    rows = change.apply(features.unsqueeze(0), torch.ones(1, 36))[0]
    # Theirs are the dominant ones in order, then the merged ones in order.
    alone = change.matrix(torch.ones(1, 36))[0].count_nonzero(1) == 1
    torch.testing.assert_close(
        torch.cat([rows[alone], rows[~alone]]), torch.tensor(golden["rows"]), atol=2e-6, rtol=1e-5
    )


def test_vision_zip_doubles_equal_patches_unless_it_averages():
    for average, length in ((False, 2.0), (True, 1.0)):
        method = tw.VisionZip(contextual=0.25, average=average)
        features = torch.ones(16, 4)
        image = an_image(method, features, torch.arange(16.0), torch.ones(16, 3))
        rows = method.select(image, 8).apply(features.unsqueeze(0), torch.ones(1, 16))[0]
        assert rows[:, 0].sort().values.tolist() == [1.0] * 7 + [length]  # the second target is assigned nothing


@pytest.mark.parametrize("method", [tw.PruMerge(), tw.PruMergePlus()])
def test_pru_merge_official(method):
    name = "token_prune_merge_advanced" + ("_plus" if isinstance(method, tw.PruMergePlus) else "")
    golden = torch.tensor(GOLDEN["pru_merge"][name])
    query, keys = values(65, 8, salt=0.217), values(65, 8, salt=0.457) * 3
    features = values(65, 8, salt=0.913)[1:]
    attention = (query[0] @ keys.T * 8**-0.5).softmax(0)[1:]
    image = an_image(method, features, attention, keys[1:])
    assert method.counts_of([image]) == [len(golden)]
    change = method.select(image, len(golden))
    rows = change.apply(features.unsqueeze(0), torch.ones(1, 64))[0]
    # Theirs come in another order, the sum of the rest last.
    nearest = torch.cdist(golden, rows).argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(golden)))
    torch.testing.assert_close(rows[nearest], golden, atol=2e-6, rtol=1e-5)
    assert change.matrix(torch.ones(1, 64))[0, nearest[-1]].max() < 1


def test_pru_merge_reads_one_head_of_the_whole_width():
    model, inputs = llava(), batch()
    method = tw.PruMerge()
    [row, keys] = method.signals()
    seen = {}
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        images = vision_language_model(model).encode(inputs, method.signals()).images
    expected = (seen["q_proj"][:, :1] @ seen["k_proj"].transpose(1, 2) * 32**-0.5).softmax(-1)[:, 0, 1:]
    for index, image in enumerate(images):
        torch.testing.assert_close(image.signals[row], expected[index])
        torch.testing.assert_close(image.signals[keys], seen["k_proj"][index, 1:])


def test_pru_merge_keeps_one_where_no_attention_stands_out():
    assert outliers(torch.full((9,), 0.1)).tolist() == [True] + [False] * 8
    assert outliers(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 9, 7])).nonzero()[:, 0].tolist() == [7, 8]
    method = tw.PruMerge()
    image = an_image(method, torch.randn(9, 4), torch.full((9,), 0.1), torch.randn(9, 4))
    assert method.counts_of([image]) == [2]
    assert len(method.select(image, 2).kept[0]) == 2


@pytest.mark.parametrize("case", GOLDEN["hi_prune"]["cases"], ids=str)
def test_hi_prune_official(case):
    middle, late = values(577, salt=0.731).abs()[1:], values(577, salt=0.317).abs()[1:]
    found = anchors_and_registers(middle, late, case["count"], case["alpha"], 24)
    assert found.tolist() == case["kept"]


def test_hi_prune_never_keeps_more_than_its_budget():
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 36):
        middle, late = torch.rand(2, 36, generator=generator)
        for alpha in (0.0, 0.5, 1.0):
            found = anchors_and_registers(middle, late, count, alpha, 6)
            assert len(set(found.tolist())) == count
            assert alpha or torch.equal(found, late.topk(count).indices.sort().values)


@pytest.mark.parametrize("case", GOLDEN["hi_red"]["cases"], ids=str)
def test_hi_red_official(case):
    method = tw.HiRED(alpha=case["alpha"])
    early = values(4, 2, 1, 36, salt=0.317).mul(2).softmax(-1).mean(1).flatten()
    late = values(4, 2, 1, 36, salt=0.913).mul(2).softmax(-1).mean(1).flatten()
    tile = torch.arange(144) // 36
    image = an_image(method, torch.zeros(144, 2), late, early, tile=tile, tile_grid=(3, 1))
    count = int(144 * case["keep"])
    kept = method.select(image, count).kept[0]
    assert len(kept) == count
    official = torch.tensor(case["kept"])
    # Theirs loses what flooring leaves: at most one patch less for each tile, and none for the overview.
    assert set(official.tolist()) <= set(kept.tolist())
    lost = tile[kept].bincount(minlength=4) - tile[official].bincount(minlength=4)
    assert lost[0] == 0
    assert lost.max() <= 1


def test_hi_red_regions_are_two_dimensional():
    early = torch.zeros(6, 6)
    early[:2, 3:] = 1  # above to the right
    early[5, 0] = 1  # below to the left
    budgets = tile_budgets(early.flatten(), [36] * 5, (2, 2), 14, 1 - 7 / 36)
    assert budgets == [11, 0, 3, 0, 0]
    assert tile_budgets(early.flatten(), [36, 6, 6, 6, 6], (2, 2), 44, 29 / 36) == [35, 1, 6, 1, 1]
    assert tile_budgets(early.flatten(), [36, 6, 6, 6, 6], (2, 2), 60, 0.5) == [36, 6, 6, 6, 6]
    assert tile_budgets(early.flatten(), [36, 1, 1, 1, 1], (2, 2), 30, 0.5) == [26, 1, 1, 1, 1]


def test_hi_red_drops_newlines_and_wants_to_know_where_tiles_lie():
    method = tw.HiRED(keep=0.5)
    image = a_tiled_image(method)
    assert method.counts_of([image]) == [35]
    assert tw.HiRED(keep="68 tokens").counts_of([image]) == [64]
    kept = method.select(image, 35).kept[0]
    assert len(kept) == 35
    assert image.patch[kept].all()
    image.tile_grid = None
    with pytest.raises(InputError, match="where the 4 tiles of an image lie"):
        method.select(image, 35)


def test_hi_red_on_one_tile_is_faster_vlm():
    layout, inputs = vision_language_model(llava()), batch()
    with torch.no_grad():
        found = [prune(layout, inputs, method).kept for method in (tw.HiRED(keep=0.3), tw.FasterVLM(keep=0.3))]
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_to_dre_by_its_definition():
    method = tw.ToDRE()
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = an_image(method, features, torch.arange(20).sub(13).abs().neg().float())
    unit = features / features.norm(dim=1, keepdim=True)
    chosen = [13]
    while len(chosen) < 6:
        chosen.append(min(set(range(20)) - set(chosen), key=lambda one: float((unit[chosen] @ unit[one]).sum())))
    assert method.select(image, 6).kept[0].tolist() == sorted(chosen)
    tiled = a_tiled_image(method)
    [signal] = method.signals()
    tiled.signals[signal][40] = 9
    assert method.select(tiled, 7).kept[0, 0] == tiled.signals[signal][:16].argmax()


def test_zoo_prune_by_its_definition():
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    inputs = torch.randn(20, 6) * 2
    features = projector(inputs).detach()
    method = tw.ZooPrune(directions=500)
    image = an_image(method, features, inputs, projector=projector)
    size = torch.stack([torch.autograd.functional.jacobian(projector, row) for row in inputs])
    moves = torch.randn(20000, 6, generator=torch.Generator().manual_seed(1))
    moves = moves / moves.norm(dim=1, keepdim=True)
    found = torch.einsum("toc,mc->tmo", size, moves).norm(dim=2).mean(1)
    weights = (found - found.min()) / (found.max() - found.min())
    unit = features / features.norm(dim=1, keepdim=True)
    chosen = [int(weights.argmax())]
    while len(chosen) < 4:
        score = weights * (1 - (unit @ unit[chosen].T).max(1).values)
        chosen.append(int(score.index_fill(0, torch.tensor(chosen), -1).argmax()))
    assert method.select(image, 4).kept[0].tolist() == sorted(chosen)


def test_zoo_prune_with_a_linear_projector_is_div_prune():
    torch.manual_seed(0)
    projector, inputs = torch.nn.Linear(6, 8), torch.randn(30, 6)
    method = tw.ZooPrune(directions=4)
    image = an_image(method, projector(inputs).detach(), inputs, projector=projector)
    assert torch.equal(method.select(image, 9).kept, tw.DivPrune().select(image, 9).kept)


def test_zoo_prune_moves_short_types_in_single_precision():
    torch.manual_seed(0)
    projector = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)).bfloat16()
    inputs = (torch.randn(30, 6) * 8).bfloat16()
    kept = []
    for dtype in (torch.bfloat16, torch.float32):
        method = tw.ZooPrune(directions=16, step=1e-3)
        image = an_image(method, projector(inputs).detach().float(), inputs.to(dtype), projector=projector)
        kept.append(method.select(image, 8).kept)
    assert torch.equal(*kept)
    assert projector[0].weight.dtype == torch.bfloat16


def test_fourier_keeps_a_constant_picture_and_low_waves():
    method = tw.FourierVLM()
    place = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    wave = torch.cos(torch.pi * place).unsqueeze(1).expand(6, 6).reshape(36, 1)
    features = torch.cat([torch.full_like(wave, 3.0), wave], dim=1)
    image = EncodedImage(features, {}, torch.ones(36, dtype=torch.bool), (6, 6))
    rows = method.select(image, 9).apply(features.unsqueeze(0), torch.ones(1, 36))[0]
    coarse = torch.cos(torch.pi * (torch.arange(3) + 0.5) / 3).double().repeat_interleave(3)
    torch.testing.assert_close(rows[:, 0], torch.full((9,), 3.0).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[:, 1], coarse, atol=1e-6, rtol=0)


def test_average_pool_of_the_features_is_pytorch_s():
    model, inputs = llava(), batch()
    layout = vision_language_model(model)
    with torch.no_grad():
        features = layout.encode(inputs).images[1].features
        found = prune(layout, inputs, tw.AveragePool(keep="9 tokens")).batch["mm_encoder_outputs"]["image"]
    grid = features.T.reshape(1, -1, 4, 4)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, 3).flatten(2)[0].T
    torch.testing.assert_close(found.pooler_output[1], expected)


def test_token_flex_draws_budgets_in_training_only():
    model, inputs = llava(), batch()
    layout, method = vision_language_model(model), tw.TokenFlex(keep="1 tokens", training=("4 tokens", "9 tokens"))
    torch.manual_seed(0)
    drawn = {tuple(len(kept) for kept in prune(layout, inputs, method).kept) for _ in range(12)}
    assert drawn == {(4, 4), (9, 9)}
    with torch.no_grad():
        assert [len(kept) for kept in prune(layout, inputs, method).kept] == [1, 1]


@pytest.mark.parametrize("name", ["vision_zip", "pru_merge", "fourier_vlm", "token_flex", "vq_token"])
def test_gradients_pass_through_merged_rows(name):
    model, inputs = llava(), batch()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)
    with tw.reduce(model, ALL[name](0.5)):
        model(**inputs, labels=labels).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["div_prune", "vision_zip", "zoo_prune", "average_pool", "random"])
@torch.no_grad()
def test_a_class_token_that_is_passed_on_stays(name):
    model, inputs = llava(), batch()
    model.config.vision_feature_select_strategy = "full"
    ids = torch.cat([inputs["input_ids"][:, :5], torch.full((2, 1), 98), inputs["input_ids"][:, 5:]], dim=1)
    method = {**ALL, "random": lambda keep: tw.reduction.Random(keep=keep)}[name]("5 tokens")
    pruned = prune(vision_language_model(model), {"input_ids": ids, "pixel_values": inputs["pixel_values"]}, method)
    plain = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    for kept, rows, whole in zip(
        pruned.kept, pruned.batch["mm_encoder_outputs"]["image"].pooler_output, plain, strict=True
    ):
        assert kept[0] == 0
        assert len(kept) == 5
        torch.testing.assert_close(rows[0], whole[0])


def test_what_a_model_lacks_is_refused_before_it_runs(monkeypatch):
    model = llava()
    layout = type(vision_language_model(model))
    monkeypatch.setattr(layout, "projector", lambda _: None)
    with pytest.raises(InputError, match="no projector that reads each patch by itself"):
        tw.reduce(model, tw.ZooPrune())
    with torch.no_grad():  # without one, what is mixed are the features
        method, inputs = tw.AveragePool(keep=0.25), batch()
        flex = prune(layout(model), inputs, tw.TokenFlex(keep=0.25)).batch["mm_encoder_outputs"]["image"]
        pool = prune(layout(model), inputs, method).batch["mm_encoder_outputs"]["image"]
    assert torch.equal(flex.pooler_output[0], pool.pooler_output[0])
    monkeypatch.setattr(layout, "has_class_token", lambda _: False)
    for name in ("vision_zip", "pru_merge", "hi_red", "to_dre"):
        with pytest.raises(InputError, match="no class token"):
            tw.reduce(model, ALL[name](0.5))
