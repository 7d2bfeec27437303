"""reduce inside encoders: the fast way equals the masked one, full budgets the dense model, undo is exact."""

import pytest
import torch
import transformers

import tokenwise as tw
from small_models import VISION, pictures, spread, vision
from tokenwise.errors import InputError

METHODS = {
    "tome": lambda keep: tw.ToMe(keep=keep),
    "tome linear": lambda keep: tw.ToMe(keep=keep, inflection=-1),
    "evit": lambda keep: tw.EViT(keep=keep),
    "evit without fusing": lambda keep: tw.EViT(keep=keep, fuse=False),
    "random_drop": lambda keep: tw.RandomDrop(keep=keep),
}


def hidden(model, images):
    with torch.no_grad():
        return model(pixel_values=images).last_hidden_state


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("name", METHODS)
def test_reducing_equals_hiding(kind, name):
    model, images = vision(kind), pictures()
    if kind == "siglip" and name.startswith("evit"):
        with pytest.raises(InputError, match="no class token"):
            tw.reduce(model, METHODS[name](0.6))
        return
    dense = hidden(model, images)
    with tw.reduce(model, METHODS[name](0.6)) as handle:
        fast = hidden(model, images)
        assert 0.5 < handle.stats["mean_share"] <= 0.6
        positions = handle.last.positions
    with tw.reduce(model, METHODS[name](0.6), masked=True) as handle:
        slow = hidden(model, images)
        assert torch.equal(handle.last.positions, positions)
    assert fast.shape[1] == positions.shape[1] < dense.shape[1] == slow.shape[1]
    expected = slow.gather(1, positions.unsqueeze(2).expand_as(fast))
    assert torch.allclose(fast, expected, atol=2e-5)
    assert not torch.allclose(fast[:, 0], dense[:, 0], atol=1e-3)
    assert torch.equal(hidden(model, images), dense)


@pytest.mark.parametrize("kind", VISION)
def test_a_full_budget_is_dense_to_the_bit(kind):
    model, images = vision(kind), pictures()
    dense = hidden(model, images)
    for method in (tw.ToMe(keep=1.0), tw.ToMe(r=0), tw.RandomDrop(keep=1.0)):
        with tw.reduce(model, method):
            assert torch.equal(hidden(model, images), dense)


def test_two_equal_tokens_merged_are_as_two():
    model, images = vision("vit"), pictures(1)
    embeddings = model.embeddings(images)
    embeddings[:, 4] = embeddings[:, 7]  # one at an even place, one at an odd
    model.embeddings.forward = lambda *args, **options: embeddings
    dense = hidden(model, images)
    with tw.reduce(model, tw.ToMe(keep="64 tokens")) as handle:
        handle._plans[65] = [64, 64, 64, 64]
        fast = hidden(model, images)
        assert handle.last.size.sum() == 65
        group = handle.last.group[0]
    assert group[4] == group[7]
    assert torch.allclose(fast, dense[:, handle.last.positions[0]], atol=1e-5)


def test_after_an_error_the_model_is_as_before():
    model, images = vision("clip"), pictures()
    dense = hidden(model, images)
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}

    def failing():
        with tw.reduce(model, tw.ToMe(keep=0.5)):
            model(pixel_values=images[:, :, :5])

    with pytest.raises(ValueError, match="size"):
        failing()
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == before
    assert torch.equal(hidden(model, images), dense)


def test_the_papers_counts():
    from tokenwise.policies.plans import Shape, entering

    shape = Shape(197, 12, 1, 768, 3072)
    counts = tw.ToMe(r=13).counts(shape)
    assert counts[0] == 184
    assert counts[-1] == 41
    assert tw.ToMe(r=16).counts(shape)[-2:] == [21, 11]
    linear = tw.ToMe(r=8, inflection=-1).counts(shape)
    removed = [a - b for a, b in zip(entering(shape, linear), linear, strict=True)]
    assert removed == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert sorted({count - 1 for count in tw.EViT(rate=0.7).counts(shape)}) == [71, 99, 139, 196]


def test_what_cannot_be_reduced_is_refused():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(llama, tw.ToMe())
    with pytest.raises(InputError, match="no token reducer"):
        tw.reduce(llama, tw.Uniform())
    with pytest.raises(InputError, match="model: NoneType is no model"):
        tw.reduce(None, tw.ToMe())


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {"image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    "config",
    [
        transformers.DINOv3ViTConfig(**SMALL, **PATCHES),  # rotary positions
        transformers.YolosConfig(**SMALL, image_size=[32, 32], patch_size=8),  # tokens of its own behind the patches
        transformers.VideoMAEConfig(**SMALL, **PATCHES),
        transformers.OwlViTConfig(vision_config={**SMALL, **PATCHES}, text_config={**SMALL, "vocab_size": 50}),
        transformers.MobileBertConfig(**{**SMALL, "vocab_size": 50}),
    ],
    ids=lambda config: config.model_type,
)
def test_what_is_built_alike_and_works_otherwise_is_refused(config):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(model, tw.ToMe())


def test_maps_of_features_are_refused():
    config = transformers.Dinov2Config(mlp_ratio=2, **PATCHES, **SMALL)
    backbone = spread(transformers.AutoBackbone.from_config(config))
    wrapped = torch.nn.Sequential(backbone)
    for model in (backbone, wrapped):
        with pytest.raises(InputError, match="Dinov2Backbone answers for every token"):
            tw.reduce(model, tw.ToMe())
    with torch.no_grad(), tw.reduce(backbone, tw.ToMe(keep=0.5), masked=True):
        assert backbone(pictures()).feature_maps[0].shape == (2, 32, 4, 4)


@torch.no_grad()
def test_hidden_states_of_a_part_called_by_itself_are_refused():
    config = transformers.CLIPConfig(
        vision_config={**SMALL, **PATCHES},
        text_config={**SMALL, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    )
    model = spread(transformers.CLIPModel(config))
    with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        for _ in range(2):
            with pytest.raises(InputError, match="output_hidden_states: asks for the tokens after every block"):
                model.get_image_features(pictures(), output_hidden_states=True)
            model.get_image_features(pictures())
    assert handle.stats["passes"] == 2


@torch.no_grad()
def test_a_tower_with_placeholders_elsewhere_is_refused():
    text = {**SMALL, "vocab_size": 100, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma3Config(
        vision_config={**SMALL, **PATCHES}, text_config=text, mm_tokens_per_image=4, image_token_index=98
    )
    model = spread(transformers.Gemma3ForConditionalGeneration(config), 1)
    ids = torch.tensor([[5, 98, 98, 98, 98, 6]])
    with (
        tw.reduce(model, tw.ToMe(keep=0.5)),
        pytest.raises(InputError, match="placeholder for each token of its vision tower"),
    ):
        model(input_ids=ids, pixel_values=pictures(1), token_type_ids=(ids == 98).long())
