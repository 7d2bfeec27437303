"""The verb: what goes together on one model, what does not and why, and positions."""

import pytest
import torch

import tokenwise as tw
from small_models import llama, llava, pictures, vision
from tokenwise.errors import InputError

AT_INPUT = [tw.FasterVLM(keep=0.5), tw.DivPrune(keep=0.25)]
INSIDE = [tw.FastV(keep=0.7, layer=1), tw.PyramidDrop(keep=0.6)]
IN_TOWER = [tw.ToMe(keep=0.5), tw.EViT(keep=0.5)]


def prompts(rows=2):
    ids = torch.randint(1, 90, (rows, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 3:19] = 98
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures(rows)}


@pytest.fixture(scope="module")
def model():
    return llava(layers=4)


@pytest.fixture(autouse=True)
def dense_again(model):
    """After each test the model answers as before, and can be reduced anew."""
    with torch.no_grad():
        dense = model(**prompts()).logits
        yield
        assert torch.equal(model(**prompts()).logits, dense)
        for method in (AT_INPUT[0], INSIDE[0]):
            tw.reduce(model, method).undo()
        tw.reduce(model.model.vision_tower, IN_TOWER[0]).undo()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("inside", INSIDE, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("at_input", AT_INPUT, ids=lambda method: type(method).__name__)
def test_at_the_input_and_inside_go_together(model, at_input, inside, order):
    with torch.no_grad():
        fewer = tw.prune_inputs(model, prompts(), at_input)
        with tw.reduce(model, inside):
            expected = model(**fewer).logits
        first, second = (at_input, inside)[::order]
        with tw.reduce(model, first) as one, tw.reduce(model, second) as other:
            assert torch.equal(model(**prompts()).logits, expected)
            ids = model.generate(**prompts(), max_new_tokens=3, do_sample=False)
    stats = one.stats | other.stats
    assert ids.shape[1] == 27
    assert stats["image_tokens_after"] // stats["batches"] == stats["candidates"] > stats["candidates_after"]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (*AT_INPUT, "already at its input"),
        (*AT_INPUT[::-1], "already at its input"),
        (*INSIDE, "already in its layers"),
        (*INSIDE[::-1], "already in its layers"),
        (*IN_TOWER, "already in its encoder"),
        (*IN_TOWER[::-1], "already in its encoder"),
        (AT_INPUT[0], IN_TOWER[0], "at its input: .* placeholders"),
        (IN_TOWER[0], AT_INPUT[0], "in its encoder: .* placeholders"),
        (AT_INPUT[1], IN_TOWER[1], "at its input: .* placeholders"),
        (IN_TOWER[1], AT_INPUT[1], "in its encoder: .* placeholders"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(model, first, second, reason):
    with tw.reduce(model, first), pytest.raises(InputError, match=reason):
        tw.reduce(model, second)


@pytest.mark.parametrize("first", [None, *INSIDE])
@pytest.mark.parametrize("tower", IN_TOWER)
def test_fewer_tokens_of_the_tower_than_placeholders_are_refused_before_its_first_block(model, first, tower):
    ran = []
    hook = model.model.vision_tower.encoder.layers[0].self_attn.register_forward_hook(lambda *_: ran.append(1))
    with tw.reduce(model, first or tw.FastV(keep=1.0)), tw.reduce(model, tower):
        for call, options in ((model, {}), (model.generate, {"max_new_tokens": 2})):
            with pytest.raises(InputError, match="a placeholder for each token of its vision tower"):
                call(**prompts(), **options)
        assert not ran
        text = prompts()["input_ids"].clamp_max(90)
        model(input_ids=text)
        with tw.reduce(vision("clip"), tower):  # another model is not concerned
            pass
        features = model.model.vision_tower(prompts()["pixel_values"]).last_hidden_state
        assert features.shape[1] < 17
    hook.remove()
    with tw.reduce(model, tower, masked=True):
        assert model(**prompts()).logits.shape[1] == 24


def test_positions_are_compact_where_asked_for(model):
    method = AT_INPUT[0]
    batch = tw.prune_inputs(model, prompts(), method, positions="compact")
    assert torch.equal(batch["position_ids"], torch.arange(16).expand(2, -1))
    with torch.no_grad(), tw.reduce(model, method, positions="compact") as handle:
        found = model(**prompts()).logits
        ids = model.generate(**prompts(), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(found, model(**batch).logits)
        expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
        with tw.reduce(model, method):
            assert not torch.allclose(model(**prompts()).logits, found)
    assert torch.equal(ids[:, 24:], expected[:, 16:])
    assert handle.stats["image_tokens_after"] == 32


@pytest.mark.parametrize(
    ("subject", "method", "options", "expected"),
    [
        (llava, AT_INPUT[0], {"positions": "short"}, "'short' is unknown"),
        (llava, AT_INPUT[0], {"positions": "compact", "masked": True}, "all tokens stay"),
        (llava, INSIDE[0], {"positions": "compact"}, "FastV is not for the input"),
        (llama, INSIDE[0], {"positions": "compact"}, "FastV is not for the input"),
        (lambda: vision("vit"), IN_TOWER[0], {"positions": "compact"}, "ToMe is not for the input"),
    ],
)
def test_positions_elsewhere_are_refused(subject, method, options, expected):
    with pytest.raises(InputError, match=expected):
        tw.reduce(subject(), method, **options)
