"""A share of the operations as the budget of methods inside a decoder."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenwise as tw
from small_models import llama, llava, pictures
from tokenwise.errors import InputError
from tokenwise.policies.plans import Shape, fit_macs, tokens_in_stages

IMAGE = 98
METHODS = [tw.FastV(layer=1, keep="0.7 flops"), tw.PyramidDrop(keep="0.7 flops"), tw.LateDrop(keep="0.7 flops")]


def prompts(rows=2):
    ids = torch.randint(1, 90, (rows, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 3:19] = IMAGE
    ids[-1, 21:] = 7
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(rows)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_each_prompt_stays_within_the_share_and_comes_close(method):
    model = llava(layers=8)
    with torch.no_grad(), tw.reduce(model, method) as handle:
        model(**prompts())
    assert 0.6 < handle.stats["macs_share"] <= 0.7
    assert method.keep == "0.7 flops"
    for row, plan in enumerate(handle.last.plans):
        tokens = int(handle.last.real[row].sum())
        shape = Shape(tokens, 8, width=32, hidden_width=64, gated=True, key_width=16)
        worked = [tokens - 16 + count for count in plan]
        assert shape.macs(worked, worked) <= 0.7 * shape.macs([tokens] * 8, [tokens] * 8)


def test_the_share_is_that_of_the_counted_matrix_products():
    model, inputs = llava(layers=4).eval(), prompts(1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    names = [f"model.language_model.layers.{index}" for index in range(4)]
    counted = []
    model.set_attn_implementation("eager")
    # One that computes nothing of its own.
    for keep in (1.0, "0.6 flops"):
        method = tw.reduction.RandomDecoder(layer=1, keep=keep)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, tw.reduce(model, method) as handle:
            model(**inputs)
        found = counter.get_flop_counts()
        counted.append(sum(sum(found[f"{type(model).__name__}.{name}"].values()) for name in names))
    assert counted[1] / counted[0] == pytest.approx(handle.stats["macs_share"], rel=0.02)


def test_the_whole_share_is_dense_and_too_small_a_one_is_refused():
    model, inputs = llava(layers=4), prompts()
    with torch.no_grad():
        dense = model(**inputs).logits
        with tw.reduce(model, tw.PyramidDrop(keep="1 flops")):
            assert torch.equal(model(**inputs).logits, dense)
        with (
            tw.reduce(model, tw.FastV(keep="0.2 flops")),
            pytest.raises(InputError, match=r"FastV\.keep.*the text and"),
        ):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, dense)


def test_a_model_of_text_and_ratios_of_the_paper():
    ids = {"input_ids": torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(1))}
    model = llama()
    with torch.no_grad(), tw.reduce(model, tw.FastV(layer=1, keep="0.8 flops")) as handle:
        model(**ids)
    assert 0.75 < handle.stats["macs_share"] <= 0.8
    with torch.no_grad(), tw.reduce(model, tw.FastV(layer=1, keep="0.8 flops", ratios=(0.1,))) as handle:
        model(**ids)
    assert handle.last.plans[0] == [38, 3, 3, 3]


def test_the_fitted_plan_is_the_largest_within_the_share():
    shape = Shape(30, 4, width=8, hidden_width=16, gated=True, key_width=8)

    def plan(total):
        counts = tokens_in_stages(20, 4, [1], [min(max(total - 20, 0) / 60, 1)])
        return counts if total > 23 else None

    dense = shape.macs([30] * 4, [30] * 4)
    shares = {}
    for total in range(24, 81):
        tokens = [10 + count for count in plan(total)]
        shares[total] = shape.macs(tokens, tokens) / dense
    for share in (0.5, 0.65, 0.8, 1.0):
        counts, taken = fit_macs(plan, share, shape, 20)
        within = max(total for total in shares if shares[total] <= share)
        assert (counts, taken) == (plan(within), shares[within])
    assert fit_macs(plan, 0.3, shape, 20) == (None, min(shares.values()))


def test_methods_for_the_input_read_it_too():
    assert tw.FasterVLM(keep="0.40 flops").keep == tw.reduction.PruMerge(keep="0.4 flops").keep == "0.4 flops"
    assert tw.reduction.PruMerge(keep="adaptive").keep == "adaptive"
    with pytest.raises(InputError, match="'2 flops' is not an amount"):
        tw.FasterVLM(keep="2 flops")
