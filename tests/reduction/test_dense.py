import pytest
import torch

from small_models import pictures, vision
from tokenwise.errors import InputError
from tokenwise.reduction.apply import reduce
from tokenwise.reduction.dense import Dense
from tokenwise.reduction.evit import EViT
from tokenwise.reduction.tome import ToMe
from tokenwise.weighting.random import Random


def test_dense_is_the_model_as_it_is():
    model = vision("vit")
    with torch.no_grad():
        before = model(pixel_values=pictures()).last_hidden_state
        with reduce(model, Dense()) as handle:
            assert torch.equal(model(pixel_values=pictures()).last_hidden_state, before)
    assert handle.stats["macs_share"] == 1
    with pytest.raises(InputError):
        Dense(keep=0.5)


@pytest.mark.parametrize("method", [ToMe, EViT])
def test_keep_may_be_a_share_of_the_operations(method):
    model = vision("vit")
    with torch.no_grad(), reduce(model, method(keep=" 0.60 flops")) as handle:
        model(pixel_values=pictures())
    assert method(keep="0.60 flops").keep == "0.6 flops"
    assert 0.5 < handle.stats["macs_share"] <= 0.6
    for wrong in ("2 flops", "0 flops"):
        with pytest.raises(InputError, match="not an amount"):
            method(keep=wrong)


def test_a_share_of_operations_means_nothing_to_losses():
    with pytest.raises(InputError):
        Random(keep="0.5 flops")
