"""rank_stability and the attack: what they report is what happens, at both sites."""

import pytest
import torch
import transformers

import tokenwise as tw
from small_models import llava, pictures, spread
from tokenwise.errors import InputError
from tokenwise.policies.agreement import jaccard
from tokenwise.reduction.robustness import rank_gap
from tokenwise.signals.attention import Shown, attention_columns, attention_rows, with_gradient


def classifier():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        num_labels=5,
    )
    return spread(transformers.ViTForImageClassification(config))


def questions(count=2):
    ids = torch.randint(1, 90, (count, 22), generator=torch.Generator().manual_seed(1))
    ids[:, 3:19] = 98
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures(count)}


def answered(model, batch):
    """The batch with labels: what the model itself says last."""
    with torch.no_grad():
        likeliest = model(**batch).logits[:, -2].argmax(1)
    batch["input_ids"][:, -1] = likeliest
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = likeliest
    return {**batch, "labels": labels}


@pytest.mark.parametrize("method", [tw.FasterVLM(keep=0.25), tw.EViT(keep=0.5), tw.ToMe(keep=0.5)])
def test_more_noise_changes_more(method):
    at_input = method.site == "input"
    model, batch = (llava(), questions()) if at_input else (classifier(), {"pixel_values": pictures()})
    none, little, much = tw.reduction.rank_stability(model, batch, method, noise=(0.0, 0.01, 3.0), draws=2)
    assert none.jaccard == 1
    assert 1 >= little.jaccard > much.jaccard > 0
    assert len(much.by_image) == 2
    assert much.jaccard == pytest.approx(sum(much.by_image) / 2)
    if isinstance(method, tw.ToMe):
        assert none.tau is None
    else:
        assert none.tau == pytest.approx(1)
        assert 1 > little.tau > much.tau
    again = tw.reduction.rank_stability(model, batch, method, noise=(3.0,), draws=2)
    assert again == [much]


def test_the_jaccard_index_is_that_of_the_kept_patches():
    model, batch, method = llava(), questions(), tw.FasterVLM(keep=0.25)
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(5))
    kept = []
    for strength in (0, 1):
        with tw.reduce(model, method) as handle, torch.no_grad():
            model(**{**batch, "pixel_values": batch["pixel_values"] + strength * noise})
        kept.append(handle.kept)
    expected = [jaccard(*pair) for pair in zip(*kept, strict=True)]
    [found] = tw.reduction.rank_stability(model, batch, method, noise=(1.0,), draws=1, seed=5)
    assert list(found.by_image) == expected


def test_chance_is_stable_and_full_budgets_are():
    for method in (tw.reduction.Random(keep=0.25), tw.FasterVLM(keep=1.0)):
        [found] = tw.reduction.rank_stability(llava(), questions(), method, noise=(1.0,), draws=1)
        assert found.jaccard == 1
    [found] = tw.reduction.rank_stability(classifier(), {"pixel_values": pictures()}, tw.EViT(keep=1.0), noise=(1.0,))
    assert found.jaccard == 1
    assert found.tau is None


@pytest.mark.parametrize("method", [tw.EViT(keep=0.4), tw.ToMe(keep=0.4), tw.RandomDrop(keep=0.4)])
def test_attack_on_a_classifier(method):
    model, images = classifier(), pictures(8)
    with torch.no_grad():
        labels = model(pixel_values=images).logits.argmax(1)
    batch = {"pixel_values": images, "labels": labels}
    found = tw.reduction.compression_aware_attack(model, batch, method, epsilon=0.1, steps=10)
    moved = found.pixel_values - images
    assert 0 < moved.abs().max() <= 0.1 + 1e-6
    assert found.pixel_values.min() >= images.min()
    assert found.pixel_values.max() <= images.max()
    assert found.dense == 1
    # The attack separates the two models, which noise of the same size does not.
    assert found.dense_attacked - found.reduced_attacked > found.dense_noise - found.reduced_noise
    assert found.reduced_attacked < found.reduced_noise
    with torch.no_grad():
        dense = model(pixel_values=found.pixel_values).logits.argmax(1)
        with tw.reduce(model, method):
            reduced = model(pixel_values=found.pixel_values).logits.argmax(1)
    assert found.dense_attacked == (dense == labels).double().mean()
    assert found.reduced_attacked == (reduced == labels).double().mean()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attack_on_what_a_language_model_reads():
    model = llava()
    batch = answered(model, questions(6))
    before = batch["pixel_values"].clone()
    method = tw.FasterVLM(keep=0.25)
    found = tw.reduction.compression_aware_attack(model, batch, method, epsilon=0.3, steps=10)
    assert torch.equal(batch["pixel_values"], before)
    assert found.dense == 1
    assert found.jaccard < 1
    attacked = {**batch, "pixel_values": found.pixel_values}
    with tw.reduce(model, method) as handle, torch.no_grad():
        right = model(**attacked).logits[:, -2].argmax(1) == batch["labels"][:, -1]
    assert found.reduced_attacked == pytest.approx(float(right.double().mean()))
    with tw.reduce(model, method) as clean, torch.no_grad():
        model(**batch)
    expected = [jaccard(*pair) for pair in zip(clean.kept, handle.kept, strict=True)]
    assert found.jaccard == pytest.approx(sum(expected) / 6)


