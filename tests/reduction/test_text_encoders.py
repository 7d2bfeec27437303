"""reduce in text encoders: padding goes first and joins nothing, and what is refused is refused before a block runs."""

import pytest
import torch
import transformers
from small_texts import TEXT, batch, text

import tokenwise as tw
from tokenwise.errors import InputError

METHODS = {
    "tome": lambda keep: tw.ToMe(keep=keep),
    "evit": lambda keep: tw.EViT(keep=keep),
    "random_drop": lambda keep: tw.RandomDrop(keep=keep),
}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).last_hidden_state


def real(tokens):
    """Which of the tokens that are left are none of the padding."""
    whole = torch.ones(tokens.positions.shape, dtype=torch.bool)
    return whole if tokens.padding is None else ~tokens.padding


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("name", METHODS)
def test_reducing_equals_hiding_for_the_real_tokens(kind, name):
    model, inputs = text(kind), batch()
    dense = run(model, inputs)
    with tw.reduce(model, METHODS[name](0.6)) as handle:
        fast, tokens = run(model, inputs), handle.last
    with tw.reduce(model, METHODS[name](0.6), masked=True) as handle:
        slow = run(model, inputs)
        assert torch.equal(handle.last.positions, tokens.positions)
    kept = real(tokens)
    expected = slow.gather(1, tokens.positions.unsqueeze(2).expand_as(fast))
    assert torch.allclose(fast[kept], expected[kept], atol=2e-5)
    assert not torch.allclose(fast[0, 0], dense[0, 0], atol=1e-3)
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.35])
def test_padding_goes_first_and_joins_nothing(name, keep):
    model, inputs = text("bert"), batch()
    padding = inputs["attention_mask"] == 0
    with tw.reduce(model, METHODS[name](keep)) as handle:
        run(model, inputs)
        tokens = handle.last
    for row in range(3):
        left = tokens.positions[row][real(tokens)[row]]
        group = tokens.group[row]
        # No real token is in a group with padding, unless all that is fused into one token.
        if name != "evit":
            with_padding = set(group[padding[row]].tolist()) - {-1}
            assert with_padding.isdisjoint(group[~padding[row]].tolist())
        lost = int((~padding[row]).sum()) - len(left)
        if tokens.padding is not None and tokens.padding[row].any():
            assert lost == 0
        assert 0 in left


def test_a_padded_text_is_as_it_is_alone_once_its_padding_is_gone():
    # 9 words of 24 places: ToMe drops the 15 places of padding before it merges two words.
    model, inputs = text("bert"), batch((24, 9))
    single = {name: value[1:, :9] for name, value in inputs.items()}
    with tw.reduce(model, tw.ToMe(keep=0.8)) as handle:
        found = run(model, inputs)[1][real(handle.last)[1]]
    assert len(found) == 9
    assert torch.allclose(found, run(model, single)[0], atol=1e-5)


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_sizes_count_the_real_tokens(keep):
    model, inputs = text("roberta"), batch()
    with tw.reduce(model, tw.ToMe(keep=keep)) as handle:
        run(model, inputs)
        tokens = handle.last
    assert torch.equal((tokens.size * real(tokens)).sum(1), inputs["attention_mask"].sum(1).float())


def test_classifying_and_learning_through_merges():
    model, inputs = text("bert", task=transformers.AutoModelForSequenceClassification, num_labels=3), batch()
    dense = model(**inputs).logits
    model.train()
    labels = torch.tensor([0, 1, 2])
    with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        out = model(**inputs, labels=labels)
        out.loss.backward()
        assert handle.stats["tokens_after"] < 12
    gradient = model.bert.embeddings.word_embeddings.weight.grad
    # Every word of the longest text moved the loss, merged or not.
    assert (gradient[inputs["input_ids"][0]].abs().sum(1) > 0).all()
    assert torch.equal(model.eval()(**inputs).logits, dense)


def test_the_gradient_through_merges_is_the_slope():
    model, inputs = text("bert").double(), batch((12, 7))
    embedded = model.embeddings(inputs["input_ids"]).detach().requires_grad_()

    def loss():
        return model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0, 0].sum()

    with tw.reduce(model, tw.ToMe(keep=0.6)):
        (found,) = torch.autograd.grad(loss(), embedded)
        step = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6
        with torch.no_grad():
            embedded += step
            after = loss()
            embedded -= 2 * step
            before = loss()
    assert torch.allclose((found * step).sum() * 2, after - before, rtol=1e-4)


