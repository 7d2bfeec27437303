"""Methods for decoders: each is what its formula says, and dropping equals hiding with every one."""

import json
from pathlib import Path

import pytest
import torch

import tokenwise as tw
from small_models import llama, llava, pictures
from tokenwise.errors import InputError
from tokenwise.policies.density_peaks import density_peaks
from tokenwise.policies.elbow import above_elbow
from tokenwise.policies.plans import fit_stages, tokens_in_stages
from tokenwise.reduction.sparse_vlm import text_raters
from tokenwise.signals.transitions import neuron_overlap, transition

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "decoder_reduction.json").read_text())
IMAGE = 98
METHODS = {
    "sparse_vlm": lambda: tw.SparseVLM(keep=0.5),
    "sparse_vlm without clusters": lambda: tw.SparseVLM(keep=0.5, recycle=0),
    "trans_prune": lambda: tw.TransPrune(keep=0.6),
    "late_drop": lambda: tw.LateDrop(keep=0.5),
    "late_drop threshold": lambda: tw.LateDrop(keep=0.25, threshold=0.85),
    "sp_atten": lambda: tw.SpAttenDecoder(keep=0.6),
    "core_matching": lambda: tw.CoreMatching(keep=0.6),
    "random_decoder": lambda: tw.RandomDecoder(keep=0.7),
}


def batch():
    """Rows of two images and of one, the second padded on the left."""
    ids = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    ids[0, 2:18] = ids[0, 20:36] = ids[1, 18:34] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3)}


def logits(model, inputs, steps=3):
    options = {"max_new_tokens": steps, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **options).logits, 1)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_dropping_equals_hiding(name):
    model, inputs = llava(layers=4), batch()
    with tw.reduce(model, METHODS[name]()) as handle:
        fast = logits(model, inputs)
        index, counts, plans = handle.last.index, torch.stack(handle.last.layers), handle.last.plans
        share = handle.stats["mean_share"]
        single = {"input_ids": inputs["input_ids"][1:, 15:], "attention_mask": torch.ones(1, 25), "pixel_values": None}
        single["pixel_values"] = inputs["pixel_values"][2:]
        alone = logits(model, single)
    with tw.reduce(model, METHODS[name](), masked=True) as handle:
        slow = logits(model, inputs)
        assert torch.equal(handle.last.index, index)
    assert torch.allclose(fast, slow, atol=2e-5)
    assert torch.allclose(fast[1:, : alone.shape[1]], alone, atol=2e-5)  # alone it may end earlier
    expected = (torch.tensor([40, 25]).unsqueeze(1) - torch.tensor([[32], [16]]) + torch.tensor(plans)).T
    if "threshold" in name:
        assert (counts >= expected).all()
    elif name == "core_matching":
        assert (counts <= expected).all()
    else:
        assert torch.equal(counts, expected)
    assert share < 1
    assert not torch.allclose(fast, logits(model, inputs), atol=1e-2)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_full_budget_is_dense_to_the_bit(name):
    model, inputs = llava(layers=4), batch()
    dense = model(**inputs).logits
    with tw.reduce(model, METHODS[name]().replace(keep=1.0)):
        assert torch.equal(model(**inputs).logits, dense)


