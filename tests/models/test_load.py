import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from tokenwise.errors import InputError
from tokenwise.models import load

TEXT = [f"def f{i}(x):\n    return x + {i}  # größer\n" for i in range(60)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIG = {"model_type": "llama", **SIZES}


@pytest.fixture(scope="module")
def tokenizer():
    return load.train_tokenizer(TEXT, 300)


@pytest.fixture
def saved(tmp_path, tokenizer):
    model = load.make_or_load_model({"config": CONFIG}, 0, tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def message(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_trained_tokenizer_reads_any_text_and_is_always_the_same(tokenizer, tmp_path):
    assert len(tokenizer) == 300
    text = "日本語 \x00 <b>né\n\n  \ttab"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load.train_tokenizer(TEXT, 300).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = load.load_tokenizer(tmp_path)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (again.eos_token, again.pad_token, again.bos_token) == (load.EOS, load.PAD, None)


def test_a_tokenizer_stays_smaller_where_there_is_nothing_to_merge():
    assert len(load.train_tokenizer(["ab"], 1000)) == load.SMALLEST_VOCABULARY + 1


def test_a_new_model_takes_its_vocabulary_from_the_tokenizer(tokenizer):
    config = load.make_config(CONFIG, tokenizer)
    assert config.vocab_size == 300
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.bos_token_id is None
    assert load.make_config({**CONFIG, "vocab_size": 320}, tokenizer).vocab_size == 320
    assert load.make_config({"model_type": "gpt2", "hidden_size": 24}, tokenizer).n_embd == 24


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (load.make_or_load_model({"config": CONFIG}, seed, tokenizer) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in same.state_dict().items())
    assert not torch.equal(other.model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_saved_model_comes_back(saved, tokenizer):
    model = load.make_or_load_model(saved, 9, tokenizer)
    expected = load.make_or_load_model({"config": CONFIG}, 0, tokenizer).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_parameters_are_counted_without_making_the_model(tokenizer):
    config = load.make_config(CONFIG, tokenizer)
    assert load.count_parameters(config) == LlamaForCausalLM(config).num_parameters()
    assert load.max_positions(config) == 2048


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**CONFIG, "model_type": "lama"}, "config.model_type: there is no model type 'lama'. Did you mean 'llama'?"),
        ({**CONFIG, "model_type": 3}, "there is no model type 3"),
        (SIZES, "model.config.model_type: is missing."),
        ({**CONFIG, "hiden_size": 16}, "config.hiden_size: a llama config has no field 'hiden_size'. Did you mean"),
        ({"model_type": "vit"}, "'vit' is not a causal language model."),
        ({"model_type": "t5"}, "'t5' is not a causal language model."),
        ({"model_type": "bart"}, "'bart' is an encoder-decoder model."),
        ({"model_type": "bert"}, "sees the tokens it should predict. Set is_decoder: true"),
        ({**CONFIG, "hidden_size": 17}, "not a multiple of the number of attention heads"),
        ({**CONFIG, "hidden_size": "big"}, "expected int, got str"),
        ({**CONFIG, "vocab_size": 299}, "config.vocab_size: the tokenizer does not fit the model: it gives ids"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_config_is_said(fields, expected, tokenizer):
    assert expected in message(load.make_config, fields, tokenizer)


def test_older_spellings_of_a_config_are_understood(tokenizer):
    config = load.make_config({**CONFIG, "rope_theta": 5000.0}, tokenizer)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert load.make_config({"model_type": "bert", "is_decoder": True, **SIZES}, tokenizer).is_decoder


def test_a_directory_must_hold_a_causal_language_model(tmp_path):
    assert "has no config.json" in message(load.read_config, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in message(load.read_config, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not a model configuration" in message(load.read_config, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    assert "there is no model type 'own'" in message(load.read_config, tmp_path)
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=10)).save_pretrained(tmp_path / "bert")
    assert "'BertForMaskedLM' is not a causal language model" in message(load.read_config, tmp_path / "bert")


def test_weights_are_safetensors_and_whole(saved, tokenizer):
    weights = load_file(saved / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "q_proj" not in k}, saved / "model.safetensors", {"format": "pt"})
    assert "lack model.layers.0.self_attn.q_proj.weight." in message(load.make_or_load_model, saved, 0, tokenizer)
    (saved / "model.safetensors").unlink()
    assert "has no weights (model.safetensors)." in message(load.make_or_load_model, saved, 0, tokenizer)
    torch.save(weights, saved / "pytorch_model.bin")
    assert "only pickled ones, which may run code" in message(load.check_weights, saved)
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert "lacks the weights one.safetensors" in message(load.check_weights, saved)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(saved):
    larger = load.train_tokenizer(TEXT, 320)
    assert "ids up to 319, and the model has a vocabulary of 300" in message(load.make_or_load_model, saved, 0, larger)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    assert "has no tokenizer" in message(load.load_tokenizer, tmp_path)
    assert "does not exist" in message(load.load_tokenizer, tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read" in message(load.load_tokenizer, tmp_path)


def test_a_reference_must_have_the_same_vocabulary(saved, tokenizer):
    load.check_same_vocabulary(tokenizer, saved)
    other = load.train_tokenizer([text.upper() for text in TEXT], 300)
    assert "has another vocabulary" in message(load.check_same_vocabulary, other, saved)
    larger = load.train_tokenizer(TEXT, 320)
    assert "300 tokens, where the compared model's has 320" in message(load.check_same_vocabulary, larger, saved)
    (saved / "tokenizer.json").unlink()
    (saved / "tokenizer_config.json").unlink()
    load.check_same_vocabulary(tokenizer, saved)  # only the sizes can be compared


def test_local_directories_are_found_before_the_hub(saved, monkeypatch):
    def unreachable(name, **options):
        raise OSError(f"Cannot reach the hub.\nNot even for {name}.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert load.locate("model", saved.parent) == saved
    assert load.locate("./model", saved.parent) == saved
    assert "Did you mean" in message(load.locate, "./modle", saved.parent)
    assert "is a file" in message(load.locate, "model/config.json", saved.parent)
    said = message(load.locate, "some/model", saved.parent, "task.model")
    assert said.startswith("task.model: there is no directory")
    assert "no hub model 'some/model' within reach (Cannot reach the hub.)" in said
    assert "write its local directory, such as ./model." in said


def test_hub_models_are_fetched_without_pickled_weights_or_code(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load.locate("some/model", tmp_path) == tmp_path
    assert asked["name"] == "some/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.bin", "*.py", "*"} & set(asked["allow_patterns"])
    load.locate("some/model", tmp_path, weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_the_config_of_a_saved_model_is_read(saved):
    assert isinstance(load.read_config(saved), LlamaConfig)
    edit(saved / "config.json", hidden_size="big")
    assert "cannot be used" in message(load.read_config, saved)
