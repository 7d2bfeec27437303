"""reduce inside a decoder: dropping equals hiding, also while generating; full budgets are dense; undo is exact."""

import pytest
import torch
import transformers

import tokenwise as tw
from small_models import llama, llava, pictures, spread, vision
from small_vision_language import vision_language
from tokenwise.errors import InputError
from tokenwise.models.selective_kv import SelectiveLayer
from tokenwise.models.tap import AttentionCall

IMAGE = 98


def text(padding=None, rows=2, length=14):
    ids = torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :4] = 0
    if padding == "right":
        mask[1, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pictured(padding=None):
    """Rows of one and of two images: padded on one side, or filled up with text where there is no padding."""
    ids = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(1))
    ids[0, 18:34] = IMAGE
    ids[1, 2:18] = IMAGE
    ids[1, 20:36] = IMAGE
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :15] = 0
    if padding == "right":
        ids[0], mask[0, -15:] = ids[0].roll(-15), 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures(3)}


CASES = {
    "llama": lambda: (llama(), text()),
    "llama left": lambda: (llama(), text("left")),
    "llama right": lambda: (llama(), text("right")),
    "llama eager": lambda: (llama(attention="eager"), text("left")),
    "llava": lambda: (llava(layers=4), pictured()),
    "llava left": lambda: (llava(layers=4), pictured("left")),
    "llava right": lambda: (llava(layers=4), pictured("right")),
}
METHODS = {
    "fast_v": lambda: tw.FastV(keep=0.6, layer=1),
    "pyramid_drop": lambda: tw.PyramidDrop(keep=0.5),
}


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
        position = mask.sum(1, keepdim=True) - 1
        ids = following[:, step : step + 1]
        options = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        found.append(model(input_ids=ids, **options).logits)
    return found, cache


def shown(handle, tokens):
    """Which tokens were left at the end, [batch, tokens]."""
    flags = torch.zeros(handle.last.index.shape[0], tokens, dtype=torch.bool)
    for row, (index, left) in enumerate(zip(handle.last.index, handle.last.left, strict=True)):
        flags[row, index[left]] = True
    return flags


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_dropping_equals_hiding(case, name):
    model, inputs = CASES[case]()
    dense, _ = read_and_continue(model, inputs)
    with tw.reduce(model, METHODS[name]()) as handle:
        fast, cache = read_and_continue(model, inputs)
        left = shown(handle, inputs["input_ids"].shape[1])
        counts = torch.stack(handle.last.layers)
        plans = torch.tensor(handle.last.plans)
        share = handle.stats["mean_share"]
    with tw.reduce(model, METHODS[name](), masked=True) as handle:
        slow, _ = read_and_continue(model, inputs)
        assert torch.equal(shown(handle, left.shape[1]), left)
    assert torch.allclose(fast[0][left], slow[0][left], atol=1e-5)
    for one, other in zip(fast[1:], slow[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(fast[-1], dense[-1], atol=1e-2)
    # As planned, in the layers and in the cache.
    real = inputs["attention_mask"].sum(1)
    expected = (real.unsqueeze(1) - plans[:, :1] + plans).T
    assert torch.equal(counts, expected)
    assert share == pytest.approx((plans.sum() / (plans[:, 0].sum() * 4)).item())
    for index, layer in enumerate(cache.layers):
        stored = layer.keys.shape[2] - 6
        assert stored in (left.shape[1], int(expected[index].max()))
        if isinstance(layer, SelectiveLayer):
            assert stored == int(expected[index].max())
            assert layer.get_seq_length() == left.shape[1] + 6
            assert layer.nbytes() == 2 * layer.keys.untyped_storage().nbytes()
    again, _ = read_and_continue(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(again, dense, strict=True))


@torch.no_grad()
def test_hiding_equals_the_dense_model_with_a_mask_of_its_own():
    model, inputs = CASES["llama left"]()
    with tw.reduce(model, METHODS["fast_v"]()) as handle:
        fast = model(**inputs).logits
        left = shown(handle, 14)
    hidden = ~left[:, None, None, :].expand(-1, 1, 14, -1) & ~torch.eye(14, dtype=torch.bool)

    def mask(module, args, options):
        return args, {**options, "attention_mask": options["attention_mask"] & ~hidden}

    hooks = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in model.model.layers[1:]]
    expected = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    assert torch.allclose(fast[left], expected[left], atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_full_budget_is_dense_to_the_bit(case):
    model, inputs = CASES[case]()
    dense, _ = read_and_continue(model, inputs)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for method in (tw.FastV(keep=1.0), tw.PyramidDrop(keep=1.0), tw.FastV(ratios=(1.0,))):
        with tw.reduce(model, method):
            found, _ = read_and_continue(model, inputs)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), ids)
        assert all(torch.equal(one, other) for one, other in zip(found, dense, strict=True))


