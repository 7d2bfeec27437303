"""Plans: JSON and back, refused where they do not fit, made by rules, by entropy and by search."""

import json

import pytest
import torch

import tokenwise as tw
from small_models import pictures, vision
from tokenwise.errors import InputError
from tokenwise.models.encoders import find_encoder
from tokenwise.policies.plans import Shape
from tokenwise.reduction import Plan, allocate, allocate_by_entropy, allocate_by_search, shape_of

DEIT_SMALL = {
    "dropped_to": [197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3],
    "merged_to": [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3],
}
"""The published rates of DiffRate for DeiT-S at 2.3 GFLOPs."""


def run(model, images, method):
    with tw.reduce(model, method) as handle, torch.no_grad():
        hidden = model(pixel_values=images).last_hidden_state
    return hidden, handle


def test_json_and_back(tmp_path):
    plan = Plan.dropping_and_merging("diff_rate", 197, 1, **DEIT_SMALL)
    assert list(plan.counts) == DEIT_SMALL["merged_to"]
    assert list(plan.dropped_to) == DEIT_SMALL["dropped_to"]
    plan.save(tmp_path / "deit-s.json")
    assert Plan.load(tmp_path / "deit-s.json") == plan
    stored = json.loads((tmp_path / "deit-s.json").read_text())
    assert stored["tokens"] == 197
    assert "thresholds" not in stored
    shape = Shape(197, 12, 1, 384, 1536)
    before = [197, *plan.counts[:-1]]
    # Beside the blocks the paper's 2.3 GFLOPs hold the patches' and the classifier's.
    assert shape.macs(before, plan.counts) + 197 * 384 * 768 + 384 * 1000 == pytest.approx(2.3e9, abs=0.05e9)


def test_rates_that_rise_keep_what_is_there():
    plan = Plan.dropping_and_merging("diff_rate", 20, 1, [20, 15, 18], [16, 12, 14])
    assert plan.dropped_to == (20, 15, 12)
    assert plan.counts == (16, 12, 12)


@pytest.mark.parametrize("name", ["tome", "random_drop", "evit"])
def test_methods_follow_a_plan(name, tmp_path):
    model, images = vision("vit"), pictures()
    plan = Plan(allocator="mine", tokens=65, prefix=1, counts=(65, 50, 50, 30))
    plan.save(tmp_path / "plan.json")
    methods = {"tome": tw.ToMe, "random_drop": tw.RandomDrop, "evit": tw.EViT}
    method = methods[name](plan=tmp_path / "plan.json")
    hidden, handle = run(model, images, method)
    assert handle.last.layers == [65, 50, 50, 30]
    assert hidden.shape[1] == 30
    again, _ = run(model, images, methods[name](**json.loads(json.dumps(method.config()))))
    assert torch.equal(again, hidden)


def test_a_plan_that_does_not_fit_is_refused(tmp_path):
    model, images = vision("vit"), pictures()
    with pytest.raises(InputError, match="made for 50 tokens, 1 of them protected, in 2 blocks; here are 65"):
        run(model, images, tw.ToMe(plan=Plan(allocator="mine", tokens=50, prefix=1, counts=(40, 30))))
    halved = Plan(allocator="mine", tokens=65, prefix=1, counts=(20, 20, 20, 20))
    with pytest.raises(InputError, match="takes 45 of 65 tokens out of block 0, where at most half"):
        run(model, images, tw.ToMe(plan=halved))
    run(model, images, tw.RandomDrop(plan=halved))
    with pytest.raises(InputError, match=r"ToMe\.plan: .*does not exist"):
        tw.ToMe(plan=tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text('{"counts": [3]}')
    with pytest.raises(InputError, match=r"is no plan: .*Plan\.save"):
        Plan.load(tmp_path / "other.json")
    for fields, message in [
        ({"counts": (5, 6)}, "rising counts in block 1"),
        ({"counts": (5, 1)}, "leaves no token beside"),
        ({"counts": (5, 4), "thresholds": (0.5,)}, "1 thresholds for 2 blocks"),
        ({"counts": (5, 4), "dropped_to": (6, 6)}, "rising counts in block 1: 5, 6, 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan(allocator="mine", tokens=8, prefix=1, **fields)


@pytest.mark.parametrize("rule", ["constant", "linear", "shifted_cosine"])
@pytest.mark.parametrize("keep", [0.6, "30 tokens", "0.7 flops"])
def test_rules_meet_the_budget(rule, keep):
    shape = Shape(65, 12, 1, 32, 64)
    plan = allocate(shape, keep, rule)
    before = [65, *plan.counts[:-1]]
    found = {
        0.6: sum(plan.counts) / (65 * 12),
        "30 tokens": plan.counts[-1],
        "0.7 flops": shape.macs(before, plan.counts) / shape.macs([65] * 12, [65] * 12),
    }[keep]
    budget = float(str(keep).split()[0])
    assert 0.95 * budget <= found <= budget
    assert allocate(shape, 1.0, rule).counts == (65,) * 12
    with pytest.raises(InputError, match=r"keep: 1\.5"):
        allocate(shape, 1.5, rule)
    with pytest.raises(InputError, match="'cosine' is not known"):
        allocate(shape, 0.5, "cosine")


def test_entropy_of_attention_spreads_the_budget():
    model, images = vision("vit"), pictures(4)
    with torch.no_grad():
        # No query means uniform attention: of the first block nothing should go.
        model.layers[0].attention.q_proj.weight.zero_()
        model.layers[0].attention.q_proj.bias.zero_()
    dense = model(pixel_values=images).last_hidden_state
    plan = allocate_by_entropy(model, [{"pixel_values": images[:2]}, {"pixel_values": images[2:]}], 0.7)
    assert plan.counts[0] == 65 > plan.counts[1]
    assert 0.66 < sum(plan.counts) / (65 * 4) <= 0.7
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_search_comes_closer_to_the_dense_state(kind):
    model = vision(kind)
    batches = [{"pixel_values": pictures(2, seed)} for seed in range(2)]
    shape = shape_of(model, batches[0])
    even = allocate(shape, 0.6, halving=True)
    plan, found = allocate_by_search(model, tw.ToMe(), batches, 0.6, rounds=1)
    start, first = allocate_by_search(model, tw.ToMe(), batches, 0.6, rounds=0)
    assert start.counts == even.counts
    assert 0 < found < first
    assert sum(plan.counts) <= 0.6 * 4 * shape.tokens
    assert allocate_by_search(model, tw.ToMe(), batches, 0.6, rounds=1) == (plan, found)
    # The distance is what it says.
    states = []
    last = find_encoder(model).blocks[-1].module
    handle = last.register_forward_hook(lambda module, args, output: states.append(output))
    parts = []
    for batch in batches:
        with torch.no_grad():
            model(**batch)
        handle.remove()
        with tw.reduce(model, tw.ToMe(plan=plan)), torch.no_grad():
            handle = last.register_forward_hook(lambda module, args, output: states.append(output))
            model(**batch)
        dense, reduced = (s[:, 0] if kind == "vit" else s.mean(1) for s in states[-2:])
        parts.append(((reduced - dense) ** 2).sum(1) / (dense**2).sum(1))
    assert found == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)
    handle.remove()
