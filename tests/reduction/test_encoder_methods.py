"""The encoder methods: official numbers, fp64 references, the fast way against the masked one, exact counts."""

import json
from pathlib import Path

import pytest
import torch
from small_texts import TEXT, batch, text

import tokenwise as tw
from small_models import VISION, pictures, vision
from tokenwise.errors import InputError
from tokenwise.models.tap import AttentionCall
from tokenwise.policies.plans import Shape, entering
from tokenwise.reduction.base import LayerTokens

GOLDEN = Path(__file__).parents[1] / "golden"
METHODS = {
    "pi_to_me": lambda keep: tw.PiToMe(keep=keep),
    "pi_to_me of texts": lambda keep: tw.PiToMe(keep=keep, variant="text", decline=0.25),
    "flow_cut": lambda keep: tw.FlowCut(keep=keep),
    "turbo": lambda keep: tw.Turbo(keep=keep, alpha=5),
    "zero_tprune": lambda keep: tw.ZeroTPrune(keep=keep),
    "sp_atten": lambda keep: tw.SpAtten(keep=keep),
}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).last_hidden_state


def tokens_of(key, value=None, query=None, layer=0, layers=4, prefix=1, padding=None, memory=None):
    """The tokens of one block from its keys, [batch, heads, tokens, channels]."""
    count = key.shape[2]
    positions = torch.arange(count).expand(len(key), -1)
    mask = None if padding is None else ~padding[:, None, None, :]
    call = AttentionCall(
        torch.nn.Identity(),
        key if query is None else query,
        key,
        key if value is None else value,
        mask,
        key.shape[3] ** -0.5,
    )
    hidden = torch.zeros(len(key), count, 3, dtype=key.dtype)
    size = torch.ones(len(key), count)
    return LayerTokens(hidden, size, layer, layers, prefix, prefix > 0, positions, call, padding, memory or {})


def whole_map(tokens):
    """The attention of every head as one map in fp64, [batch, heads, queries, keys]."""
    call = tokens.attention
    scores = call.query.double() @ call.key.double().transpose(2, 3) * call.scaling
    if tokens.padding is not None:
        scores = scores.masked_fill(tokens.padding[:, None, None], float("-inf"))
    return scores.softmax(-1)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", [*VISION, *TEXT])
@pytest.mark.parametrize("name", METHODS)
def test_reducing_equals_hiding(kind, name):
    model, inputs = (vision(kind), {"pixel_values": pictures()}) if kind in VISION else (text(kind), batch())
    if kind == "siglip" and name == "flow_cut":
        with pytest.raises(InputError, match=r"no class token, which FlowCut reads\. Use .* zero_tprune"):
            tw.reduce(model, METHODS[name](0.6))
        return
    dense = run(model, inputs)
    with tw.reduce(model, METHODS[name](0.5)) as handle:
        fast, tokens, stats = run(model, inputs), handle.last, handle.stats
    with tw.reduce(model, METHODS[name](0.5), masked=True) as handle:
        slow = run(model, inputs)
        assert torch.equal(handle.last.positions, tokens.positions)
    kept = torch.ones_like(tokens.positions, dtype=torch.bool) if tokens.padding is None else ~tokens.padding
    expected = slow.gather(1, tokens.positions.unsqueeze(2).expand_as(fast))
    assert torch.allclose(fast[kept], expected[kept], atol=2e-5)
    assert stats["tokens_after"] < stats["tokens_before"]
    assert not torch.allclose(fast[0, 0], dense[0, 0], atol=1e-3)
    if name != "flow_cut":
        assert 0.4 < stats["mean_share"] <= 0.5
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("name", METHODS)
def test_a_full_budget_is_dense_to_the_bit(name):
    for model, inputs in ((vision("vit"), {"pixel_values": pictures()}), (text("bert"), batch())):
        dense = run(model, inputs)
        with tw.reduce(model, METHODS[name](1.0)):
            assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [0.8, 0.4])