@pytest.mark.parametrize("case", ["llama left", "llava", "llava left"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_rows_of_a_batch_are_as_alone(case, name):
    model, inputs = CASES[case]()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with tw.reduce(model, METHODS[name]()):
        whole = model.generate(**inputs, **options)
        images = 0
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = {
                "input_ids": inputs["input_ids"][row, real][None],
                "attention_mask": torch.ones(1, int(real.sum())),
            }
            if "pixel_values" in inputs:
                count = int((alone["input_ids"] == IMAGE).sum()) // 16
                alone["pixel_values"] = inputs["pixel_values"][images : images + count]
                images += count
            single = model.generate(**alone, **options)
            for one, other in zip(whole.logits, single.logits, strict=False):
                assert torch.allclose(one[row], other[0], atol=2e-5)


@pytest.mark.parametrize("case", ["llama", "llama left", "llava"])
@torch.no_grad()
def test_beams_follow_their_rows(case):
    model, inputs = CASES[case]()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with tw.reduce(model, METHODS["fast_v"]()):
        fast = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options), fast)
    with tw.reduce(model, METHODS["fast_v"](), masked=True):
        assert torch.equal(model.generate(**inputs, **options), fast)
    assert not torch.equal(model.generate(**inputs, **options), fast)


@torch.no_grad()
def test_a_second_turn_sees_what_is_left():
    model, inputs = CASES["llava left"]()
    following = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(following)], 1)
    positions = (mask.cumsum(1) - 1)[:, -5:]
    found = []
    for masked in (False, True):
        with tw.reduce(model, METHODS["pyramid_drop"](), masked=masked):
            cache = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :-5]).past_key_values
            options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            found.append(model(input_ids=following, **options).logits)
            with pytest.raises(InputError, match="behind tokens that are already in the cache"):
                model(input_ids=torch.full((2, 2), IMAGE), past_key_values=cache)
    assert torch.allclose(*found, atol=1e-5)


