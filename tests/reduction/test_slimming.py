"""SiT: the official modules' numbers, slimming inside a model, and what trains."""

import json
from pathlib import Path

import pytest
import torch

from small_models import pictures, vision
from tokenwise.errors import InputError
from tokenwise.reduction import ReverseSlimming, TokenSlimming, attach_slimming
from tokenwise.reduction.slimming import slimming_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/sit.json").read_text())


def load(module, state):
    names = {"mlp1.fc1": "mlp1.0", "mlp1.fc2": "mlp1.2", "mlp2.fc1": "mlp2.0", "mlp2.fc2": "mlp2.2"}
    renamed = {}
    for key, value in state.items():
        place, _, kind = key.rpartition(".")
        renamed[".".join(filter(None, (names.get(place, place), kind)))] = torch.tensor(value)
    module.load_state_dict(renamed)
    return module


def test_modules_are_the_official_ones():
    tokens = torch.tensor(GOLDEN["tokens"])
    slimming = load(TokenSlimming(4, 3), GOLDEN["slimming"])
    slim = slimming(tokens)
    assert torch.allclose(slim, torch.tensor(GOLDEN["slim"]), atol=1e-5)
    assert torch.allclose(slimming.mixing(tokens).sum(2), torch.ones(2, 3))
    reverse = load(ReverseSlimming(4, 3, 6, ratio=2), GOLDEN["reverse"])
    assert torch.allclose(reverse(slim), torch.tensor(GOLDEN["recovered"]), atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2_registers"])
def test_slimming_inside_a_model(kind):
    torch.manual_seed(1)
    model, images = vision(kind), pictures()
    dense = model(pixel_values=images, output_hidden_states=True)
    modules = {1: TokenSlimming(32, 20), 2: TokenSlimming(32, 10)}
    with attach_slimming(model, modules) as handle:
        found = model(pixel_values=images).last_hidden_state
        prefix = handle.encoder.prefix
        assert handle.last.layers == [64 + prefix, 20 + prefix, 10 + prefix, 10 + prefix]
    # By hand: the blocks one after the other.
    hidden = dense.hidden_states[0]
    for index, block in enumerate(handle.encoder.blocks):
        hidden = block.module(hidden) if kind != "siglip" else block.module(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if index in modules:
            hidden = torch.cat([hidden[:, :prefix], modules[index](hidden[:, prefix:])], 1)
    norm = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("layernorm", "post_layernorm"))
    assert torch.allclose(found, norm(hidden), atol=1e-5)
    found.sum().backward()
    assert modules[1].scale.grad.abs().sum() > 0
    assert torch.equal(model(pixel_values=images).last_hidden_state, dense.last_hidden_state)


def test_the_loss_is_zero_for_the_teachers_own():
    tokens, logits = [torch.randn(2, 6, 4)] * 2, torch.randn(2, 5)
    assert float(slimming_loss(tokens, tokens, logits, logits)) == pytest.approx(0, abs=1e-6)
    moved = slimming_loss([tokens[0] + 1, tokens[1]], tokens, logits, logits)
    assert float(moved) == pytest.approx(2 * 0.5, abs=1e-5)
    other = torch.randn(2, 5)
    expected = (logits.softmax(1) * (logits.log_softmax(1) - other.log_softmax(1))).sum(1).mean()
    assert float(slimming_loss(tokens, tokens, other, logits)) == pytest.approx(2 * float(expected), abs=1e-5)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"after blocks \[4\] of 0 to 3"):
        attach_slimming(vision("vit"), {4: TokenSlimming(32, 5)})