def test_padding_goes_before_any_word(name, keep):
    model, inputs = text("bert"), batch()
    padding = inputs["attention_mask"] == 0
    with tw.reduce(model, METHODS[name](keep)) as handle:
        run(model, inputs)
        tokens = handle.last
    left = torch.zeros_like(tokens.positions, dtype=torch.bool) if tokens.padding is None else tokens.padding
    for row in range(3):
        group = tokens.group[row]
        assert not set(group[padding[row]].tolist()) & set(group[~padding[row]].tolist()) - {-1}
        if left[row].any():
            assert (~left[row]).sum() == (~padding[row]).sum()
        together = (group >= 0) & ~padding[row]
        if METHODS[name](keep).merges:
            assert together.sum() == (~padding[row]).sum()
            assert tokens.size[row][~left[row]].sum() == (~padding[row]).sum()


@pytest.mark.parametrize("variant", ["image", "text"])
def test_pi_to_me_merges_as_the_official_code(variant):
    golden = json.loads((GOLDEN / "pi_to_me.json").read_text())
    for case in golden["cases"]:
        metric = torch.tensor(case["metric"], dtype=torch.float64)
        method = tw.PiToMe(ratio=case["ratio"], variant=variant, margin=case["margin"], decline=0)
        available = metric.shape[1]
        count = method.counts(Shape(available, 1, prefix=1))[0]
        change = method.reduce(tokens_of(metric.unsqueeze(1)), count)
        for row, expected in enumerate(case[variant]):
            groups = [(change.target[row] == place).nonzero()[:, 0].tolist() for place in range(count)]
            assert sorted(groups) == expected


def test_pi_to_me_spares_what_is_like_nothing_else():
    # Six tokens along one line and three along others: only the six can be merged, the class token never.
    key = torch.eye(5)[[0, 1, 1, 2, 1, 1, 3, 1, 1, 4]].double()
    change = tw.PiToMe().reduce(tokens_of(key[None, None] + seeded(1, 1, 10, 5) * 1e-3), 7)
    alone = [0, 3, 6, 9]
    members = torch.bincount(change.target[0], minlength=7)
    assert members[change.target[0][alone]].tolist() == [1, 1, 1, 1]
    assert members.sum() == 10


def test_pi_to_me_margins_and_counts():
    shape = Shape(197, 12, 1, 768, 3072)
    counts = tw.PiToMe(ratio=0.9).counts(shape)
    assert counts[:3] == [178, 161, 145]
    assert all(after - 1 >= (before - 1) / 2 for before, after in zip(entering(shape, counts), counts, strict=True))
    # Above the margin similarity counts as it is, below at most -1.
    energy = tw.PiToMe(margin=0.9).energy(torch.tensor([1.0, -1.0]).double(), 6, 12)
    assert torch.allclose(energy, torch.tensor([0.55, 2.718281828459045**-1.45 - 1]).double())


def test_flow_cut_scores_and_counts_as_the_official_code():
    golden = json.loads((GOLDEN / "flow_cut.json").read_text())
    for case in golden["cases"]:
        row = torch.tensor(case["row"]).double()
        value = torch.tensor(case["value"]).double()
        tokens = tokens_of(value)
        row[:, 0] = 0
        score = tw.FlowCut().scores(row, tokens)
        assert torch.allclose(score[:, 1:], torch.tensor(case["score"]).double(), rtol=1e-6)
        patches = torch.full((len(row),), row.shape[1] - 1)
        assert tw.FlowCut().removed(row, patches, case["remaining"], case["target"]) == case["removed"]


def test_flow_cut_removes_nothing_of_even_attention_and_most_of_one_peak():
    patches = torch.tensor([16])
    even = torch.cat([torch.zeros(1, 1), torch.full((1, 16), 1 / 16)], 1)
    peak = torch.zeros(1, 17).index_fill(1, torch.tensor([5]), 1.0)
    assert tw.FlowCut().removed(even, patches, 4, 4) == 0
    assert tw.FlowCut().removed(peak, patches, 4, 4) == 6
    assert tw.FlowCut().removed(torch.cat([even, peak]), patches.expand(2), 4, 4) == 6