def test_training_keeps_what_predicts_a_label():
    model, inputs = CASES["llava left"]()
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:].masked_fill(ids[:, -8:] == IMAGE, -100)
    with tw.reduce(model, tw.FastV(keep=0.5, layer=1)) as handle:
        output = model(**inputs, labels=labels)
        output.loss.backward()
        left = shown(handle, ids.shape[1])
    assert output.logits.shape[1] == ids.shape[1]
    assert left[:, :-1][labels[:, 1:] != -100].all()
    assert (ids[:, :-1] == IMAGE)[labels[:, 1:] != -100].any()
    gone = (inputs["attention_mask"].bool() & ~left).sum()
    assert gone > 0
    logits, wanted = output.logits[:, :-1][left[:, :-1]], labels[:, 1:][left[:, :-1]]
    expected = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100)
    assert torch.allclose(output.loss, expected)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_gradients_are_those_of_hiding_with_checkpoints_too():
    model, inputs = CASES["llama left"]()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    found = []
    for masked, checkpoints in ((True, False), (False, False), (False, True)):
        if checkpoints:
            model.train().gradient_checkpointing_enable()
        with tw.reduce(model, METHODS["fast_v"](), masked=masked):
            model(**inputs, labels=labels).loss.backward()
        found.append(model.model.embed_tokens.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert torch.allclose(found[1], found[2], atol=1e-5)


def test_after_an_error_the_model_is_as_before():
    model, inputs = CASES["llava"]()

    def state():
        return {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m)), id(getattr(m, "config", None)))
            for name, m in model.named_modules()
        }

    with torch.no_grad():
        dense = model(**inputs).logits
        before = state()  # a first call leaves hooks of transformers' own
        with pytest.raises(ValueError), tw.reduce(model, METHODS["pyramid_drop"]()):
            model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        assert state() == before
        assert torch.equal(model(**inputs).logits, dense)

        def fail(*_):
            raise RuntimeError("in the middle")

        with tw.reduce(model, METHODS["pyramid_drop"]()):
            expected = model(**inputs).logits
            hook = model.model.language_model.layers[2].register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                model(**inputs)
            hook.remove()
            assert torch.equal(model(**inputs).logits, expected)
        assert state() == before


def test_what_cannot_work_is_refused_before_the_first_layer():
    model, inputs = CASES["llama"]()
    with tw.reduce(model, METHODS["fast_v"]()):
        with pytest.raises(InputError, match="StaticCache"):
            model(**inputs, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32))
        with pytest.raises(InputError, match="StaticCache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(InputError, match="output_hidden_states"):
            model(**inputs, output_hidden_states=True)
        with pytest.raises(InputError, match="prepared already"):
            model(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 1, 14, 14))
    with pytest.raises(InputError, match="no decoder of a known layout"):
        tw.reduce(vision("vit"), tw.FastV())
    with pytest.raises(InputError, match=r"not causal\. Use a method for the input, such as div_prune"):
        tw.reduce(vision_language("paligemma"), tw.FastV())
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(InputError, match="sliding_attention"):
        tw.reduce(transformers.MistralForCausalLM(config), tw.FastV())
    with (
        tw.reduce(model, tw.FastV(keep=0.2, layer=2)),
        pytest.raises(
            InputError,
            match=r"2 of 4\. Keep more than 0\.50 of the tokens, or let them go earlier, with a smaller layer",
        ),
    ):
        model(**inputs)
    with (
        pytest.raises(InputError, match="has 2 shares for 3 places"),
        tw.reduce(model, tw.PyramidDrop(ratios=(0.5, 0.2))),
    ):
        model(**inputs)
    pixels = llava()
    with tw.reduce(pixels, tw.FastV()), pytest.raises(InputError, match="where the images are"):
        pixels(inputs_embeds=torch.zeros(1, 4, 32))


@torch.no_grad()
def test_after_the_input_was_reduced():
    model, inputs = CASES["llava left"]()
    with tw.reduce(model, tw.FasterVLM(keep=0.5)), tw.reduce(model, tw.FastV(keep=0.5, layer=1)) as handle:
        model(**inputs)
        assert handle.stats["candidates"] == 24
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert handle.stats["candidates"] == 24
        assert handle.stats["prompts"] == 2


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Phi3"])
@torch.no_grad()
def test_other_decoders(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100, num_key_value_heads=2, head_dim=8, pad_token_id=0, sliding_window=None, **sizes
    )
    model, inputs = spread(getattr(transformers, f"{kind}ForCausalLM")(config)), text("left")
    dense = model(**inputs).logits
    with tw.reduce(model, METHODS["pyramid_drop"]()) as handle:
        fast = model(**inputs).logits
        left = shown(handle, 14)
    with tw.reduce(model, METHODS["pyramid_drop"](), masked=True):
        assert torch.allclose(model(**inputs).logits[left], fast[left], atol=1e-5)
    assert not torch.allclose(dense[left], fast[left], atol=1e-2)


