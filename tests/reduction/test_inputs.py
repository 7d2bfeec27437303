"""reduce at the input of a language model: placeholders follow features, dropping equals hiding, ids stay whole."""

import pytest
import torch

import tokenwise as tw
from small_models import llava, pictures
from small_vision_language import ROWS, batch_for, vision_language
from tokenwise.errors import InputError
from tokenwise.policies.plans import Shape

METHODS = {
    "faster_vlm": lambda keep: tw.FasterVLM(keep=keep),
    "random": lambda keep: tw.reduction.Random(keep=keep),
    "div_prune": lambda keep: tw.DivPrune(keep=keep),
    "hi_prune": lambda keep: tw.HiPrune(keep=keep, object_layer=1),
    "hi_red": lambda keep: tw.HiRED(keep=keep),
    "to_dre": lambda keep: tw.ToDRE(keep=keep),
    "zoo_prune": lambda keep: tw.ZooPrune(keep=keep),
    "grid": lambda keep: tw.Grid(keep=keep),
}


def batch(padded=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (2, 22), generator=generator)
    ids[0, 3:19] = ids[1, 5:21] = 98
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_dropping_equals_hiding(name, padded):
    model, inputs = llava(), batch(padded)
    with tw.reduce(model, METHODS[name](0.25)) as handle:
        found = model(**inputs).logits
    assert handle.stats == {"batches": 1, "image_tokens_before": 32, "image_tokens_after": 8}
    mask = inputs["attention_mask"].clone()
    for row, kept in enumerate(handle.kept):
        gone = torch.ones(16, dtype=torch.bool).index_fill(0, kept, False)
        mask[row, (inputs["input_ids"][row] == 98).nonzero()[:, 0][gone]] = 0
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = model(**{**inputs, "attention_mask": mask}, position_ids=positions).logits
    for row in range(2):
        own = expected[row][mask[row].bool()]
        assert torch.allclose(found[row, -len(own) :], own, atol=1e-5)


@torch.no_grad()
def test_keeping_all_is_the_plain_call_to_the_bit():
    model, inputs = llava(), batch(padded=True)
    plain = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with tw.reduce(model, tw.FasterVLM(keep=1.0)):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)
    assert "forward" not in vars(model)
    assert "generate" not in vars(model)


@torch.no_grad()
def test_generated_ids_keep_the_whole_prompt():
    model, inputs = llava(), batch(padded=True)
    before = {name: value.clone() for name, value in inputs.items()}
    with tw.reduce(model, tw.FasterVLM(keep=0.25)):
        options = {"max_new_tokens": 5, "do_sample": False}
        found = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)
        single = model.generate(**{name: value[:1] for name, value in inputs.items()}, **options)
        short = model.generate(**inputs, max_length=24, do_sample=False)
    assert torch.equal(found[:, :22], inputs["input_ids"])
    assert found.shape == (2, 27)
    assert beams.shape == (4, 27)
    assert torch.equal(beams[:, :22], inputs["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(single[0], found[0])
    assert torch.equal(short, found[:, :24])
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_training_through_fewer_tokens():
    model, inputs = llava(), batch()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 98, -100)
    with tw.reduce(model, tw.FasterVLM(keep=0.5)):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_the_kept_patches_have_the_largest_attention():
    model, inputs = llava(), batch()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
    expected = attention.mean(1)[:, 0, 1:].topk(4).indices.sort().values
    model.set_attn_implementation("sdpa")
    with tw.reduce(model, tw.FasterVLM(keep=0.25)) as handle, torch.no_grad():
        model(**inputs)
    assert torch.equal(torch.stack(handle.kept), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("share", [0.8, 0.65])
@torch.no_grad()
def test_as_many_operations_as_are_left(share, padded):
    model, inputs = llava(), batch(padded)
    # One row with two images, and one with one.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((2, 16), 5)], 1)
    inputs["input_ids"][1, 22:] = 98
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 16), value=1)
    inputs["pixel_values"] = pictures(3)
    with tw.reduce(model, tw.DivPrune(keep=f"{share} flops")) as handle:
        model(**inputs)
    shape = Shape(0, 2, 0, 32, 64, True, 16)

    def macs(tokens):
        return shape.macs([tokens] * 2, [tokens] * 2)

    for row, images in enumerate(([0], [1, 2])):
        tokens = int(inputs["attention_mask"][row].sum())
        kept = sum(len(handle.kept[image]) for image in images)
        left = tokens - 16 * len(images) + kept
        assert macs(left) <= share * macs(tokens) < macs(left + len(images))
        assert 0 < kept < 16 * len(images)


def test_a_share_of_operations_that_the_text_takes_is_refused():
    model, inputs = llava(), batch()
    with pytest.raises(
        InputError, match=r"DivPrune\.keep: '0\.1 flops' is less than the share of 0\.\d+ that the text"
    ):
        tw.prune_inputs(model, inputs, tw.DivPrune(keep="0.1 flops"))
    model = vision_language("paligemma")
    inputs = batch_for("paligemma", model, ROWS["several images"])
    with pytest.raises(InputError, match=r"cannot be counted: .*Write the share of image tokens"):
        tw.prune_inputs(model, inputs, tw.DivPrune(keep="0.5 flops"))


def test_bad_input_is_refused():
    model, inputs = llava(), batch()
    inputs["input_ids"][0, 3] = 5
    with pytest.raises(InputError, match="31 placeholders for 32 image features"):
        tw.prune_inputs(model, inputs, tw.FasterVLM(keep=0.5))
    with pytest.raises(InputError, match="no vision-language model known here"):
        tw.reduce(model.model.language_model, tw.FasterVLM())
    with pytest.raises(InputError, match="none of the vision tower's 4"):
        tw.prune_inputs(model, batch(), tw.FasterVLM(layer=7))
