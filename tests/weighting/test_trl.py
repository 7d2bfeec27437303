"""weigh on TRL's SFTTrainer: the method's update, TRL's own metrics, columns through packing and padding, refusals."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from layouts import LENGTHS, OPTIONS
from reference_steps import TOLERANCE, distance, weighted_step
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import tokenwise as tw
from tokenwise.errors import InputError

trl = pytest.importorskip("trl")


class WeighedSFTTrainer(tw.WeighMixin, trl.SFTTrainer):
    """What the documentation tells users to write."""


class FocalWeightMean(tw.weighting.PointwiseWeighter):
    """Focal weights, divided by their own sum."""

    reduction = "weight_mean"

    def pointwise(self, batch):
        weight = 1 - torch.exp(-batch.nll)
        return weight * batch.nll, weight


class WeightsPerSequence(tw.LossWeights):
    """The column's weights, mean per sequence, mean over sequences."""

    reduction = "sequence_mean"


class WeightsPerNonzero(tw.LossWeights):
    """The column's weights over the number that is not zero."""

    reduction = "nonzero_mean"


class BySample(tw.weighting.TokenWeighter):
    """Weighs each token by the number of its sample."""

    reads = frozenset({"sample_id"})

    def weights(self, batch, state=None):
        return batch.sample_id.float() + 1


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(62)} | {"<pad>": 62, "<eos>": 63}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def samples(seed=0):
    """Eight samples of different lengths with masked beginnings, and a value of each column for each token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(1, 60, (length,), generator=generator)
        labels = ids.clone()
        labels[: index % 3 + 1] = -100
        weights = torch.rand(length, generator=generator)
        weights[weights < 0.4] = 0
        nll = torch.rand(length, generator=generator) * 5
        rows.append(
            {
                "input_ids": ids.tolist(),
                "labels": labels.tolist(),
                "loss_weights": weights.tolist(),
                # What nothing predicts has no value.
                "reference_nll": [None, *nll.tolist()[1:]],
                "sample_id": index,
            }
        )
    return rows


def make(model, rows, tmp_path, batch=8, accumulate=1, cls=trl.SFTTrainer, peft_config=None, **options):
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **{
            **OPTIONS,
            "max_steps": 1,
            "max_length": None,
            "max_grad_norm": 0.0,
            "gradient_checkpointing": False,
            "bf16": False,
            "shuffle_dataset": False,
            **options,
        },
    )
    data = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return cls(
        copy.deepcopy(model), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config
    )


def train(model, rows, method, tmp_path, *layout, resume=None, **options):
    trainer = make(model, rows, tmp_path, *layout, **options)
    handle = None if method is None else tw.weigh(trainer, method)
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, logs, handle


def expected_step(model, rows, method, clip=0.0):
    """The update on whole logits: (loss, model)."""
    pairs = [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
    columns = [
        {
            "loss_weights": torch.tensor(row["loss_weights"]),
            "reference_nll": torch.tensor([0.0, *row["reference_nll"][1:]]),
            "sample_id": torch.full((len(row["labels"]),), row["sample_id"]),
        }
        for row in rows
    ]
    return weighted_step(model, pairs, method, columns=columns, clip=clip)


METHODS = {
    "uniform": lambda reference: tw.Uniform(),
    "dft": lambda reference: tw.DFT(),
    "excess_loss": lambda reference: tw.ExcessLoss(keep=0.6, reference=reference, scope="sequence"),
    "excess_loss step": lambda reference: tw.ExcessLoss(keep=0.6, reference=reference, scope="step"),
    "top_entropy step": lambda reference: tw.TopEntropy(keep=0.4, scope="step"),
    "dynamic_loss step": lambda reference: tw.DynamicLoss(scope="step"),
    "loss_weights": lambda reference: tw.LossWeights(),
    "weights per sequence": lambda reference: WeightsPerSequence(),
    "weights per nonzero": lambda reference: WeightsPerNonzero(),
    "by sample": lambda reference: BySample(),
    "focal weight_mean": lambda reference: FocalWeightMean(),
}
LAYOUTS = {
    "one batch": (8, 1, {}),
    "accumulate 2": (4, 2, {}),
    "accumulate 4": (2, 4, {}),
    "padding-free": (4, 2, {"padding_free": True}),
    "packed": (1, 4, {"packing": True, "max_length": 20, "cls": WeighedSFTTrainer}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_layout_gives_the_update_of_the_reference(name, tiny_llama, reference_directory, tmp_path):
    model, rows, method = tiny_llama.double(), samples(), METHODS[name](reference_directory)
    loss, expected = expected_step(model, rows, method)
    for layout, (batch, accumulate, options) in LAYOUTS.items():
        found, logs, _ = train(model, rows, method, tmp_path, batch, accumulate, **options)
        assert distance(found, expected) < TOLERANCE, layout
        assert logs[0]["loss"] == pytest.approx(loss, abs=1e-6), layout


@pytest.mark.parametrize("name", ["focal weight_mean", "dft"])
def test_gradients_are_clipped_after_their_correction(name, tiny_llama, tmp_path):
    model, method = tiny_llama.double(), METHODS[name](None)
    _, expected = expected_step(model, samples(), method, clip=0.05)
    found, logs, _ = train(model, samples(), method, tmp_path, 2, 4, max_grad_norm=0.05)
    assert distance(found, expected) < TOLERANCE
    assert logs[0]["grad_norm"] > 0.05


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_stock_losses_and_metrics(loss_type, tiny_llama, tmp_path):
    stock, theirs, _ = train(tiny_llama, samples(), None, tmp_path, 4, 2, max_steps=3, loss_type=loss_type)
    method = tw.Uniform() if loss_type == "nll" else tw.DFT()
    ours, logs, _ = train(tiny_llama, samples(), method, tmp_path, 4, 2, max_steps=3)
    assert distance(ours, stock) < 1e-5 < distance(ours, tiny_llama)
    for mine, other in zip(logs, theirs, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4), name


@pytest.mark.parametrize("name", ["loss_weights", "top_entropy step", "excess_loss", "focal weight_mean"])
def test_metrics_are_of_every_label_but_those_that_the_data_gives_no_weight(
    name, tiny_llama, reference_directory, tmp_path
):
    rows = samples()
    for row in rows:  # every other label is the most likely token
        likely = [0, *tiny_llama(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(1).tolist()]
        labels = enumerate(zip(row["labels"], likely, strict=True))
        row["labels"] = [best if label != -100 and index % 2 else label for index, (label, best) in labels]
    masked = rows
    if name == "loss_weights":  # for the model alone a label of weight zero is one that is masked
        masked = [dict(row) for row in rows]
        for row in masked:
            pairs = zip(row["labels"], row["loss_weights"], strict=True)
            row["labels"] = [label if weight else -100 for label, weight in pairs]
    _, theirs, _ = train(tiny_llama, masked, None, tmp_path, 4, 2)
    _, logs, handle = train(tiny_llama, rows, METHODS[name](reference_directory), tmp_path, 4, 2)
    assert 0.4 < theirs[0]["mean_token_accuracy"] < 0.65
    for metric in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert logs[0][metric] == pytest.approx(theirs[0][metric], abs=1e-5), metric
    assert name == "focal weight_mean" or handle.stats["kept_share"] < 0.8


def test_lora_trains_as_with_the_stock_loss(tiny_llama, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    stock, theirs, _ = train(tiny_llama, samples(), None, tmp_path, 4, 2, peft_config=config, max_steps=2)
    ours, logs, _ = train(tiny_llama, samples(), tw.Uniform(), tmp_path, 4, 2, peft_config=config, max_steps=2)
    assert distance(ours, stock) < 1e-6
    assert logs[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-5)
    options = {"packing": True, "max_length": 20, "cls": WeighedSFTTrainer, "peft_config": config}
    packed, _, handle = train(tiny_llama, samples(), WeightsPerNonzero(), tmp_path, 1, 4, **options)
    padded, _, _ = train(tiny_llama, samples(), WeightsPerNonzero(), tmp_path, 4, 2, peft_config=config)
    assert distance(packed, padded) < 1e-5 < distance(packed, ours)
    assert 0.4 < handle.stats["kept_share"] < 0.8


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_cuts_the_columns_with_the_tokens(mode, tiny_llama, tmp_path):
    rows = samples()
    kept = slice(None, 8) if mode == "keep_start" else slice(-8, None)
    cut = [{name: v[kept] if isinstance(v, list) else v for name, v in row.items()} for row in rows]
    options = {"max_length": 8, "truncation_mode": mode}
    method = WeightsPerNonzero()
    found, _, _ = train(tiny_llama, rows, method, tmp_path, 4, 2, cls=WeighedSFTTrainer, **options)
    expected, _, _ = train(tiny_llama, cut, method, tmp_path, 4, 2)
    assert distance(found, expected) < 1e-6 < distance(found, tiny_llama)
    with pytest.raises(InputError, match=r"train_dataset\[0\].loss_weights: has 12 values for 8 tokens.*WeighMixin"):
        tw.weigh(make(tiny_llama, rows, tmp_path, **options), method)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_each_value_at_its_token(strategy, tiny_llama, tmp_path):
    rows = samples()
    for row in rows:  # a value that says which token it belongs to
        row["loss_weights"] = [float(token) for token in row["input_ids"]]
        del row["reference_nll"]
    options = {"packing": True, "packing_strategy": strategy, "max_length": 10, "shuffle_dataset": True}
    stock = make(tiny_llama, rows, tmp_path, **options)
    trainer = make(tiny_llama, rows, tmp_path, cls=WeighedSFTTrainer, **options)
    assert trainer.train_dataset["input_ids"] == stock.train_dataset["input_ids"]
    assert trainer.train_dataset["labels"] == stock.train_dataset["labels"]
    tw.weigh(trainer, tw.LossWeights())
    for batch in trainer.get_train_dataloader():
        kept = batch["labels"] != -100
        assert torch.equal(batch["loss_weights"][kept], batch["input_ids"][kept].float())


def test_samples_are_numbered_where_the_data_does_not(tiny_llama, tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in samples()]
    trainer = make(tiny_llama, rows, tmp_path, batch=3)
    handle = tw.weigh(trainer, BySample())
    batches = list(trainer.get_train_dataloader())
    assert [row[0].item() for batch in batches for row in batch["sample_id"]] == list(range(8))
    handle.undo()
    assert "sample_id" not in trainer.train_dataset.column_names
    trainer = make(tiny_llama, rows, tmp_path, cls=WeighedSFTTrainer, packing=True, max_length=20)
    tw.weigh(trainer, BySample())
    seen = {}
    for batch in trainer.get_train_dataloader():
        bounds = batch["cu_seq_lens_q"].tolist()
        for start, end in itertools.pairwise(bounds):
            (number,) = batch["sample_id"][0, start:end].unique().tolist()
            assert seen.setdefault(number, tuple(batch["input_ids"][0, start:end].tolist()))
    assert len(seen) == 8
    assert set(seen.values()) == {tuple(row["input_ids"]) for row in rows}


def test_chat_and_completion_masks_keep_their_columns(tiny_llama, tmp_path):
    rows = samples()
    masked = [
        {
            "input_ids": row["input_ids"],
            "completion_mask": [int(label != -100) for label in row["labels"]],
            "loss_weights": row["loss_weights"],
        }
        for row in rows
    ]
    expected, _, _ = train(tiny_llama, rows, tw.LossWeights(), tmp_path, 4, 2)
    for options in ({}, {"packing": True, "max_length": 20}):
        found, _, _ = train(
            tiny_llama, masked, tw.LossWeights(), tmp_path, 8, 1, cls=WeighedSFTTrainer, completion_only_loss=True,
            **options,
        )  # fmt: skip
        assert distance(found, expected) < 1e-5 < distance(found, tiny_llama)


def test_text_that_the_trainer_turns_into_tokens(tiny_llama, tmp_path):
    rows = [
        {"prompt": "w1 w2", "completion": " w3" * length, "sample_id": 7 * length, "loss_weights": [1.0] * (length + 3)}
        for length in range(1, 7)
    ]
    trainer = make(tiny_llama, rows, tmp_path, 6, cls=WeighedSFTTrainer, packing=True, max_length=16)
    handle = tw.weigh(trainer, BySample())
    for batch in trainer.get_train_dataloader():
        bounds = batch["cu_seq_lens_q"].tolist()
        for start, end in itertools.pairwise(bounds):
            assert batch["sample_id"][0, start:end].tolist() == [7 * (end - start - 3)] * (end - start)
            assert batch["labels"][0, start:end].tolist() == [-100, -100, *[3] * (end - start - 3), 63]
    handle.undo()
    tw.weigh(trainer, tw.LossWeights()).undo()
    rows[2]["loss_weights"] = [1.0] * 5
    with pytest.raises(InputError, match=r"train_dataset\[2\].loss_weights: has 5 values for 6 tokens"):
        make(tiny_llama, rows, tmp_path, cls=WeighedSFTTrainer)


def test_prompt_tuning_without_columns(tiny_llama, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    _, theirs, _ = train(tiny_llama, samples(), None, tmp_path, 4, 2, peft_config=config, max_steps=2)
    _, logs, _ = train(tiny_llama, samples(), tw.Uniform(), tmp_path, 4, 2, peft_config=config, max_steps=2)
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logs[1][name] == pytest.approx(theirs[1][name], abs=1e-5), name


def test_bf16_and_checkpointed_activations(tiny_llama, tmp_path):
    options = {"bf16": True, "gradient_checkpointing": True}
    _, theirs, _ = train(tiny_llama, samples(), None, tmp_path, 4, 2, **options)
    _, logs, _ = train(tiny_llama, samples(), tw.Uniform(), tmp_path, 4, 2, **options)
    assert logs[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-2)
    assert logs[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=2e-2)


def test_evaluation_resume_saving_and_undo(tiny_llama, tmp_path):
    rows, method = samples() + samples(1), tw.DynamicLoss(burn_in=2)
    whole, _, _ = train(tiny_llama, rows, method, tmp_path / "whole", 2, 2, max_steps=4)
    cut = {"save_strategy": "steps", "save_steps": 2}
    train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, max_steps=2, **cut)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    resumed, _, _ = train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, max_steps=4, resume=checkpoint)
    assert distance(whole, resumed) == 0 < distance(whole, tiny_llama)

    trainer = make(tiny_llama, rows, tmp_path)
    evaluation = Dataset.from_list(samples(2))
    before = trainer.evaluate(evaluation)
    attributes, forward = dict(vars(trainer)), trainer.model.forward
    handle = tw.weigh(trainer, tw.LossWeights())
    during = trainer.evaluate(evaluation)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert during[name] == before[name], name
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(tiny_llama).from_pretrained(tmp_path / "saved")
    assert distance(saved, tiny_llama) == 0
    handle.undo()
    assert trainer.model.forward == forward
    changed = {key for key, value in vars(trainer).items() if attributes.get(key) is not value}
    assert changed == {"gather_function"}  # set anew by each evaluation
    stock, _, _ = train(tiny_llama, rows, None, tmp_path)
    trainer.train()
    assert distance(trainer.model, stock) == 0


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2, **sizes)
    model = MixtralForCausalLM(config)
    stock, theirs, _ = train(model, samples(), None, tmp_path, 4, 2, router_aux_loss_coef=0.5)
    ours, logs, _ = train(model, samples(), tw.Uniform(), tmp_path, 4, 2, router_aux_loss_coef=0.5)
    assert distance(ours, stock) < 1e-5 < distance(ours, model)
    assert logs[0]["aux_loss"] == pytest.approx(theirs[0]["aux_loss"], abs=1e-5)
    with pytest.raises(InputError, match="router loss"):
        tw.weigh(make(model, samples(), tmp_path, router_aux_loss_coef=0.5), FocalWeightMean())


def test_what_cannot_work_is_refused_before_anything_is_patched(tiny_llama, tmp_path):
    def refuse(match, method=None, rows=None, **options):
        trainer = make(tiny_llama, rows or samples(), tmp_path, **options)
        forward, attributes = trainer.model.forward, dict(vars(trainer))
        with pytest.raises(InputError, match=match):
            tw.weigh(trainer, method or tw.DFT())
        assert trainer.model.forward == forward
        assert vars(trainer) == attributes

    refuse(r"args.loss_type: 'dft' weighs the tokens once more", loss_type="dft")
    refuse("label_smoothing_factor", label_smoothing_factor=0.1)
    refuse(r"args.packing: drops the columns", tw.LossWeights(), packing=True, max_length=20)
    packed = {"packing": True, "max_length": 20, "packing_strategy": "wrapped", "cls": WeighedSFTTrainer}
    for method in (tw.TopEntropy(scope="sequence"), WeightsPerSequence(), BySample(), tw.DynamicLoss()):
        rows = [{**row, "reference_nll": [*row["reference_nll"][1:], 0.0]} for row in samples()]
        refuse(r"'wrapped' leaves no mark where a sample ends", method, rows, **packed)
    unnumbered = [{key: row[key] for key in ("input_ids", "labels")} for row in samples()]
    refuse("cannot be numbered", BySample(), unnumbered, **{**packed, "packing_strategy": "bfd_split"})
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refuse("virtual tokens before each sequence", tw.LossWeights(), peft_config=virtual)


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("loss_weights", [1.0] * 4, r"train_dataset\[1\].loss_weights: has 4 values for 7 tokens"),
        ("loss_weights", [1.0] * 5 + [-2.0, 1.0], r"train_dataset\[1\].loss_weights\[5\]: is -2.0. .*at least 0"),
        ("loss_weights", [1.0] * 6 + [float("nan")], r"train_dataset\[1\].loss_weights\[6\]: is nan"),
        ("reference_nll", [None] * 7, r"train_dataset\[1\].reference_nll\[2\]: is nan"),
        ("sample_id", 0.5, "sample_id: holds float64 values"),
    ],
)
def test_bad_columns_are_named_before_training(column, values, match, tiny_llama, reference_directory, tmp_path):
    rows = samples()
    if column == "sample_id":
        rows = [{**row, "sample_id": values} for row in rows]
    rows[1][column] = values
    method = {
        "loss_weights": tw.LossWeights(),
        "reference_nll": tw.Prior(reference=reference_directory),
        "sample_id": BySample(),
    }[column]
    with pytest.raises(InputError, match=match):
        tw.weigh(make(tiny_llama, rows, tmp_path), method)
    if column != "sample_id":
        # Whether weights may be negative only the method says, later.
        with nullcontext() if "-2.0" in match else pytest.raises(InputError, match=match):
            make(tiny_llama, rows, tmp_path, cls=WeighedSFTTrainer, packing=True, max_length=20)


def test_a_missing_column_is_named_before_training(tiny_llama, tmp_path):
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in samples()]
    for options in ({}, {"cls": WeighedSFTTrainer, "packing": True, "max_length": 20}):
        with pytest.raises(InputError, match=r"train_dataset.loss_weights: is missing, and LossWeights reads it"):
            tw.weigh(make(tiny_llama, rows, tmp_path, **options), tw.LossWeights())


def test_negative_weights_where_a_method_allows_them(tiny_llama, tmp_path):
    class Signed(tw.LossWeights):
        """Weights of either sign."""

        negative = True

    rows = samples()
    rows[1]["loss_weights"] = [-1.0] * 7
    _, expected = expected_step(tiny_llama.double(), rows, Signed())
    found, _, _ = train(tiny_llama.double(), rows, Signed(), tmp_path, 4, 2)
    assert distance(found, expected) < TOLERANCE


def test_two_processes_give_the_update_of_one(tiny_llama, tmp_path):
    model = tiny_llama.double()
    model.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("two_processes_trl.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("weights per nonzero", "focal weight_mean", "top_entropy step", "weights per sequence"):
        loss, expected = expected_step(model, samples(), METHODS[name](None), clip=0.05)
        found = load_file(tmp_path / f"{name}.safetensors")
        theirs = expected.state_dict()
        for key, value in found.items():
            if key != "loss":
                assert (value - theirs[key]).abs().max() < TOLERANCE, f"{name}: {key}"
        assert found["loss"].item() == pytest.approx(loss, abs=1e-6)