@pytest.mark.parametrize("name", ["pyramid_drop", "fast_v", "sp_atten_decoder"])
@torch.no_grad()
def test_a_decoder_with_attention_sinks(name, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {"vocab_size": 100, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}

    def made(layer_types):
        config = transformers.GptOssConfig(
            **sizes, **options, num_hidden_layers=len(layer_types), layer_types=layer_types, eos_token_id=None
        )
        return spread(transformers.GptOssForCausalLM(config))

    with pytest.raises(InputError, match="layers of sliding_attention"):
        tw.reduce(made(["sliding_attention", "full_attention"]), tw.FastV())
    model, inputs = made(["full_attention"] * 4), text("left")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    heard = []
    for read in ("rows", "columns"):
        plain = getattr(AttentionCall, read)
        monkeypatch.setattr(
            AttentionCall, read, lambda self, *args, plain=plain: heard.append(self.sinks) or plain(self, *args)
        )
    method = {"sp_atten_decoder": tw.SpAttenDecoder(keep=0.6), **{key: make() for key, make in METHODS.items()}}[name]
    dense = model(**inputs).logits
    with tw.reduce(model, method) as handle:
        fast = model(**inputs).logits
        left = shown(handle, 14)
    with tw.reduce(model, method, masked=True):
        assert torch.allclose(model(**inputs).logits[left], fast[left], atol=1e-5)
    assert not torch.allclose(dense[left], fast[left], atol=1e-2)
    assert heard
    assert all(sinks is not None for sinks in heard)


@torch.no_grad()
def test_rotary_positions_in_one_complex_tensor():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV2Config(
        vocab_size=100, num_key_value_heads=4, pad_token_id=0, first_k_dense_replace=4, **sizes, **latent
    )
    model, inputs = spread(transformers.DeepseekV2ForCausalLM(config), 2), text("left")
    with tw.reduce(model, METHODS["fast_v"]()) as handle:
        fast = model(**inputs).logits
        left = shown(handle, 14)
    with tw.reduce(model, METHODS["fast_v"](), masked=True):
        assert torch.allclose(model(**inputs).logits[left], fast[left], atol=1e-5)


@torch.no_grad()
def test_a_placeholder_that_the_model_writes_is_a_word():
    model, inputs = CASES["llava left"]()
    with tw.reduce(model, METHODS["fast_v"]()):
        found = []
        for token in (IMAGE, 5):
            cache = transformers.DynamicCache(config=model.config.get_text_config())
            model(**inputs, past_key_values=cache)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            ids = torch.full((2, 1), token)
            found.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        assert not torch.equal(*found)
        more = {"attention_mask": mask, "past_key_values": cache, "pixel_values": inputs["pixel_values"][:2]}
        with pytest.raises(InputError, match="holds images behind tokens"):
            model(input_ids=torch.full((2, 1), IMAGE), **more)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_stats_are_those_of_the_last_prompt(padding):
    model, inputs = CASES["llava" if padding is None else f"llava {padding}"]()
    images = (inputs["input_ids"] == IMAGE) & inputs["attention_mask"].bool()
    with tw.reduce(model, METHODS["pyramid_drop"]()) as handle:
        assert handle.kept == []
        _, cache = read_and_continue(model, inputs, steps=0)
        stats, left = handle.stats, shown(handle, images.shape[1])
    assert stats["candidates"] == images.sum()
    assert stats["candidates_after"] == (images & left).sum() < images.sum()
    for row, kept in enumerate(handle.kept):
        assert torch.equal(images[row].nonzero()[kept, 0], (images & left)[row].nonzero()[:, 0])
    assert stats["cached_before"] == inputs["attention_mask"].sum()
    gone = (1 - stats["mean_share"]) * stats["candidates"]
    assert stats["cached_after"] == pytest.approx(stats["cached_before"] - gone)
    if padding is None:
        widest = sum(layer.keys.shape[2] for layer in cache.layers) / len(cache.layers)
        assert stats["cached_after"] <= 2 * widest