def eager(model, inputs):
    """Attention maps as a mean over heads, [layers, batch, tokens, tokens]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = torch.stack(model(**inputs, output_attentions=True).attentions).mean(2)
    model.set_attn_implementation("sdpa")
    return found


def test_what_stays_has_the_largest_attention_of_the_last_token():
    model, inputs = llava(layers=4), batch()
    attention = eager(model, inputs)
    place = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    for method, layer in ((tw.FastV(ratios=(0.25,), layer=2), 1), (tw.PyramidDrop(ratios=(0.25,), places=(0.5,)), 2)):
        with tw.reduce(model, method) as handle, torch.no_grad():
            model(**inputs)
        expected = place[attention[layer, 0, -1, place].topk(8).indices.sort().values]
        assert torch.equal(handle.last.index[0][inputs["input_ids"][0][handle.last.index[0]] == IMAGE], expected)


def test_spatten_sums_what_is_received():
    model = llama()
    inputs = {"input_ids": torch.randint(1, 90, (2, 14), generator=torch.Generator().manual_seed(1))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :4] = 0
    real = inputs["attention_mask"].bool()
    attention = eager(model, inputs)[0] * real[:, :, None] * 4
    received = []
    method = tw.SpAttenDecoder(keep=0.9)

    class Spy(tw.SpAttenDecoder):
        def see_attention(self, tokens, call):
            super().see_attention(tokens, call)
            received.append(tokens.memory["received"])

    with tw.reduce(model, Spy(**method.config())) as handle, torch.no_grad():
        model(**inputs)
    assert torch.allclose(received[0], attention.sum(1), atol=1e-5)
    # Each query gives one for each head.
    assert received[0].sum(1).tolist() == pytest.approx([4 * 14, 4 * 10])
    assert torch.allclose(received[1].sum(1) - received[0].sum(1), torch.tensor([4.0 * 14, 4.0 * 10]), atol=5)
    left = handle.last.index[1][handle.last.left[1]]
    assert {4, 13} <= set(left.tolist())


@pytest.mark.parametrize("case", GOLDEN["clusters"])
def test_clusters_are_the_official_codes(case):
    values = torch.tensor(case["values"], dtype=torch.float64)
    centres, cluster = density_peaks(values, case["count"], case["count"])
    merged = torch.stack([values[cluster == place].mean(0) for place in range(case["count"])])
    assert torch.allclose(merged, torch.tensor(case["merged"], dtype=torch.float64), atol=1e-5)
    assert torch.equal(cluster[centres], torch.arange(case["count"]))


def test_recycling_is_its_matrix_and_keeps_the_count():
    generator = torch.Generator().manual_seed(0)
    values, score = torch.randn(60, 4, generator=generator), torch.rand(60, generator=generator)
    for count in (1, 2, 3, 10, 30, 58, 59):
        change = tw.SparseVLM().recycled(values, score, count)
        kept = change.kept[0]
        assert len(kept) == len(set(kept.tolist())) == count
        size = torch.ones(1, 60)
        made = change.apply(values[None], size)
        assert torch.allclose(made.double(), change.matrix(size) @ values[None].double(), atol=1e-6)
    # 30 of 60: 28 of their own, and of the 32 others the ten best in two clusters.
    change = tw.SparseVLM().recycled(values, score, 30)
    order = score.argsort(descending=True)
    assert set(order[:28].tolist()) < set(change.kept[0].tolist())
    assert set((change.target[0] >= 0).nonzero()[:, 0].tolist()) == set(order[:38].tolist())


def test_raters_are_the_words_above_the_mean():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.1]]])
    image = torch.tensor([[True, False, False, False]])
    assert text_raters(hidden, image, ~image).tolist() == [[False, False, True, False]]
    same = torch.ones(1, 4, 2)
    assert text_raters(same, image, ~image).tolist() == (~image).tolist()


def test_transitions_are_the_official_codes():
    case = {name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["transition"].items()}
    real = torch.ones(1, 6, dtype=torch.bool)
    assert torch.allclose(transition(case["before"], case["after"], real), case["weight"])
    padded = [torch.nn.functional.pad(case[name], (0, 0, 2, 0)) for name in ("before", "after")]
    real = torch.nn.functional.pad(real, (2, 0))
    assert torch.allclose(transition(*padded, real)[:, 2:], case["weight"])
    assert transition(case["before"], torch.zeros_like(case["after"]), real[:, 2:]).abs().sum() == 0


def test_neurons_shared_and_the_elbow():
    activation = torch.tensor([[[1.0, -1.0, 2.0], [1.0, 1.0, -1.0], [0.5, -0.1, 0.1]]])
    assert neuron_overlap(activation, torch.tensor([[2]])).tolist() == [[2, 1, 2]]
    assert above_elbow(torch.tensor([1, 10, 0, 9, 8])).tolist() == [False, True, False, True, False]
    assert above_elbow(torch.tensor([3.0, 3.0, 3.0])).all()
    assert above_elbow(torch.tensor([3.0, 1.0])).all()


def test_the_papers_counts():
    assert tw.PyramidDrop(ratios=(0.5, 0.25, 0.125)).counts(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(tw.PyramidDrop(ratios=(0.5, 0.25, 0.125)).counts(576, 32)) / 32 == 270
    assert tw.PyramidDrop(keep=270 / 576).counts(576, 32) == tw.PyramidDrop(ratios=(0.5, 0.25, 0.125)).counts(576, 32)
    assert tw.FastV(ratios=(0.5,)).counts(576, 32) == [576] * 2 + [288] * 30
    stages = tw.SparseVLM(ratios=(300 / 576, 200 / 576, 110 / 576)).counts(576, 32)
    assert stages == [576] * 3 + [300] * 4 + [200] * 9 + [110] * 16
    assert tw.TransPrune(ratios=(0.875, 0.625, 0.125)).counts(576, 32) == [576] * 7 + [504] * 2 + [360] * 3 + [72] * 20
    assert tw.LateDrop(keep=0.75).counts(576, 32) == [576] * 24 + [0] * 8
    assert tokens_in_stages(3, 4, [1, 2], [0.1, 0.01]) == [3, 1, 1, 1]
    for keep in (0.3, 0.5, 0.77, "300 tokens"):
        for method in (tw.FastV, tw.PyramidDrop, tw.SparseVLM, tw.TransPrune, tw.SpAttenDecoder):
            counts = method(keep=keep).counts(576, 32) if keep != 0.3 else fit_stages(576, 32, [3, 9], [0.5, 0.2], 0.3)
            budget = (float(keep.split()[0]) if isinstance(keep, str) else keep * 576) * 32
            if counts is not None:
                assert budget - 31 <= sum(counts) <= budget + 0.5
                assert counts == sorted(counts, reverse=True)


def test_what_needs_images_refuses_text():
    for method in (tw.SparseVLM(), tw.TransPrune(), tw.LateDrop(), tw.CoreMatching()):
        with pytest.raises(InputError, match="reads no images"):
            tw.reduce(llama(), method)