def test_flow_cut_against_a_loop_over_the_blocks():
    """The scores' running mean, the counts of every second block and the exact end, from eager maps and values."""
    torch.manual_seed(0)
    model, inputs = vision("clip"), {"pixel_values": pictures(1)}
    layers = [*model.encoder.layers, *vision("clip", seed=1).encoder.layers]
    model.encoder.layers = torch.nn.ModuleList(layers)
    left = 20
    with torch.no_grad():
        hidden = model.pre_layrnorm(model.embeddings(inputs["pixel_values"])).double()
        total, counts, index = None, [], torch.arange(65)
        for number, layer in enumerate(layers):
            layer.double()
            normed = layer.layer_norm1(hidden)
            attention = layer.self_attn

            def heads(projection, normed=normed):
                return projection(normed).unflatten(2, (4, 8)).transpose(1, 2)

            query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
            weights = (query @ key.transpose(2, 3) * 8**-0.5).softmax(-1)
            hidden = hidden + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            layer.float()
            remaining = 6 - number - 1
            if hidden.shape[1] > left:
                row = weights.mean(1)[0, 0, 1:]
                alike = (value[:, :, :1] @ value.transpose(2, 3)).softmax(-1).mean(1)[0, 0, 1:]
                score = (row / row.sum() + alike / alike.sum()) * value.mean(1)[0, 1:].abs().sum(1)
                total = score if total is None else (total + score) / 2
                if remaining % 2 == 0:
                    share = row / row.sum()
                    evenness = -(share * share.log()).sum() / torch.tensor(float(len(row))).log()
                    gone = len(row) if remaining == 0 else (len(row) - left + 1) / remaining**0.5 * (1 - evenness**2)
                    count = max(hidden.shape[1] - round(float(gone)), left)
                    best = total.topk(count - 1).indices.sort().values
                    total, index = total[best], index[torch.cat([torch.zeros(1, dtype=torch.long), best + 1])]
                    hidden = hidden[:, torch.cat([torch.zeros(1, dtype=torch.long), best + 1])]
            counts.append(hidden.shape[1])
    with tw.reduce(model, tw.FlowCut(keep=f"{left} tokens")) as handle:
        run(model, inputs)
        assert handle.last.layers == counts
        assert handle.last.positions[0].tolist() == index.tolist()
    assert 20 < counts[3] < counts[1] < 65
    assert counts[5:] == [20, 20, 20]


def test_flow_cut_needs_blocks_to_cut_in():
    model = vision("vit")
    with tw.reduce(model, tw.FlowCut(select_layer=-4)), pytest.raises(InputError, match="leaves 0 of 4 blocks"):
        run(model, {"pixel_values": pictures()})
    with pytest.raises(InputError, match="none besides the 1 protected"):
        tw.reduce(vision("vit"), tw.FlowCut(keep="1 tokens"))
    with pytest.raises(InputError, match=r"FlowCut\.keep: '0\.5 flops' is a share of the operations"):
        tw.FlowCut(keep="0.5 flops")


def test_turbo_without_attention_is_tome():
    model, inputs = vision("vit"), {"pixel_values": pictures()}
    with tw.reduce(model, tw.ToMe(keep=0.6)):
        expected = run(model, inputs)
    with tw.reduce(model, tw.Turbo(keep=0.6, alpha=0)):
        assert torch.equal(run(model, inputs), expected)
    with tw.reduce(model, tw.Turbo(keep=0.6, alpha=10)):
        assert not torch.allclose(run(model, inputs)[:, 0], expected[:, 0], atol=1e-3)