def test_ranking_alone_moves_what_is_kept_more_than_noise():
    model = llava()
    batch, method = answered(model, questions(4)), tw.FasterVLM(keep=0.25)
    attack = {"epsilon": 0.2, "steps": 10, "dense_weight": 0.0}
    with_rank = tw.reduction.compression_aware_attack(model, batch, method, rank_weight=1e3, **attack)
    without = tw.reduction.compression_aware_attack(model, batch, method, rank_weight=0.0, **attack)
    assert with_rank.jaccard < without.jaccard


def test_the_gap_is_in_standard_deviations():
    score = torch.tensor([3.0, 1, float("inf"), 1, -1], requires_grad=True)
    gap = rank_gap(score, torch.tensor([0, 2]))
    counted = torch.tensor([3.0, 1, 1, -1])
    assert gap.item() == pytest.approx((3 - 1 / 3) / counted.std().item())
    gap.backward()
    assert score.grad[0] > 0 > score.grad[1]
    assert score.grad[2] == 0
    assert rank_gap(score, torch.arange(5)) == 0


def test_attention_is_differentiable_where_asked():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    query.requires_grad_()

    def rows(query):
        with with_gradient():
            return attention_rows(query, key, torch.tensor([1, 3]), lambda _: None, 0.5)

    def columns(query):
        with with_gradient():
            return attention_columns(query, key, lambda _: Shown(5), 0.5)

    assert torch.autograd.gradcheck(rows, query)
    assert torch.autograd.gradcheck(columns, query)
    assert not attention_rows(query, key, torch.tensor([0]), lambda _: None, 0.5).requires_grad
    with with_gradient(), torch.no_grad():
        assert not attention_columns(query, key, lambda _: Shown(5), 0.5).requires_grad


def test_bad_input_is_refused():
    model, batch = llava(), questions()
    with pytest.raises(InputError, match=r"batch\.labels: is missing"):
        tw.reduction.compression_aware_attack(model, batch, tw.FasterVLM())
    with pytest.raises(InputError, match=r"batch\.pixel_values: is missing"):
        tw.reduction.rank_stability(model, {"input_ids": batch["input_ids"]}, tw.FasterVLM())
    with pytest.raises(InputError, match="training mode"):
        tw.reduction.rank_stability(model.train(), batch, tw.FasterVLM())
    with pytest.raises(InputError, match="works at no site known here"):
        tw.reduction.rank_stability(model.eval(), batch, tw.Uniform())


SCORED = {
    "evit": tw.EViT(keep=0.5, fuse=False),
    "flow_cut": tw.FlowCut(keep=0.3),
    "sp_atten": tw.SpAtten(keep=0.5),
    "zero_tprune": tw.ZeroTPrune(keep=0.5, alike=0),
    "diff_rate": tw.DiffRate(keep=0.5),
    "random_drop": tw.RandomDrop(keep=0.5),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_score_is_what_tokens_of_an_encoder_are_kept_by(name):
    model, method, seen = classifier(), SCORED[name], []
    with tw.reduce(model, method) as handle:
        handle.watch = lambda tokens: seen.append((tokens.positions, tokens.prefix, method.score(tokens)))
        with torch.no_grad():
            model(pixel_values=pictures())
    following = [positions for positions, _, _ in seen[1:]] + [handle.last.positions]
    for (before, prefix, score), after in zip(seen, following, strict=True):
        for row in range(len(before)):
            stays = torch.isin(before[row], after[row])
            stays[:prefix] = True
            assert score[row, stays].min() >= score[row, ~stays].max()
    [found] = tw.reduction.rank_stability(model, {"pixel_values": pictures()}, method, noise=(0.0,), draws=1)
    assert found.jaccard == 1
    assert found.tau == pytest.approx(1)


@pytest.mark.parametrize("method", [tw.FlowCut(keep=0.3), tw.ZeroTPrune(keep=0.5), tw.SpAtten(keep=0.5)])
def test_ranking_by_more_than_the_class_token_can_be_attacked(method):
    model, images = classifier(), pictures(2)
    batch = {"pixel_values": images, "labels": torch.tensor([0, 1])}
    moved = [
        tw.reduction.compression_aware_attack(
            model, batch, method, epsilon=0.1, steps=1, rank_weight=weight
        ).pixel_values
        for weight in (0.0, 100.0)
    ]
    assert not torch.equal(*moved)


def test_the_score_of_chance_is_what_it_keeps_by():
    model, method = llava(), tw.reduction.Random(keep=0.25)
    with tw.reduce(model, method) as handle, torch.no_grad():
        model(**questions())
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(handle.kept[0], scores.topk(4).indices.sort().values)
    [found] = tw.reduction.rank_stability(model, questions(), method, noise=(1.0,), draws=1)
    assert found.tau == pytest.approx(1)
