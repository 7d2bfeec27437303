"""The cache as users pass it around: to other models, wrapped ones, copied, with other rows, interrupted."""

import copy
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_decoders import decoder, difference, generate, prompt

import tokenwise as tw
from tokenwise.errors import InputError

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SNAP = tw.SnapKV(keep=0.5, queries=4)
METHODS = [SNAP, SNAP.replace(allocate="heads"), SNAP.replace(bits=4), tw.KVzip(keep=0.5), tw.Quest(keep=0.5, page=4)]


def named(method):
    return f"{method.card.id}-{getattr(method, 'allocate', '')}-{getattr(method, 'bits', '')}"


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_copy_goes_on_as_the_original_does_and_shares_nothing_with_it(method):
    model, ids = decoder(), prompt(40, 2)
    ids[0, :7] = 0
    more = prompt(5, 2, seed=1)
    everything = torch.cat([(ids != 0).long(), torch.ones_like(more)], 1)
    with torch.no_grad(), tw.evict(model, method) as cache:
        model(ids, attention_mask=(ids != 0).long(), past_key_values=cache)
        first, second = copy.deepcopy(cache), copy.deepcopy(cache)
        del cache
        assert first.model is model
        answers = [model(more, attention_mask=everything, past_key_values=each).logits for each in (first, second)]
        assert torch.equal(*answers)
        assert first.stats == second.stats
        assert first.get_seq_length() == 45
        first.undo()
        model(more[:, :1], past_key_values=second)
        assert second.get_seq_length() == 46


def test_the_copy_of_an_undone_cache_is_undone():
    cache = tw.evict(decoder(), SNAP)
    generate(cache.model, prompt(), cache)
    cache.undo()
    with pytest.raises(InputError, match="undone"):
        generate(cache.model, prompt(50), copy.deepcopy(cache))


def test_pickling_is_refused():
    with pytest.raises(TypeError, match="deepcopy"):
        pickle.dumps(tw.evict(decoder(), SNAP))


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_other_rows_than_it_stores_are_refused(method):
    model = decoder()
    with torch.no_grad(), tw.evict(model, method) as cache:
        model(prompt(40), past_key_values=cache)
        with pytest.raises(InputError, match="1 rows, and 2"):
            model(prompt(3, 2), past_key_values=cache)
        assert model(prompt(3), past_key_values=cache).logits.isfinite().all()
        assert cache.get_seq_length() == 43


@pytest.mark.parametrize("method", [SNAP, tw.Quest()], ids=named)
def test_the_cache_of_another_model_is_refused(method):
    model, other = decoder(), decoder()
    with tw.evict(model, method) as cache:
        with pytest.raises(InputError, match="another model"):
            generate(other, prompt(), cache)
        plain = generate(model, prompt(), cache)
        with tw.evict(model, method) as again:
            assert difference(plain, generate(model, prompt(), again)) == 0


def test_an_attention_that_changes_its_keys_after_they_are_stored_is_refused():
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    config = transformers.DeepseekV3Config(**{**SMALL, "num_key_value_heads": 2}, **sizes, **experts)
    model = transformers.DeepseekV3ForCausalLM(config)
    with tw.evict(model, SNAP) as cache, pytest.raises(InputError, match="changes its keys"):
        generate(model, prompt(), cache)


def test_an_attention_that_the_interface_does_not_serve_is_refused_at_once():
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(InputError, match="AttentionInterface"):
        tw.evict(falcon, SNAP)


def test_layers_that_read_the_keys_of_others_are_refused():
    config = transformers.Gemma3nTextConfig(
        **SMALL,
        head_dim=8,
        num_kv_shared_layers=1,
        layer_types=["full_attention", "full_attention"],
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=4,
        laurel_rank=2,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    with pytest.raises(InputError, match="keys of another layer"):
        tw.evict(transformers.Gemma3nForCausalLM(config), SNAP)


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="no model"):
        tw.evict("llama", SNAP)


