"""Mixture of depths: the official layer's numbers, the layer by hand, caches, gradients, routers in files."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from test_decoder import pictured
from torch import nn

from small_models import llama, llava, pictures, vision
from small_vision_language import IMAGE, KINDS, ROWS, VIDEO, batch_for, vision_language
from tokenwise.errors import InputError
from tokenwise.models.selective_kv import SelectiveLayer
from tokenwise.reduction import MixtureOfDepths, mixture_ratios

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/p_mod.json").read_text())
RATIOS = {1: 0.6, 2: 0.3, 3: 0.15}


def train(handle):
    """Routers as if they had been trained."""
    torch.manual_seed(5)
    for router in handle.routers.values():
        nn.init.normal_(router.weight, std=0.2)
        nn.init.normal_(router.bias, std=0.2)
    return handle


@torch.no_grad()
def read_and_continue(model, inputs, steps=6):
    """Logits of the prompt and of tokens that follow one by one; the cache."""
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = [model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True).logits]
    following = torch.randint(1, 90, (mask.shape[0], steps), generator=torch.Generator().manual_seed(2))
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        options = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "past_key_values": cache}
        found.append(model(input_ids=following[:, step : step + 1], **options).logits)
    return found, cache


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def layer_by_hand(layer, embeddings, hidden, image, ratio, router, scale):
    """One row ([tokens, channels]) through a layer with a router, or without where the ratio is None; its tokens."""
    kept, weight = torch.arange(len(hidden)), torch.ones(len(hidden), dtype=hidden.dtype)
    if ratio is not None:
        weight[image] = 1 + scale * torch.tanh(hidden[image] @ router.weight[0].double() + router.bias.double())
        count = max(int(ratio * len(image)), 1)
        chosen = image[sorted(range(len(image)), key=lambda place: (-weight[image[place]].item(), place))[:count]]
        kept = torch.tensor(sorted({*kept.tolist()} - {*image.tolist()} | {*chosen.tolist()}))
    taken = hidden[kept][None]
    attended, _ = layer.self_attn(
        layer.input_layernorm(taken), position_embeddings=tuple(part[:, kept] for part in embeddings), is_causal=True
    )
    inner = taken + attended
    added = layer.mlp(layer.post_attention_layernorm(inner))
    out = hidden * weight[:, None]
    out[kept] = (inner + weight[kept][None, :, None] * added)[0]
    return out, kept


@torch.no_grad()
def test_the_official_layer():
    text = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=100,
    )
    config = transformers.LlavaConfig(vision_config=vision("clip").config, text_config=text, image_token_id=IMAGE)
    config.vision_config.patch_size = 8
    model = transformers.LlavaForConditionalGeneration(config).eval()
    language = model.model.language_model
    layer, language.norm = language.layers[0], nn.Identity()
    layer.load_state_dict({name: torch.tensor(value) for name, value in GOLDEN["state"].items()})
    hidden, expected = torch.tensor(GOLDEN["hidden"]), torch.tensor(GOLDEN["out"])
    ids, mask = torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    for row, (image, length) in enumerate(zip(GOLDEN["image"], GOLDEN["length"], strict=True)):
        ids[row, image] = IMAGE
        mask[row, length:] = 0
    swap = layer.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
    with MixtureOfDepths(model, {0: GOLDEN["ratio"]}) as handle:
        handle.routers["0"].weight.copy_(torch.tensor(GOLDEN["router"]["weight"]))
        handle.routers["0"].bias.copy_(torch.tensor(GOLDEN["router"]["bias"]))
        found = model.model(input_ids=ids, attention_mask=mask, pixel_values=pictures(3)).last_hidden_state
    swap.remove()
    assert torch.allclose(found, expected, atol=1e-5)
    for shift, official in ((0.0, GOLDEN["ratios"]["0.5"]), (0.2, GOLDEN["ratios"]["0.3"])):
        ratios = mixture_ratios(32, shift)
        assert [ratios.get(layer, 1.0) for layer in range(32)] == pytest.approx(official)
        assert list(ratios) == [layer for layer, ratio in enumerate(official) if ratio <= 0.85]
    assert sum(mixture_ratios(32).values()) + 8 == pytest.approx(0.5375 * 32, abs=0.05)


@torch.no_grad()
def test_the_layers_by_hand():
    model = llava(layers=4).double()
    inputs = pictured()
    one = {name: value[:1] for name, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:1].double()}
    image = (one["input_ids"][0] == IMAGE).nonzero()[:, 0]
    language = model.model.language_model
    states = []
    hook = language.layers[0].register_forward_pre_hook(
        lambda module, args, options: states.append((args or [options["hidden_states"]])[0]), with_kwargs=True
    )
    with train(MixtureOfDepths(model, RATIOS, scale=0.5)) as handle:
        found, cache = read_and_continue(model, one, steps=0)
        hidden = states[0][0]
        embeddings = language.rotary_emb(states[0], torch.arange(40)[None])
        for index, layer in enumerate(language.layers):
            router = handle.routers[str(index)] if index in RATIOS else None
            hidden, kept = layer_by_hand(layer, embeddings, hidden, image, RATIOS.get(index), router, 0.5)
            stored = cache.layers[index]
            assert stored.keys.shape[2] == len(kept) == (40, 33, 28, 26)[index]
            if index:
                assert torch.equal(stored.positions[0, 0], kept)
    hook.remove()
    assert torch.allclose(found[0][0], model.lm_head(language.norm(hidden)), atol=1e-9)
    assert handle.stats["mean_share"] == pytest.approx((16 + 9 + 4 + 2) / 64)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_with_full_ratios_and_routers_of_zero_it_is_dense_to_the_bit(padding):
    model, inputs = llava(layers=4), pictured(padding)
    dense, _ = read_and_continue(model, inputs)
    with MixtureOfDepths(model, dict.fromkeys(range(4), 1.0)) as handle:
        found, cache = read_and_continue(model, inputs)
        assert same(found, dense)
        assert not any(isinstance(layer, SelectiveLayer) for layer in cache.layers)
        assert handle.stats["mean_share"] == 1
        train(handle)
        assert not same(read_and_continue(model, inputs)[0], dense)
    assert same(read_and_continue(model, inputs)[0], dense)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@torch.no_grad()
def test_skipping_equals_hiding_and_rows_are_as_alone(padding):
    model, inputs = llava(layers=4), pictured(padding)
    real = inputs["attention_mask"].bool()
    dense, _ = read_and_continue(model, inputs)
    with train(MixtureOfDepths(model, RATIOS)):
        fast, cache = read_and_continue(model, inputs)
        assert [type(layer) is SelectiveLayer for layer in cache.layers] == [False, True, True, True]
        # 1 row with an image of 16 tokens, 1 with two; 6 tokens followed.
        counts = [[max(int(ratio * image), 1) for image in (16, 32)] for ratio in RATIOS.values()]
        for layer, (one, two) in zip(cache.layers[1:], counts, strict=True):
            longest = max(int(real[0].sum()) - 16 + one, int(real[1].sum()) - 32 + two)
            assert layer.keys.shape[2] == longest + 6
            assert layer.get_seq_length() == 46
        images = 0
        for row in range(2) if padding != "right" else ():
            ids = inputs["input_ids"][row, real[row]][None]
            count = int((ids == IMAGE).sum()) // 16
            pixels = inputs["pixel_values"][images : images + count]
            images += count
            alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
            one, all_rows = model.generate(**alone, **options).logits, model.generate(**inputs, **options).logits
            for single, several in zip(one, all_rows, strict=False):
                assert torch.allclose(single[0], several[row], atol=2e-5)
    with train(MixtureOfDepths(model, RATIOS, masked=True)):
        slow, _ = read_and_continue(model, inputs)
    assert torch.allclose(fast[0][real], slow[0][real], atol=1e-5)
    for one, other, plain in zip(fast[1:], slow[1:], dense[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, plain, atol=1e-2)
    assert same(read_and_continue(model, inputs)[0], dense)


# PaliGemma's language model is no causal decoder.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paligemma"])
@torch.no_grad()
def test_every_vision_language_model(kind):
    # qwen3_vl adds features of the image to what its first layers give.
    model = vision_language(kind)
    inputs = batch_for(kind, model, ROWS["several images"])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options["suppress_tokens"] = [IMAGE, VIDEO]
    dense = model.generate(**inputs, **options).logits
    with MixtureOfDepths(model, dict.fromkeys(range(3), 1.0)):
        assert same(model.generate(**inputs, **options).logits, dense)
    found = []
    for masked in (False, True):
        with train(MixtureOfDepths(model, {0: 0.5, 1: 0.3, 2: 0.6}, masked=masked)) as handle:
            found.append(model.generate(**inputs, **options).logits)
            assert handle.stats["mean_share"] < 0.55
    for fast, slow in zip(*found, strict=True):
        assert torch.allclose(fast, slow, atol=5e-5)
    assert not torch.allclose(found[0][0], dense[0], atol=1e-2)


@torch.no_grad()
def test_beams_a_second_turn_and_short_floats():
    model, inputs = llava(layers=4), pictured("left")
    following = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(following)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for masked in (False, True):
        with train(MixtureOfDepths(model, RATIOS, masked=masked)):
            beams = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=3)
            cache = model(**inputs, position_ids=positions[:, :-5], use_cache=True).past_key_values
            options = {"attention_mask": mask, "position_ids": positions[:, -5:], "past_key_values": cache}
            found.append((beams, model(input_ids=following, **options).logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    short = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    with train(MixtureOfDepths(model.bfloat16(), RATIOS)) as handle:
        assert model(**short).logits.dtype == torch.bfloat16
        assert all(value.dtype == torch.float32 for value in handle.routers.parameters())


@torch.no_grad()
def test_what_skips_a_layer_passes_unchanged_while_the_router_is_zero():
    model, inputs = llava(layers=4), pictured("left")
    seen = []

    def see(module, args, options, output):
        seen.append(((args or [options["hidden_states"]])[0], output[0] if isinstance(output, tuple) else output))

    with MixtureOfDepths(model, {2: 0.01}) as handle:
        hook = model.model.language_model.layers[2].register_forward_hook(see, with_kwargs=True)
        whole = []
        before = model.model.language_model.layers[1].register_forward_hook(
            lambda module, args, output: whole.append(output[0] if isinstance(output, tuple) else output)
        )
        model(**inputs)
        hook.remove()
        before.remove()
        # Even of the smallest image one token goes through: the first, where all are alike to the router.
        image = inputs["input_ids"] == IMAGE
        went = image & (image.cumsum(1) == 1)
        after = seen[0][1]
        assert torch.equal(after[image & ~went], whole[0][image & ~went])
        real = inputs["attention_mask"].bool()
        assert bool((after != whole[0]).any(2)[(~image & real) | went].all())
        assert handle.stats["mean_share"] == pytest.approx((3 * 48 + 2) / (4 * 48))


@torch.no_grad()
def test_weights_stay_within_their_scale():
    model = llava(layers=2)
    with MixtureOfDepths(model, {1: 0.5}) as handle:
        hidden = torch.randn(3, 5, 32, dtype=torch.bfloat16) * 100
        assert torch.equal(handle.weights(1, hidden), torch.ones(3, 5))
        train(handle)
        weight = handle.weights(1, hidden)
        assert weight.dtype == torch.float32
        assert float(weight.min()) >= 0.8 - 1e-6
        assert float(weight.max()) <= 1.2 + 1e-6
        router = handle.routers["1"]
        assert torch.allclose(weight, 1 + 0.2 * torch.tanh(router(hidden.float())[..., 0]))


def test_routers_learn_and_checkpoints_change_nothing():
    inputs = pictured("left")
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    found = []
    for masked, checkpoints in ((False, False), (True, False), (False, True)):
        model = llava(layers=4)
        if checkpoints:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with train(MixtureOfDepths(model, RATIOS, masked=masked)) as handle:
            model(**inputs, labels=labels).loss.backward()
            found.append([p.grad.clone() for p in (*handle.routers.parameters(), *model.lm_head.parameters())])
            found[-1].append(model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    for router in found[0][:4]:
        assert router.abs().sum() > 0
    # No word reads what the last layer gives for an image.
    assert not found[0][4].any()
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-4, rtol=1e-3)


def test_reentrant_checkpoints_are_refused():
    model, inputs = llava(layers=4), pictured()
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with MixtureOfDepths(model, RATIOS), pytest.raises(InputError, match="reentrant"):
        model(**inputs, labels=inputs["input_ids"])


def test_a_step_of_the_routers_changes_what_is_chosen():
    model, inputs = llava(layers=4), pictured()
    with MixtureOfDepths(model, RATIOS) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        optimizer = torch.optim.SGD(handle.routers.parameters(), lr=10.0)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -4:] = inputs["input_ids"][:, -4:]
        first = model(**inputs, labels=labels).loss
        first.backward()
        optimizer.step()
        again = model(**inputs, use_cache=True).past_key_values
        assert not torch.equal(cache.layers[2].positions, again.layers[2].positions)


def test_routers_in_files(tmp_path):
    model, inputs, path = llava(layers=4), pictured(), tmp_path / "new" / "routers.safetensors"
    with train(MixtureOfDepths(model, RATIOS)) as handle, torch.no_grad():
        expected = model(**inputs).logits
        handle.save(path)
    with MixtureOfDepths(model, RATIOS) as handle, torch.no_grad():
        assert not torch.equal(model(**inputs).logits, expected)
        handle.load(path)
        assert torch.equal(model(**inputs).logits, expected)
        with pytest.raises(InputError, match="does not exist"):
            handle.load(tmp_path / "none")
        (tmp_path / "text").write_text("words")
        with pytest.raises(InputError, match="no safetensors file"):
            handle.load(tmp_path / "text")
    for ratios in ({1: 0.6}, {**RATIOS, 3: 0.2}):
        with MixtureOfDepths(model, ratios) as handle, pytest.raises(InputError, match="other layers, ratios"):
            handle.load(path)
    assert [each.name for each in path.parent.iterdir()] == ["routers.safetensors"]


def test_what_does_not_fit_is_refused_and_everything_is_undone():
    model = llava(layers=2)

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]

    before = hooks()
    for ratios in ({2: 0.5}, {0: 0.0}, {0: 1.5}, {}):
        with pytest.raises(InputError, match=r"shares in \(0, 1\]"):
            MixtureOfDepths(model, ratios)
    with pytest.raises(InputError, match="less than 0"):
        MixtureOfDepths(model, {1: 0.5}, scale=-1)
    with pytest.raises(InputError, match="reads no images"):
        MixtureOfDepths(llama(), {1: 0.5})
    assert hooks() == before
    with pytest.raises(RuntimeError, match="in the middle"), MixtureOfDepths(model, {1: 0.5}):
        raise RuntimeError("in the middle")
    assert hooks() == before
