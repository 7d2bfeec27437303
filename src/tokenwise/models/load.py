"""Making or loading what is trained: a causal language model or a classifier, and its tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenwise.errors import InputError, Problem, missing_file, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EOS, PAD = "<|endoftext|>", "<|padding|>"
SMALLEST_VOCABULARY = 256 + len((EOS, PAD))
"""Of a byte-level tokenizer: every byte and the special tokens."""

Head = Literal["causal", "classification", "image", "vision_language"]
"""What a model ends with: the prediction of the next token, in a ``vision_language`` model with images before it, or a
choice between classes of texts or of images."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def locate(name: str | Path, folder: Path | None = None, field: str = "model", weights: bool = True) -> Path:
    """The directory of a model, downloaded first where `name` is a hub id.

    Args:
        name: a local directory, or the id of a model on the Hugging Face hub.
        folder: where relative paths start; the current folder unless given.
        field: the field to name in an error.
        weights: whether the weights are needed too, or only configuration and tokenizer.

    Raises:
        InputError: when there is neither such a directory nor such a model within reach.
    """
    path = (folder or Path.cwd()) / Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        fix = "Write the directory that holds config.json."
        raise InputError(Problem(field, f"{str(path)!r} is a file, not a model directory.", fix))
    if not _HUB_ID.fullmatch(str(name)):
        raise InputError(missing_file(field, path))

    from huggingface_hub import snapshot_download

    files = _SMALL_FILES + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        message = f"there is no directory {str(path)!r}, and no hub model {str(name)!r} within reach ({reason})."
        similar = missing_file(field, path).fix
        download = f"Download it where there is a network and write its local directory, such as ./{path.name}."
        fix = similar if similar.startswith("Did you mean") else download
        raise InputError(Problem(field, message, fix)) from error


def read_config(directory: Path, field: str = "model", head: Head = "causal") -> PreTrainedConfig:
    """The configuration of a causal language model saved in `directory`, or of one that can classify.

    Raises:
        InputError: without a readable config.json, or when it describes another kind of model.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.is_file():
        fix = "Write the directory that save_pretrained made."
        if (directory / "adapter_config.json").is_file():
            fix = "It holds an adapter: merge it into its base model (merge_and_unload) and save that."
        raise InputError(Problem(field, f"{str(directory)!r} has no config.json.", fix))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(Problem(field, f"{str(file)!r} is not a model configuration ({error!r}).")) from error
    _check_model_type(model_type, f"{field} ({file.name})", values.get("architectures"), head)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the config classes raise errors of many kinds of their own
        raise InputError(Problem(field, f"{str(file)!r} cannot be used: {_one_line(error)}.")) from error
    _check_direction(config, field, head)
    return config


def check_weights(directory: Path, field: str = "model") -> None:
    """Check that all weights lie in `directory` as safetensors.

    Raises:
        InputError: when there are none, only pickled ones, or a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise InputError(Problem(field, f"{str(directory)!r} lacks the weights {', '.join(missing)}."))
    elif not (directory / "model.safetensors").is_file():
        pickled = any(directory.glob("pytorch_model*.bin"))
        raise InputError(
            Problem(
                field,
                f"{str(directory)!r} has no weights (model.safetensors)"
                + (", only pickled ones, which may run code when loaded." if pickled else "."),
                "Load them where you trust them and save_pretrained again." if pickled else "",
            )
        )