@pytest.mark.parametrize("method", [SNAP, tw.KVzip(keep=0.5)], ids=named)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_adapters_is_evicted_from_as_the_plain_one(method, wrapped):
    with tw.evict(decoder(), method) as cache:
        expected = generate(cache.model, prompt(), cache)
    base = decoder()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with tw.evict(model if wrapped else base, method) as cache:
        found = generate(model, prompt(), cache)
        assert cache.stats["tokens_stored"] == 20
    assert difference(found, expected) == 0


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_full_budget_can_be_decoded_with_an_assistant(kind):
    model, ids = decoder(kind), prompt(40)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    with tw.evict(model, SNAP.replace(keep=1.0)) as cache:
        options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)
        assert cache.is_croppable
        assert cache.stats["tokens_stored"] == cache.stats["tokens_seen"] > 40
    with tw.evict(model, SNAP) as cache:
        generate(model, ids, cache)
        # What transformers asks before it rolls a cache back by itself.
        assert not cache.is_croppable


@pytest.mark.parametrize("method", [tw.H2O(keep=0.5), tw.TOVA(keep=0.5)], ids=named)
def test_a_token_that_broke_off_is_not_counted(method):
    model = decoder()
    with torch.no_grad(), tw.evict(model, method) as cache:
        model(prompt(40), past_key_values=cache)
        stop = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(4):
            with pytest.raises(ZeroDivisionError):
                model(prompt(1, seed=1), past_key_values=cache)
        stop.remove()
        for token in prompt(8, seed=1).T:
            model(token[None], past_key_values=cache)
        assert [int(cache.kept(index).sum(2).max()) for index in cache.places] == [24, 24, 24]


def test_kv_zip_forgets_the_ids_of_what_is_taken_back():
    model = decoder()
    with torch.no_grad(), tw.evict(model, tw.KVzip(keep=0.5)) as cache, tw.evict(model, tw.KVzip(keep=0.5)) as plain:
        for each in (cache, plain):
            model(prompt(40), past_key_values=each)
        for token in prompt(3, seed=5).T:
            model(token[None], past_key_values=cache)
        cache.take_back(3)
        found, expected = (model(prompt(10, seed=2), past_key_values=each).logits for each in (cache, plain))
        assert torch.equal(found, expected)
        assert all(torch.equal(cache.kept(index), plain.kept(index)) for index in cache.places)


def test_an_even_kernel_is_refused():
    with pytest.raises(InputError, match="3 or 5"):
        tw.SnapKV(kernel=4)


@pytest.mark.parametrize("method", [SNAP, tw.Quest()], ids=named)
def test_a_prompt_without_new_tokens_is_refused(method):
    with tw.evict(decoder(), method) as cache:
        generate(cache.model, prompt(40), cache)
        with pytest.raises(InputError, match="beyond the 45"):
            generate(cache.model, prompt(10, seed=1), cache)
        cache.reset()
        assert generate(cache.model, prompt(30, seed=1), cache).sequences.shape == (1, 36)


@pytest.mark.parametrize("method", [*METHODS, tw.StreamingLLM(keep=0.5), tw.H2O(keep=0.5)], ids=named)
def test_what_was_read_in_inference_mode_is_gone_on_with_outside_of_it(method):
    model, answers = decoder(), []
    for mode in (torch.inference_mode, torch.no_grad):
        with tw.evict(model, method) as cache:
            with mode():
                generate(model, prompt(40), cache)
            with torch.no_grad():
                answers.append([model(token[None], past_key_values=cache).logits for token in prompt(4, seed=3).T])
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


@pytest.mark.parametrize("method", [*METHODS, tw.H2O(keep=0.5)], ids=named)
def test_gradients_flow_through_the_tokens_that_follow(method):
    model = decoder().train()
    with torch.enable_grad(), tw.evict(model, method) as cache:
        model(prompt(40), past_key_values=cache)
        logits = [model(token[None], past_key_values=cache).logits for token in prompt(3, seed=3).T]
        torch.cat(logits).square().sum().backward()
    gradient = model.model.layers[0].self_attn.v_proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_a_cache_that_is_undone_while_it_is_held_stays_whole():
    cache = tw.evict(decoder(), SNAP)
    with cache.held():
        cache.model(prompt(20), past_key_values=cache)
        cache.undo()
    assert cache.layers[0].stored == 20
    assert cache.model(prompt(2), past_key_values=cache).logits.isfinite().all()


def test_a_budget_beyond_all_numbers_is_a_full_one():
    with tw.evict(decoder(), SNAP.replace(keep="99999999999999999999 GiB")) as cache:
        generate(cache.model, prompt(), cache)
        assert cache.stats["tokens_stored"] == 40