@pytest.mark.parametrize("prefix", [0, 1])
def test_turbo_against_its_formula(prefix):
    key, query = seeded(1, 2, 11, 4), seeded(1, 2, 11, 4, seed=1)
    tokens = tokens_of(key, query=query, prefix=prefix)
    change = tw.Turbo(alpha=6).reduce(tokens, 8)
    metric = torch.nn.functional.normalize(key.mean(1)[0], dim=-1)
    maps = whole_map(tokens).mean(1)[0]
    attention = maps[0] if prefix else maps.mean(0)
    edges = {}
    for even in range(2 if prefix else 0, 11, 2):
        similarity = metric[even] @ metric[1::2].T
        edges[even] = (float(similarity.max() - 6 * attention[even]), int(similarity.argmax()) * 2 + 1)
    gone = sorted(edges, key=lambda even: -edges[even][0])[:3]
    for even in gone:
        assert change.target[0][even] == change.target[0][edges[even][1]]
    assert sorted(set(range(11)) - set(gone)) == sorted(change.kept[0].tolist())


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("padded", [False, True])
def test_importance_is_a_power_of_the_map(steps, padded, monkeypatch):
    monkeypatch.setattr("tokenwise.signals.attention._BLOCK_BYTES", 4 * 2 * 3 * 11 * 4)  # four rows a block
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 7:] = padded
    tokens = tokens_of(seeded(2, 3, 11, 4) * 2, query=seeded(2, 3, 11, 4, seed=1), padding=padding if padded else None)
    maps = whole_map(tokens)
    began = (~padding).double() / (~padding).sum(1, keepdim=True)
    expected = began[:, None, None].expand(-1, 3, -1, -1) @ torch.linalg.matrix_power(maps, steps)
    found = tokens.attention.rank(steps, ~padding if padded else None)
    assert torch.allclose(found, expected.squeeze(2), atol=1e-12)
    assert torch.allclose(found.sum(2), torch.ones(2, 3).double())
    if steps == 1:
        assert torch.allclose(found, tokens.attention.columns(~padding if padded else None))


def test_zero_tprune_drops_the_alike_of_the_less_important_then_the_least_important():
    key, query = seeded(1, 2, 12, 4), seeded(1, 2, 12, 4, seed=3)
    tokens = tokens_of(key, query=query, layer=0, layers=12)
    method = tw.ZeroTPrune(iterations=(4, 2, 1), alike=0.5)
    change = method.reduce(tokens, 8)
    maps = whole_map(tokens)[0]
    state = torch.full((2, 1, 12), 1 / 12).double() @ torch.linalg.matrix_power(maps, 4)
    importance = state.square().mean(0).sqrt()[0]
    assert torch.allclose(method.importance(tokens)[0], importance, atol=1e-12)
    order = sorted(range(1, 12), key=lambda place: -importance[place])
    upper, lower = order[:6], order[6:]
    metric = torch.nn.functional.normalize(key.mean(1)[0], dim=-1)
    likeness = {place: max(float(metric[place] @ metric[other]) for other in upper) for place in lower}
    redundant = sorted(lower, key=lambda place: -likeness[place])[:2]
    rest = [place for place in order if place not in redundant]
    assert change.kept[0].tolist() == sorted([0, *rest[:-2]])


def test_sp_atten_adds_up_what_each_word_receives():
    model, inputs = text("bert"), batch((20, 12))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    whole = sum((attention * real[:, None, :, None]).sum((1, 2)) for attention in maps[:2])
    seen = {}
    original = tw.SpAtten.decide

    class Watched(tw.SpAtten):
        def decide(self, tokens, counts):
            count = original(self, tokens, counts)
            seen[tokens.layer] = (tokens.memory["importance"].clone(), tokens.positions)
            return count

    with tw.reduce(model, Watched(keep=0.7, spared=0.5)) as handle:
        run(model, inputs)
        assert handle.last.layers[1] == 20 > handle.last.layers[2]
    assert torch.allclose(seen[1][0], whole, atol=1e-4)
    # Heads times words in every block.
    assert torch.allclose(seen[1][0].sum(1), 2 * 4 * real.sum(1).float(), rtol=1e-5)
    # What is gone stays gone.
    for row in range(2):
        assert set(seen[3][1][row].tolist()) < set(seen[2][1][row].tolist())


@pytest.mark.parametrize("name", METHODS)
def test_learning_through_every_method(name):
    model, images = vision("vit").train(), pictures()
    with tw.reduce(model, METHODS[name](0.5)):
        model(pixel_values=images).last_hidden_state[:, 0].square().sum().backward()
    gradient = model.embeddings.patch_embeddings.projection.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