def make_config(
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    field: str = "model.config",
    head: Head = "causal",
) -> PreTrainedConfig:
    """The configuration of a model made from scratch.

    Args:
        fields: ``model_type`` and the fields of its config class.
        tokenizer: fills in vocab_size and the ids of BOS, EOS and padding where `fields` does not say them.
        field: the field to name in an error.
        head: what the model is to end with.

    Raises:
        InputError: for an unknown or unfit model type, unknown fields, values that do not fit, or a vocab_size
            that is too small for the tokenizer.
    """
    from transformers import CONFIG_MAPPING

    if "model_type" not in fields:
        raise InputError(Problem(f"{field}.model_type", "is missing.", "Write one such as llama or gpt2."))
    _check_model_type(fields["model_type"], f"{field}.model_type", head=head)
    config_class = CONFIG_MAPPING[fields["model_type"]]
    known = {entry.name for entry in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    if "rope_parameters" in known:
        known |= {"rope_theta", "rope_scaling"}  # older spellings that the config classes translate
    unknown = [name for name in fields if name not in known | {"model_type"}]
    if unknown:
        kind = f"a {fields['model_type']} config"
        raise InputError(
            Problem(f"{field}.{name}", f"{kind} has no field {name!r}.", nearest(str(name), known)) for name in unknown
        )
    values = {name: value for name, value in fields.items() if name != "model_type"}
    if tokenizer is not None:
        filled = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        values = {"vocab_size": largest_id(tokenizer) + 1, **filled, **values}
    try:
        config = config_class(**values)
        _check_direction(config, field, head)
        count_parameters(config, head)
    except InputError:
        raise
    except Exception as error:  # the config and model classes raise errors of many kinds of their own
        raise InputError(Problem(field, f"no model can be made from it: {_one_line(error)}.")) from error
    if tokenizer is not None:
        check_tokenizer_fits(config, tokenizer, f"{field}.vocab_size")
    return config


def count_parameters(config: PreTrainedConfig, head: Head = "causal") -> int:
    """How many parameters a model of this configuration has; nothing is allocated."""
    import torch

    with torch.device("meta"):
        return int(_auto_model(head).from_config(copy.deepcopy(config)).num_parameters())


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence the model was made for, None where it has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def make_or_load_model(
    spec: str | Path | Mapping[str, Any], seed: int, tokenizer: PreTrainedTokenizerBase, field: str = "model"
) -> PreTrainedModel:
    """The model to train, in fp32 on the CPU.

    Args:
        spec: a local directory, a hub id, or ``{"config": {...}}`` for a model made from scratch. Weights are read
            from safetensors only, and no code that comes with a model is run.
        seed: of the initial weights of a model made from scratch; the global random state is left as it was.
        tokenizer: must fit the model.
        field: the field to name in an error.

    Raises:
        InputError: when the model cannot be made or loaded, or does not fit the tokenizer.
    """
    import torch

    model: PreTrainedModel
    if isinstance(spec, Mapping):
        config = make_config(spec["config"], tokenizer, f"{field}.config")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = _auto_model().from_config(config, dtype=torch.float32)
        return model
    directory = locate(spec, field=field)
    check_tokenizer_fits(read_config(directory, field), tokenizer, field)
    return load_model(directory, field)


def load_model(name: str | Path, field: str = "model") -> PreTrainedModel:
    """A causal language model from a local directory or a hub id, in fp32 on the CPU, without its tokenizer.

    Raises:
        InputError: when it cannot be loaded, or its weights are incomplete.
    """
    import torch

    directory = locate(name, field=field)
    read_config(directory, field)
    check_weights(directory, field)
    model, loading = _auto_model().from_pretrained(
        directory,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(Problem(field, f"the weights in {str(directory)!r} lack {names}."))
    return model


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer is saved in a directory."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def make_or_load_classifier(
    spec: str | Path | Mapping[str, Any],
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    field: str = "model",
) -> PreTrainedModel:
    """The classifier to train, in fp32 on the CPU; see `make_or_load_model`.

    Args:
        spec: as there; a model saved without a classifier gets a new one on top.
        seed: of all new weights; the global random state is left as it was.
        tokenizer: must fit the model.
        classes: names of the classes.
        field: the field to name in an error.

    Raises:
        InputError: when the model cannot be made or loaded, does not fit the tokenizer, or classifies already, but not
            into as many classes.
    """
    import torch

    if isinstance(spec, Mapping):
        config = make_config(spec["config"], tokenizer, f"{field}.config", "classification")
    else:
        directory = locate(spec, field=field)
        config = read_config(directory, field, "classification")
        check_tokenizer_fits(config, tokenizer, field)
        check_weights(directory, field)
        check_classes(config, len(classes), field)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    # Decoders classify by the last token that is no padding, and find it by this.
    config.get_text_config().pad_token_id = padding_id(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(spec, Mapping):
            made: PreTrainedModel = _auto_model("classification").from_config(config, dtype=torch.float32)
            return made
        model, loading = _auto_model("classification").from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    inside = [name for name in loading["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    missing = sorted(name for name in inside if "pooler" not in name)
    if missing:
        raise InputError(Problem(field, f"the weights in {str(directory)!r} lack {', '.join(missing[:3])}."))
    loaded: PreTrainedModel = model
    return loaded


def check_classes(config: PreTrainedConfig, classes: int, field: str = "model") -> None:
    """Check that a model that classifies already does so into as many classes.

    Raises:
        InputError: when it has another number.
    """
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifies and config.num_labels != classes:
        message = f"classifies into {config.num_labels} classes, and the training data has {classes}."
        raise InputError(Problem(field, message, "Use the model it was made from, and it gets a new classifier."))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a batch is padded with: the tokenizer's padding, or EOS where it has none."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def load_tokenizer(directory: str | Path, field: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer saved in a local directory. No code that comes with it is run.

    Raises:
        InputError: when there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(missing_file(field, directory))
    if not has_tokenizer(directory):
        raise InputError(
            Problem(field, f"{str(directory)!r} has no tokenizer.", "Save it there with tokenizer.save_pretrained.")
        )
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizer files fail in many ways, each with an error of its own
        message = f"the tokenizer in {str(directory)!r} cannot be read: {_one_line(error)}."
        raise InputError(Problem(field, message)) from error


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer learnt from `documents`: no text is unknown to it. The same input gives the same one.

    Args:
        documents: the text to learn from.
        vocab_size: tokens at most, at least `SMALLEST_VOCABULARY`; fewer when the text has too few pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast_class: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerBase = fast_class(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    return fast


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id the tokenizer can give."""
    return max(tokenizer.get_vocab().values())


def check_tokenizer_fits(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, field: str = "model") -> None:
    """Check that the model has an embedding for every token.

    Raises:
        InputError: when the tokenizer gives ids beyond the model's vocabulary.
    """
    size, needed = config.get_text_config().vocab_size, largest_id(tokenizer) + 1
    if needed > size:
        raise InputError(
            Problem(
                field,
                f"the tokenizer does not fit the model: it gives ids up to {needed - 1}, "
                f"and the model has a vocabulary of {size} tokens.",
                f"Use the tokenizer the model was trained with, or a vocab_size of at least {needed}.",
            )
        )


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, directory: Path, field: str = "reference", config: Any = None
) -> None:
    """Check that the model in `directory` reads the token ids that `tokenizer` gives.

    Its own tokenizer, where one is saved with it, must have the same vocabulary; its embedding must cover all ids.

    Raises:
        InputError: when it has another vocabulary.
    """
    config = config or read_config(directory, field)
    fix = "Token ids mean other text to it: use a reference trained with the same tokenizer."
    size, needed = config.get_text_config().vocab_size, largest_id(tokenizer) + 1
    if needed > size:
        message = f"{str(directory)!r} has another vocabulary: {size} tokens, where the compared model's has {needed}."
        raise InputError(Problem(field, message, fix))
    if has_tokenizer(directory):
        theirs, ours = load_tokenizer(directory, field).get_vocab(), tokenizer.get_vocab()
        if theirs != ours:
            differing = len(theirs.items() ^ ours.items())
            message = f"{str(directory)!r} has another vocabulary: {differing} entries of the two tokenizers differ."
            raise InputError(Problem(field, message, fix))


def _check_model_type(
    model_type: Any, field: str, architectures: list[str] | None = None, head: Head = "causal"
) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFY

    if head == "image":
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGES

        if not isinstance(model_type, str) or model_type not in IMAGES:
            fix = nearest(str(model_type), IMAGES, "Use one such as vit, deit, dinov2 or siglip.")
            raise InputError(Problem(field, f"there is no image classifier of model type {model_type!r}.", fix))
        return
    if head == "vision_language":
        from tokenwise.models.vision_language import LAYOUTS

        if model_type not in LAYOUTS:
            fix = f"Known are {', '.join(LAYOUTS)}."
            raise InputError(Problem(field, f"{model_type!r} is no vision-language model known here.", fix))
        return
    if head == "classification":
        if not isinstance(model_type, str) or model_type not in CLASSIFY:
            fix = nearest(str(model_type), CLASSIFY, "Write one such as bert, roberta, modernbert or llama.")
            raise InputError(Problem(field, f"there is no classifier of model type {model_type!r}.", fix))
        return
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        fix = nearest(str(model_type), CAUSAL, "Write one such as llama, gpt2 or qwen3.")
        raise InputError(Problem(field, f"there is no model type {model_type!r}.", fix))
    if model_type not in CAUSAL or (architectures and not set(architectures) & set(CAUSAL.values())):
        what = (architectures or [model_type])[0]
        fix = "Use a causal language model such as llama, gpt2 or qwen3."
        raise InputError(Problem(field, f"{what!r} is not a causal language model.", fix))


def _check_direction(config: PreTrainedConfig, field: str, head: Head) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if head in ("image", "vision_language"):
        return
    if head == "classification":
        if config.is_encoder_decoder:
            raise InputError(Problem(field, f"{config.model_type!r} is an encoder-decoder model.", "Use an encoder."))
        return
    if config.is_encoder_decoder:
        fix = "Use a causal language model such as llama, gpt2 or qwen3."
        raise InputError(Problem(field, f"{config.model_type!r} is an encoder-decoder model.", fix))
    # Types that also serve as masked models read both ways unless told otherwise; elsewhere `is_decoder` means nothing.
    if config.model_type in MASKED and not getattr(config, "is_decoder", True):
        message = f"a {config.model_type!r} model sees the tokens it should predict."
        raise InputError(Problem(field, message, "Set is_decoder: true in its config, or use a causal model."))


def _auto_model(head: Head = "causal") -> Any:  # its stubs know nothing of output_loading_info
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
