"""Virtual unmerging equals attention over all tokens, written out; caches, padding and beams follow; undone exactly."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tokenwise as tw
from small_models import spread
from small_vision_language import IMAGE, batch_for, one_row, vision_language
from tokenwise.errors import InputError
from tokenwise.models.rotary import find_rotary
from tokenwise.reduction import InputReducer, Merge, virtual_unmerge
from tokenwise.reduction.virtual_unmerging import Members, unmerged_attention

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/virtual_unmerging.json").read_text())
ROWS = [[3, "a", 2, "b", 4], [2, "c", 5]]
GREEDY = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "suppress_tokens": [*range(95, 99)]}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


class Scattered(InputReducer):
    """Merges tokens that lie far from each other, a different number in each image, and drops some."""

    merges = True
    drops: bool = True

    def counts_of(self, images):
        sizes = [len(image.features) for image in images]
        return [min(size // 4 + index, size // 2) for index, size in enumerate(sizes)]

    def select(self, image, count):
        tokens = torch.arange(len(image.features))
        # The place of each merged token is that of its second member, so that members lie on both sides of it.
        target = tokens % count
        if self.drops:
            target = target.masked_fill(tokens == len(tokens) - 1, -1)
        return Merge((tokens[:count] + count).unsqueeze(0), target.unsqueeze(0))


def model_of(text, attention="sdpa"):
    torch.manual_seed(0)
    options = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 99}
    options |= {"sliding_window": None} if text == "mistral" else {}
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=CONFIGS[text](**options), image_token_id=IMAGE)
    config._attn_implementation = attention
    return spread(transformers.LlavaForConditionalGeneration(config), 2)


def reference(model, inputs, groups, kept, features):
    """Logits of a prompt without padding, [tokens that are left, vocabulary]: every layer's attention runs on all
    tokens, its outputs are averaged, and the rest runs on the merged ones.

    Args:
        groups: for each image the merged token of each of its rows, -1 where it was dropped.
        kept: for each image the rows whose places the merged tokens have.
        features: of the merged tokens.
    """
    ids, language = inputs["input_ids"][0], model.model.language_model
    rows, start = torch.arange(len(ids)), 0
    gone = torch.zeros(len(ids), dtype=torch.bool)
    places = (ids == IMAGE).nonzero()[:, 0]
    for group, own in zip(groups, kept, strict=True):
        image = places[start : start + len(group)]
        rows[image] = image[own][group]
        gone[image[group < 0]] = True
        start += len(group)
    position = torch.arange(len(ids))[~gone]  # the tokens that are there in attention, at their positions
    left, mapping = rows[~gone].unique(return_inverse=True)
    hidden = model.get_input_embeddings()(ids[left])
    hidden[ids[left] == IMAGE] = torch.cat(features)
    member = torch.nn.functional.one_hot(mapping).T.to(hidden.dtype)
    average = member / member.sum(1, keepdim=True)
    whole = hidden[mapping].unsqueeze(0)
    turned = language.rotary_emb(whole, position_ids=position.unsqueeze(0))
    ahead = torch.full((len(position), len(position)), -torch.inf, dtype=hidden.dtype).triu(1)
    for layer in language.layers:
        whole = layer.input_layernorm(hidden)[mapping].unsqueeze(0)
        attended = layer.self_attn(whole, position_embeddings=turned, attention_mask=ahead[None, None])[0]
        hidden = hidden + average @ attended[0]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(language.norm(hidden))


def expected(model, inputs, handle, images):
    """`reference` with what the reduction of `inputs`, a row without padding, merged: its images are `images`."""
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
    groups, kept = ([part[index] for index in images] for part in (handle.group, handle.kept))
    merged = []
    for image, group, own in zip(features, groups, kept, strict=True):
        made = [image[group == number].mean(0) for number in range(len(own))]
        merged.append(torch.stack(made))
    return reference(model, inputs, groups, kept, merged)


def rows_of(model, padding):
    """A ragged batch, its rows without padding and the images of each."""
    whole = batch_for("llava", model, ROWS, padding)
    return whole, [one_row("llava", model, ROWS, index, padding) for index in range(2)], [[0, 1], [2]]


@pytest.mark.parametrize("text", CONFIGS)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_equals_attention_over_all_tokens(text, padding):
    model = model_of(text)
    inputs, singles, images = rows_of(model, padding)
    for method in (Scattered(), Scattered(drops=False)):
        with tw.reduce(model, method) as handle:
            merged = model(**inputs).logits
            with virtual_unmerge(handle) as unmerging:
                found = model(**inputs).logits
                alone = [model(**single).logits[0] for single in singles[:1]]
            assert torch.equal(model(**inputs).logits, merged)
            model(**inputs)
        wanted = [expected(model, single, handle, own) for single, own in zip(singles, images, strict=True)]
        for row, logits in enumerate(wanted):
            there = found[row, -len(logits) :] if padding == "left" else found[row, : len(logits)]
            assert torch.allclose(there, logits, atol=1e-5)
            before = merged[row, -len(logits) :] if padding == "left" else merged[row, : len(logits)]
            assert (before - logits).abs().max() > 1e-3
        assert torch.allclose(alone[0], wanted[0], atol=1e-5)
        dropped = 3 if method.drops else 0
        assert unmerging.stats["batches"] == 2
        first = int(singles[0]["attention_mask"].sum()) - (2 if method.drops else 0)
        assert unmerging.stats["members"] == int(inputs["attention_mask"].sum()) - dropped + first
        assert unmerging.stats["tokens"] == sum(map(len, wanted)) + len(wanted[0])


@torch.no_grad()
def test_attention_is_the_official_one():
    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaModel(config)
    attention, hidden = model.layers[0].self_attn, torch.tensor([[*GOLDEN["hidden"], GOLDEN["next"]]])
    for name, weight in GOLDEN["weights"].items():
        getattr(attention, name).weight.copy_(torch.tensor(weight))
    mapping = torch.tensor([GOLDEN["mapping"]])
    rotary = find_rotary(model, attention)
    # Where a merged token itself stands does not matter: at its first member, or its last.
    for own in ([0, 1, 2, 3, 8, 9], [0, 7, 4, 6, 8, 9]):
        place = torch.tensor([own])
        steps = torch.arange(10) - place.gather(1, mapping)
        members = Members(mapping, steps, torch.ones_like(mapping, dtype=torch.bool), place)
        cos, sin = model.rotary_emb(hidden, position_ids=torch.tensor([[*own, 10]]))
        split = (getattr(attention, name)(hidden).view(1, 7, 2, 4).transpose(1, 2) for name in ("q_proj", "k_proj"))
        query, key = apply_rotary_pos_emb(*split, cos, sin)
        value = attention.v_proj(hidden).view(1, 7, 2, 4).transpose(1, 2)
        prompt = [part[:, :, :6] for part in (query, key, value)]
        found = attention.o_proj(unmerged_attention(*prompt, members, members.turn(rotary), 0.5, None).flatten(2))
        assert torch.allclose(found[0], torch.tensor(GOLDEN["output"]), atol=1e-4, rtol=1e-4)
        members = members.followed(torch.ones(1, 1, dtype=torch.bool))
        further = unmerged_attention(query[:, :, 6:], key, value, members, members.turn(rotary), 0.5, None)
        found = attention.o_proj(further.flatten(2))
        assert torch.allclose(found[0, 0], torch.tensor(GOLDEN["next_output"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [Scattered(), tw.VQToken(keep=0.25), tw.AveragePool(keep=0.25)], ids=type)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_methods_and_implementations(method, attention):
    model = model_of("llama", attention)
    single = rows_of(model, "left")[1][0]
    with tw.reduce(model, method) as handle, virtual_unmerge(handle):
        found = model(**single).logits[0]
    assert torch.allclose(found, expected(model, single, handle, [0, 1]), atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_equals_reading_all_again(use_cache):
    """Each new token is that of the reference for the prompt and the tokens before."""
    model = model_of("qwen2")
    inputs, singles, images = rows_of(model, "left")
    with tw.reduce(model, Scattered()) as handle, virtual_unmerge(handle):
        found = model.generate(**inputs, **GREEDY, use_cache=use_cache, return_dict_in_generate=True)
        if use_cache:  # it stores the merged tokens alone
            assert found.past_key_values.get_seq_length() == 5 + handle.stats["image_tokens_after"] - 6 + 9
    for row, (single, own) in enumerate(zip(singles, images, strict=True)):
        ids = single["input_ids"]
        for token in found.sequences[row, -6:]:
            logits = expected(model, {**single, "input_ids": ids}, handle, own)[-1]
            logits[95:100] = -torch.inf
            assert int(logits.argmax()) == int(token)
            ids = torch.cat([ids, token.view(1, 1)], 1)
    assert torch.equal(found.sequences[:, :-6], inputs["input_ids"])


@torch.no_grad()
def test_beams_and_sampled_sequences():
    model = model_of("llama")
    inputs, singles, _ = rows_of(model, "left")
    with tw.reduce(model, Scattered(drops=False)) as handle, virtual_unmerge(handle):
        cached = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2)
        again = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2, use_cache=False)
        single = model.generate(**singles[0], **GREEDY, num_beams=3, num_return_sequences=2)
    assert torch.equal(cached, again)
    assert torch.equal(cached[:2, -6:], single[:, -6:])


@torch.no_grad()
def test_goes_on_from_a_cache_with_several_tokens():
    model = model_of("llama")
    single = rows_of(model, "left")[1][0]
    ids, further = single["input_ids"], torch.tensor([[7, 8, 9]])
    length = ids.shape[1]
    with tw.reduce(model, Scattered()) as handle, virtual_unmerge(handle):
        cache = model(**single).past_key_values
        model(input_ids=further)  # a text of its own between
        mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
        positions = torch.arange(length, length + 3).unsqueeze(0)
        options = {"past_key_values": cache, "position_ids": positions, "attention_mask": mask}
        found = model(input_ids=further, **options).logits[0]
        cache.crop(-3)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(further), **options).logits[0], found)
    whole = {**single, "input_ids": torch.cat([ids, further], 1)}
    assert torch.allclose(found, expected(model, whole, handle, [0, 1])[-3:], atol=1e-5)


@torch.no_grad()
def test_nothing_merged_is_the_dense_model_to_the_bit_and_undoing_leaves_nothing():
    model = model_of("llama")
    inputs, singles, _ = rows_of(model, "left")
    text = {name: value for name, value in singles[0].items() if name != "pixel_values"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == IMAGE, 5)
    plain, ids, other = model(**inputs).logits, model.generate(**inputs, **GREEDY), model(**text).logits

    def patches():
        return [
            (set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ]

    before = patches()
    with tw.reduce(model, tw.VQToken(keep=1.0)) as handle, virtual_unmerge(handle) as unmerging:
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **GREEDY), ids)
        assert unmerging.stats == {}
    handle = tw.reduce(model, Scattered())
    virtual_unmerge(handle)
    model(**inputs)
    assert torch.equal(model(**text).logits, other)
    handle.undo()  # which ends the unmerging, too
    assert patches() == before
    assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_identical_members_are_the_dense_model():
    """Where the tokens that merge are the same, and each sees the same, nothing changes: one layer, neighbours."""
    model = model_of("llama")
    inputs = rows_of(model, "left")[1][1]
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    embeddings = model.model.vision_tower.embeddings.position_embedding.weight
    embeddings[1:] = embeddings[1]
    del model.model.language_model.layers[1:]
    dense = model(**inputs).logits[0]
    with tw.reduce(model, Scattered(drops=False)) as handle:
        merged = model(**inputs).logits[0]
        with virtual_unmerge(handle):
            found = model(**inputs).logits[0]
    assert torch.allclose(found[-5:], dense[-5:], atol=1e-5)
    assert not torch.allclose(merged[-5:], dense[-5:], atol=1e-3)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm"])
@pytest.mark.parametrize("method", [tw.VQToken(keep=0.4), tw.AveragePool(keep=0.4), Scattered()], ids=type)
@torch.no_grad()
def test_other_models_generate_the_same_in_a_batch_and_alone(kind, method):
    model = vision_language(kind)
    inputs = batch_for(kind, model, ROWS)
    with tw.reduce(model, method) as handle:
        merged = model(**inputs).logits
        with virtual_unmerge(handle) as unmerging:
            found = model(**inputs).logits
            assert found.shape == merged.shape
            assert not torch.allclose(found, merged, atol=1e-3)
            assert unmerging.stats["members"] > unmerging.stats["tokens"]
            ids = model.generate(**inputs, **GREEDY)
            again = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(ids, again)


def test_training_reaches_the_vision_tower_and_the_layers():
    model = model_of("llama").train()
    inputs = batch_for("llava", model, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with tw.reduce(model, Scattered(drops=False)) as handle, virtual_unmerge(handle):
        model(**inputs, labels=labels).loss.backward()
    for parameter in (
        model.model.multi_modal_projector.linear_2.weight,
        model.model.language_model.layers[0].self_attn.q_proj.weight,
    ):
        assert parameter.grad.abs().sum() > 0


@torch.no_grad()
def test_what_cannot_be_unmerged_is_refused():
    model = model_of("llama")
    inputs = rows_of(model, "left")[1][0]
    ended = tw.reduce(model, Scattered())
    ended.undo()
    with pytest.raises(InputError, match="has ended"):
        virtual_unmerge(ended)
    with tw.reduce(model, tw.FasterVLM(keep=0.5)) as handle, pytest.raises(InputError, match="drops tokens"):
        virtual_unmerge(handle)
    for options in ({"masked": True}, {"positions": "compact"}):
        with tw.reduce(model, Scattered(), **options) as handle, pytest.raises(InputError, match="Leave it out"):
            virtual_unmerge(handle)
    with tw.reduce(model, tw.PyramidDrop(keep=0.5)) as handle:
        with pytest.raises(InputError, match="merges nothing at the input"):
            virtual_unmerge(handle)
        with tw.reduce(model, Scattered()) as handle, pytest.raises(InputError, match="in its layers"):
            virtual_unmerge(handle)
    for kind in ("qwen2_vl", "paligemma"):
        other = vision_language(kind)
        with tw.reduce(other, Scattered()) as handle, pytest.raises(InputError, match="is not known"):
            virtual_unmerge(handle)
    with tw.reduce(model, Scattered()) as handle, virtual_unmerge(handle):
        with pytest.raises(InputError, match="output_attentions"):
            model(**inputs, output_attentions=True)
        with pytest.raises(InputError, match="prefill_chunk_size"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=4)
        with pytest.raises(InputError, match="DynamicCache"):
            model.generate(**inputs, **GREEDY, cache_implementation="static")
        with pytest.raises(InputError, match="DynamicCache"), tw.cache.evict(model, tw.cache.KNorm(keep=0.5)) as cache:
            model.generate(**inputs, **GREEDY, past_key_values=cache)
        with pytest.raises(InputError, match="in its layers"):
            tw.reduce(model, tw.PyramidDrop(keep=0.5))
        with pytest.raises(InputError, match="in its layers"):
            virtual_unmerge(handle)
        assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 6
