import pytest
import torch

from tokenwise.errors import InputError
from tokenwise.models import load

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {"model_type": "llama", **SIZES, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return load.train_tokenizer(["some text"] * 3, 260)


def test_a_language_model_gets_a_new_classifier_that_depends_on_the_seed_alone(tokenizer, tmp_path):
    language_model = load.make_or_load_model({"config": CONFIG}, 0, tokenizer)
    language_model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (
        load.make_or_load_classifier(tmp_path, seed, tokenizer, ["a", "b", "c"]) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first.score.weight.shape == (3, 16)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert torch.equal(first.model.embed_tokens.weight, language_model.model.embed_tokens.weight)
    assert first.config.pad_token_id == tokenizer.pad_token_id
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_classifier_keeps_its_own_and_must_have_as_many_classes(tokenizer, tmp_path):
    made = load.make_or_load_classifier({"config": CONFIG}, 0, tokenizer, ["a", "b", "c"])
    made.save_pretrained(tmp_path)
    loaded = load.make_or_load_classifier(tmp_path, 5, tokenizer, ["a", "b", "c"])
    assert torch.equal(loaded.score.weight, made.score.weight)
    with pytest.raises(InputError, match="classifies into 3 classes, and the training data has 2"):
        load.make_or_load_classifier(tmp_path, 0, tokenizer, ["a", "b"])


@pytest.mark.parametrize(
    ("model_type", "message"), [("bret", "Did you mean 'bert'"), ("bart", "'bart' is an encoder-decoder model")]
)
def test_what_cannot_classify_is_refused(tokenizer, model_type, message):
    with pytest.raises(InputError, match=message):
        load.make_config({"model_type": model_type}, tokenizer, "config", "classification")
