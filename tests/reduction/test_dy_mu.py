"""DyMU: the official merges and thresholds, ragged batches that equal single images and the masked model."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import tokenwise as tw
from small_models import pictures, spread, vision
from tokenwise.errors import InputError
from tokenwise.models.tap import AttentionCall
from tokenwise.policies.matching import merge_marked
from tokenwise.reduction import LayerTokens, Merge, Plan, allocate, calibrate_thresholds, shape_of
from tokenwise.reduction.dy_mu import _Calibration

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dymu.json").read_text())


def mixed():
    """Pictures of which some say less than others: the second is half flat, the third almost."""
    images = pictures(3)
    images[1, :, 16:] = 0.1
    images[2, :, 4:] = 0.3
    return images


def calibrated(model, keep=0.6):
    batches = [{"pixel_values": torch.cat([pictures(3, seed), mixed()])} for seed in (5, 6)]
    plan = allocate(shape_of(model, batches[0]), keep, halving=True)
    return calibrate_thresholds(model, batches, plan)


def layer_of(hidden):
    call = AttentionCall(None, hidden[:, None], hidden[:, None], hidden[:, None], None, 1.0)
    batch, tokens, _ = hidden.shape
    return LayerTokens(
        hidden, torch.ones(batch, tokens), 0, 1, 1, True, torch.arange(tokens).expand(batch, -1), attention=call
    )


def rows(change, hidden):
    size = torch.ones(hidden.shape[:2])
    values, sizes = change.apply(hidden, size), change.new_size(size)
    empty = sizes == 0
    return [
        sorted([*value.tolist(), int(own)] for value, own, gone in zip(*row, strict=True) if not gone)
        for row in zip(values, sizes, empty, strict=True)
    ]


def assert_same_rows(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for one, other in zip(found, expected, strict=True):
        # The official means have 1e-4 in their denominators.
        assert torch.allclose(torch.tensor(one), torch.tensor(other, dtype=torch.float), atol=5e-4)


def test_merges_and_threshold_are_the_official_ones():
    hidden = torch.tensor(GOLDEN["x"])
    plan = Plan(allocator="mine", tokens=11, prefix=1, counts=(11 - GOLDEN["r"],), thresholds=(GOLDEN["above"],))
    change = tw.DyMU(plan=plan).reduce(layer_of(hidden), 0)
    assert_same_rows(rows(change, hidden), GOLDEN["merged"])
    calibration = _Calibration(plan=plan)
    assert_same_rows(rows(calibration.reduce(layer_of(hidden), 0), hidden), GOLDEN["calibrating"])
    assert calibration._found == {0: [pytest.approx(GOLDEN["threshold"])]}


def test_a_ragged_merge_equals_its_matrix():
    torch.manual_seed(0)
    going = torch.tensor([[0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    absent = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    partner = torch.tensor([[0, 0, 3, 0, 3, 0, 0]] * 2)
    kept, target, empty = merge_marked(going, partner, absent)
    assert kept[0].tolist() == [0, 1, 3, 5, 6]
    assert target.tolist() == [[0, 1, 2, 2, 2, 3, 4], [0, 1, 2, 3, 4, -1, -1]]
    assert empty.sum() == 0
    kept, target, empty = merge_marked(going, partner)
    assert empty.tolist() == [[False] * 5 + [True] * 2, [False] * 7]
    change = Merge(kept, target, fills=True)
    values, size = torch.randn(2, 7, 3, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64) + 0.5
    expected = change.matrix(size) @ values
    assert torch.allclose(change.apply(values, size), expected)
    assert torch.equal(change.new_size(size) == 0, empty)
    assert torch.allclose(change.new_size(size).sum(1), size.sum(1))
    values.requires_grad_()
    change.apply(values, size)[~empty].sum().backward()
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("kind", ["vit", "clip", "dinov2_registers"])
@torch.no_grad()
def test_a_ragged_batch_equals_single_images_and_the_masked_model(kind):
    model, images = vision(kind), mixed()
    dense = model(pixel_values=images).last_hidden_state
    method = tw.DyMU(plan=calibrated(model))
    with tw.reduce(model, method) as handle:
        fast = model(pixel_values=images).last_hidden_state
        last = handle.last
        empty = last.empty
        kept = (~empty).sum(1)
        assert len(set(kept.tolist())) > 1
        assert handle.stats["tokens_after"] == kept.max()
        assert torch.allclose(last.size.sum(1), torch.full((3,), float(dense.shape[1])))
        assert (last.size[empty] == 0).all()
        for image in range(3):
            single = model(pixel_values=images[image : image + 1]).last_hidden_state
            assert single.shape[1] == kept[image]
            assert torch.allclose(fast[image, : kept[image]], single[0], atol=1e-5)
    with tw.reduce(model, method, masked=True):
        slow = model(pixel_values=images).last_hidden_state
    expected = slow.gather(1, last.positions.unsqueeze(2).expand_as(fast))
    assert torch.allclose(fast[~empty], expected[~empty], atol=2e-5)
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense)


@torch.no_grad()
def test_a_classifier_may_read_the_class_token_of_a_ragged_batch_but_not_its_mean():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    images = mixed()
    for kind, reads_mean in (("ViT", False), ("Dinov2", True)):
        config = getattr(transformers, f"{kind}Config")(**options)
        model = spread(getattr(transformers, f"{kind}ForImageClassification")(config))
        with tw.reduce(model, tw.DyMU(plan=calibrated(model))) as handle:
            together = model(images).logits
            empty = handle.last.empty
            alone = torch.cat([model(image[None]).logits for image in images])
        assert torch.isfinite(alone).all()
        assert empty.any()
        assert not empty.all(1).any()
        assert torch.equal(together.isnan().any(1), empty.any(1) if reads_mean else torch.zeros(3, dtype=torch.bool))
        finite = together.isfinite()
        assert torch.allclose(together[finite], alone[finite], atol=1e-5)


@torch.no_grad()
def test_thresholds_leave_about_what_the_plan_said(tmp_path):
    model = vision("vit")
    plan = calibrated(model, 0.7)
    assert all(0 <= threshold < 1 for threshold in plan.thresholds)
    plan.save(tmp_path / "plan.json")
    method = tw.DyMU(plan=tmp_path / "plan.json")
    assert method.plan == plan
    shares = []
    with tw.reduce(model, method) as handle:
        for image in torch.cat([pictures(3, 5), mixed()]):
            model(pixel_values=image[None])
            shares.append(handle.stats["mean_share"])
    assert sum(shares) / 6 == pytest.approx(0.7, abs=0.1)
    assert max(shares) - min(shares) > 0.05


@torch.no_grad()
def test_thresholds_of_one_are_dense_to_the_bit():
    model, images = vision("siglip"), pictures()
    images[1] = 0.0  # all alike
    dense = model(pixel_values=images).last_hidden_state
    plan = Plan(allocator="mine", tokens=64, counts=(50, 50, 40, 40), thresholds=(1.0,) * 4)
    with tw.reduce(model, tw.DyMU(plan=plan)) as handle:
        assert torch.equal(model(pixel_values=images).last_hidden_state, dense)
    assert handle.last.layers == [64] * 4


def test_bad_input_is_refused():
    model = vision("siglip")
    plan = allocate(shape_of(model, {"pixel_values": pictures()}), 0.6, halving=True)
    with pytest.raises(InputError, match=r"DyMU\.plan: .*has no thresholds"):
        tw.DyMU(plan=plan)
    with pytest.raises(InputError, match=r"DyMU\.plan: is missing"):
        tw.DyMU()
    with pytest.raises(InputError, match="batches: are empty"):
        calibrate_thresholds(model, [], plan)
    method = tw.DyMU(plan=calibrated(model))
    with pytest.raises(InputError, match="Pass one image at a time"), tw.reduce(model, method):
        model(pixel_values=mixed())
    with tw.reduce(model, method) as handle:
        model(pixel_values=mixed()[:1])
    assert handle.last.empty is None
    assert handle.last.layers[-1] < 64