def test_dropout_in_training_works_on_what_is_left():
    model, inputs = text("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train(), batch()
    with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        torch.manual_seed(1)
        first = run(model, inputs)
        torch.manual_seed(1)
        assert torch.equal(run(model, inputs), first)
        torch.manual_seed(2)
        other = run(model, inputs)
        assert first.shape[1] == other.shape[1] == handle.stats["tokens_after"]
        assert not torch.equal(first, other)


def test_hidden_states_of_differing_lengths_are_refused():
    model, inputs = text("bert"), batch()
    ran = []
    model.encoder.layer[0].attention.register_forward_hook(lambda *_: ran.append(1))
    with tw.reduce(model, tw.ToMe(keep=0.5)):
        with pytest.raises(InputError, match="output_hidden_states: asks for the tokens after every block"):
            model(**inputs, output_hidden_states=True)
        model.config.output_hidden_states = True
        with pytest.raises(InputError, match="output_hidden_states"):
            model(**inputs)
        model.config.output_hidden_states = False
        assert not ran
        model(**inputs)
    with tw.reduce(model, tw.ToMe(keep=0.5), masked=True), torch.no_grad():
        assert len({state.shape for state in model(**inputs, output_hidden_states=True).hidden_states}) == 1
    with tw.reduce(model, tw.ToMe(keep=1.0)), torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5


def test_gradient_checkpointing_is_refused():
    model, inputs = text("bert").train(), batch()
    model.gradient_checkpointing_enable()
    with tw.reduce(model, tw.ToMe(keep=0.5)), pytest.raises(InputError, match="gradient_checkpointing_disable"):
        model(**inputs)
    model.eval()
    with tw.reduce(model, tw.ToMe(keep=0.5)):
        run(model, inputs)


@pytest.mark.parametrize("task", ["TokenClassification", "MaskedLM", "QuestionAnswering"])
def test_models_that_answer_for_every_token_are_refused(task):
    model, inputs = text("bert", task=getattr(transformers, f"AutoModelFor{task}")), batch()
    with pytest.raises(InputError, match="answers for every token"):
        tw.reduce(model, tw.ToMe())
    with tw.reduce(model, tw.ToMe(keep=0.5), masked=True), torch.no_grad():
        assert model(**inputs)[0].shape[1] == 24


def test_padding_at_the_beginning_and_packed_texts_are_refused():
    model, inputs = text("bert"), batch()
    left = {name: value.flip(1) for name, value in inputs.items()}
    packed = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    packed[..., :10, 10:] = packed[..., 10:, :10] = False
    with tw.reduce(model, tw.ToMe(keep=0.5)):
        with pytest.raises(InputError, match="padding_side = 'right'"):
            model(**left)
        with pytest.raises(InputError, match="a row of its own"):
            model(inputs["input_ids"][:1], attention_mask=packed)


def test_budgets_that_leave_none_are_refused_at_once():
    for keep in ("1 tokens", "1 token"):
        with pytest.raises(InputError, match="none besides the 1 protected"):
            tw.reduce(text("bert"), tw.ToMe(keep=keep))


def test_two_methods_at_once_are_refused():
    model, inputs = text("bert"), batch()
    with tw.reduce(model, tw.ToMe(keep=0.5)):
        with pytest.raises(InputError, match="being reduced already"):
            tw.reduce(model, tw.RandomDrop())
        run(model, inputs)
    with tw.reduce(model, tw.RandomDrop(keep=0.5)) as handle:
        run(model, inputs)
    assert handle.stats["tokens_after"] < 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = text("bert").to(dtype), batch()
    for method in METHODS.values():
        with tw.reduce(model, method(0.5)) as handle:
            found = run(model, inputs)
        assert found.dtype == dtype
        assert torch.isfinite(found[real(handle.last)]).all()


@pytest.mark.parametrize("kind", TEXT)
def test_classifiers_of_every_kind(kind):
    model, inputs = text(kind, task=transformers.AutoModelForSequenceClassification), batch()
    with torch.no_grad():
        dense = model(**inputs).logits
        with tw.reduce(model, tw.ToMe(keep=0.6)) as handle:
            fast = model(**inputs).logits
        with tw.reduce(model, tw.ToMe(keep=0.6), masked=True):
            slow = model(**inputs).logits
    assert handle.stats["macs_share"] < 0.7
    assert torch.allclose(fast, slow, atol=1e-6)
    assert not torch.allclose(fast, dense, atol=1e-4)


def test_positions_counted_from_the_tokens_are_refused():
    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for config in (
        transformers.ModernBertConfig(intermediate_size=64, pad_token_id=0, **small),
        transformers.DebertaV2Config(intermediate_size=64, **small),
        transformers.EsmConfig(intermediate_size=64, position_embedding_type="rotary", pad_token_id=1, **small),
    ):
        with pytest.raises(InputError, match="those with learned positions"):
            tw.reduce(transformers.AutoModel.from_config(config), tw.ToMe())


def test_a_decoder_is_refused():
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(InputError, match="GPT2Model is a decoder"):
        tw.reduce(transformers.GPT2Model(config), tw.ToMe())
    bert = text("bert", is_decoder=True)
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(bert, tw.ToMe())


def test_the_text_half_of_a_pair_is_no_encoder_to_reduce():
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**shared, "vocab_size": 60},
            vision_config={**shared, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
        assert handle.encoder.module is model.vision_model.encoder
    with pytest.raises(InputError, match="no encoder of a known layout"):
        tw.reduce(model.text_model, tw.ToMe())
