"""DToP: certain tokens leave, the canvas holds every prediction, and leaving equals hiding."""

import pytest
import torch

from small_models import pictures, vision
from tokenwise.errors import InputError
from tokenwise.reduction import TokenExits
from tokenwise.reduction.token_exits import certain_tokens


def heads(blocks=(1, 2, 3), classes=4):
    torch.manual_seed(2)
    made = {block: torch.nn.Linear(32, classes) for block in blocks}
    for head in made.values():
        head.weight.data.mul_(20)
    return made


def test_the_most_certain_of_each_class_stay():
    torch.manual_seed(0)
    probability = (torch.randn(3, 40, 3) * 4).softmax(2)
    found = certain_tokens(probability, 0.8, context=2)
    for image in range(3):
        confidence, label = probability[image].max(1)
        expected = confidence > 0.8
        for each in range(3):
            own = ((label == each) & (confidence > 0.8)).nonzero()[:, 0]
            expected[own[confidence[own].topk(min(2, len(own))).indices]] = False
        assert expected.any()
        assert torch.equal(found[image], expected)
    assert not certain_tokens(probability, 1.0).any()
    equal = torch.tensor([[[1.0, 0.0]] * 4])
    assert certain_tokens(equal, 0.9, context=1).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2_registers"])
@torch.no_grad()
def test_leaving_equals_hiding(kind):
    model, images = vision(kind), pictures(3)
    dense = model(pixel_values=images).last_hidden_state
    with TokenExits(model, heads(), threshold=0.7, context=3) as handle:
        model(pixel_values=images)
        canvas, layers, empty = handle.canvas, handle.last.layers, handle.last.empty
        assert 64 + handle.encoder.prefix >= layers[1] >= layers[2]
        assert (~empty).sum(1).double().mean() < 0.8 * layers[0]
        assert empty.any()
        single = []
        for image in images:
            model(pixel_values=image[None])
            single.append(handle.canvas)
    assert canvas.shape == (3, 64, 4)
    assert torch.allclose(canvas, torch.cat(single), atol=1e-4)
    with TokenExits(model, heads(), threshold=0.7, context=3, masked=True) as handle:
        model(pixel_values=images)
        assert torch.allclose(handle.canvas, canvas, atol=1e-4)
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense)


@torch.no_grad()
def test_without_exits_the_model_is_dense_to_the_bit():
    model, images = vision("vit"), pictures()
    states = []
    last = model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    dense = model(pixel_values=images).last_hidden_state
    last.remove()
    made = heads()
    with TokenExits(model, made, threshold=1.0) as handle:
        assert torch.equal(model(pixel_values=images).last_hidden_state, dense)
    assert torch.equal(handle.canvas, made[3](states[0][:, 1:]))


def test_every_head_gets_a_gradient():
    model, images, made = vision("vit"), pictures(), heads()
    with TokenExits(model, made, threshold=0.7, context=3) as handle:
        model(pixel_values=images)
        handle.canvas.square().sum().backward()
    assert all(head.weight.grad.abs().sum() > 0 and torch.isfinite(head.weight.grad).all() for head in made.values())
    assert torch.isfinite(model.layers[3].mlp.fc1.weight.grad).all()


def test_bad_input_is_refused():
    model = vision("vit")
    with pytest.raises(InputError, match="One after block 3 decides"):
        TokenExits(model, heads((1, 2)))
    with pytest.raises(InputError, match="out of range"):
        TokenExits(model, heads(), threshold=1.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
