"""DiffRate: the official merge, drops that equal hiding, and rates that learn."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

import tokenwise as tw
from small_models import pictures, spread, vision
from tokenwise.errors import InputError
from tokenwise.models.encoders import find_encoder
from tokenwise.models.tap import AttentionCall
from tokenwise.reduction import LayerTokens, Plan, learn_rates, shape_of
from tokenwise.reduction.rate_learning import RateLearning

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/diffrate.json").read_text())
PLAN = Plan.dropping_and_merging("diff_rate", 65, 1, [65, 50, 30, 20], [65, 40, 25, 20])


def test_merging_is_the_official_one():
    case = GOLDEN["merge"]
    hidden = torch.tensor(case["x"])
    batch, tokens, _ = hidden.shape

    class Call(AttentionCall):
        """Attention that falls with the index, so that the order is the given one."""

        def rows(self, positions):
            return torch.linspace(1, 0, tokens).expand(batch, 1, 1, tokens)

    call = Call(None, hidden, hidden, hidden, None, 1.0)
    plan = Plan(allocator="mine", tokens=tokens, prefix=1, counts=(case["kept"],), dropped_to=(tokens,))
    size = torch.full((batch, tokens), 2.0)
    layer = LayerTokens(hidden, size, 0, 1, 1, True, torch.arange(tokens).expand(batch, -1), call)
    change = tw.DiffRate(plan=plan).reduce(layer, case["kept"])
    assert torch.allclose(change.apply(hidden, size), torch.tensor(case["merged"]), atol=1e-6)
    similarity = torch.tensor(case["similarity"])
    assert (similarity > 0).all()
    # All sizes were 2; each merged one adds its own, times its similarity.
    expected = torch.full((batch,), 2.0 * case["kept"]) + 2 * similarity.sum(1)
    assert torch.allclose(change.new_size(size).sum(1), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "deit", "clip", "dinov2_registers"])
@pytest.mark.parametrize("plan", [None, PLAN])
def test_the_fast_way_equals_the_masked_one(kind, plan):
    model, images = vision(kind), pictures()
    if plan is not None:
        shape = shape_of(model, {"pixel_values": images})
        plan = Plan.dropping_and_merging("diff_rate", shape.tokens, shape.prefix, PLAN.dropped_to, PLAN.counts)
    method = tw.DiffRate(keep=0.6, plan=plan)
    with torch.no_grad():
        with tw.reduce(model, method) as handle:
            fast = model(pixel_values=images).last_hidden_state
            positions = handle.last.positions
            assert handle.stats["mean_share"] <= 0.65
            if plan is not None:
                assert handle.last.layers == list(plan.counts)
        with tw.reduce(model, method, masked=True):
            slow = model(pixel_values=images).last_hidden_state
    assert torch.allclose(fast, slow.gather(1, positions.unsqueeze(2).expand_as(fast)), atol=2e-5)


def test_hidden_keys_get_the_official_gradient():
    case = GOLDEN["policy"]
    scores, value = torch.tensor(case["scores"])[:, :, :1], torch.tensor(case["value"])
    shown = torch.tensor(case["mask"], requires_grad=True)
    bias = (shown + 1e-9).log()[:, None, None]
    output = (scores + bias).softmax(-1) @ value
    assert torch.allclose(output[0, :, 0], torch.tensor(case["output"]), atol=1e-5)
    (output**2).sum().backward()
    # The class token's own is always 1, whatever the rates.
    expected = torch.tensor(case["mask_gradient"])
    assert torch.allclose(shown.grad[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)


def learning(model, images, dense=()):
    """A learner whose rates differ, without a tie; `dense` are those (0 drop, 1 merge) that take nothing out."""
    learner = RateLearning(find_encoder(model), shape_of(model, {"pixel_values": images}), granularity=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for theta in learner.theta:
            theta.copy_(torch.randn(theta.shape, generator=generator))
            for place in dense:
                theta[place, 0] = 40.0
    return learner


def test_learning_computes_what_the_plan_will():
    model, images = vision("vit"), pictures()
    with learning(model, images, dense=[1]) as learner, torch.no_grad():
        hidden = model(pixel_values=images).last_hidden_state
        plan = learner.plan_of_rates()
        share = float(learner.macs_share)
    assert plan.counts == plan.dropped_to
    assert plan.counts[0] == 65 > plan.counts[1]
    with tw.reduce(model, tw.DiffRate(plan=plan)) as handle, torch.no_grad():
        reduced = model(pixel_values=images).last_hidden_state
    assert torch.allclose(reduced, hidden.gather(1, handle.last.positions.unsqueeze(2).expand_as(reduced)), atol=2e-5)
    assert handle.stats["macs_share"] == pytest.approx(share)


def test_counts_in_learning_are_those_of_the_plan_when_merging():
    model, images = vision("vit"), pictures()
    with learning(model, images, dense=[0]) as learner, torch.no_grad():
        model(pixel_values=images)
        plan, share = learner.plan_of_rates(), float(learner.macs_share)
        assert learner._shown[0].sum() == plan.counts[-1]
    with tw.reduce(model, tw.DiffRate(plan=plan)) as handle, torch.no_grad():
        model(pixel_values=images)
    assert handle.last.layers == list(plan.counts)
    assert handle.stats["macs_share"] == pytest.approx(share)


def test_every_rate_has_a_gradient_of_both_terms():
    model, images = vision("vit"), pictures()
    dense = model(pixel_values=images).last_hidden_state.detach()
    learner = RateLearning(find_encoder(model), shape_of(model, {"pixel_values": images}), granularity=4)
    with learner:
        hidden = model(pixel_values=images).last_hidden_state
        fewer = torch.autograd.grad(learner.macs_share, learner.theta, retain_graph=True)
        # Larger counts are the first candidates: they cost most.
        assert all((g[:, 0] > 0).all() and (g[:, -1] < 0).all() for g in fewer)
        task = torch.autograd.grad(hidden[:, 0].square().sum(), learner.theta, allow_unused=True)
        assert task[0] is not None
        assert task[0].abs().sum() > 0
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense)


def test_rates_learn_towards_a_share_of_the_operations():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
        num_labels=3,
    )
    model = spread(transformers.ViTForImageClassification(config))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [{"pixel_values": pictures(4, seed), "labels": torch.arange(4) % 3} for seed in range(40)]
    for target in (0.5, 0.75):
        plan = learn_rates(model, batches, target, learning_rate=0.1)
        shape = shape_of(model, batches[0])
        share = shape.macs([65, *plan.counts[:-1]], plan.counts) / shape.macs([65] * 4, [65] * 4)
        assert share == pytest.approx(target, abs=0.06)
        with tw.reduce(model, tw.DiffRate(plan=plan)) as handle, torch.no_grad():
            model(**batches[0])
        assert handle.stats["macs_share"] == pytest.approx(share)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert functional.cross_entropy(model(batches[0]["pixel_values"]).logits, batches[0]["labels"]).requires_grad


def test_bad_input_is_refused():
    model = vision("vit")
    batch = {"pixel_values": pictures()}
    with pytest.raises(InputError, match=r"flops: 1\.5 is no share"):
        learn_rates(model, [batch], 1.5)
    with pytest.raises(InputError, match="batches: are empty"):
        learn_rates(model, [], 0.5)
    with pytest.raises(InputError, match="loss: is not given by the model"):
        learn_rates(model, [batch], 0.5)
    with pytest.raises(InputError, match="no class token"):
        learn_rates(vision("siglip"), [batch], 0.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
