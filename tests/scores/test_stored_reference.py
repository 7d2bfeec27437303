"""A store in the place of a reference model: the same losses whatever the layout, the same training, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.load import load_model, train_tokenizer
from tokenwise.models.reference import ReferenceModel
from tokenwise.scores import StoredReference
from tokenwise.scores.reference import open_reference
from tokenwise.signals.logit_losses import divergence_from
from tokenwise.weighting.logit_objective import Likeliest

LENGTHS = (12, 7, 9, 12)
FP16 = {"rtol": 2**-11, "atol": 2e-5}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 64, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def folder(reference_directory, rows, tmp_path):
    tw.scores.score(reference_directory, [row.tolist() for row in rows], tmp_path / "scores")
    return str(tmp_path / "scores")


def padded(rows, side):
    def pad(values, fill):
        size = (0, 12 - len(values)) if side == "right" else (12 - len(values), 0)
        return torch.nn.functional.pad(values, size, value=fill)

    first = torch.tensor([-100])  # on the left, padding would predict it
    return {
        "input_ids": torch.stack([pad(row, 0) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), 0) for row in rows]),
        "labels": torch.stack([pad(torch.cat([first, row[1:]]), -100) for row in rows]),
    }


def packed(rows):
    first = torch.tensor([-100])
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "labels": torch.cat([torch.cat([first, row[1:]]) for row in rows])[None],
    }


def losses(reference, batch):
    """The reference's losses of the batch's labels, in order."""
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100).reshape(-1)
    at = targets.ne(-100).nonzero().squeeze(1)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    return reference.nll(at, targets[at], **inputs)


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_the_losses_are_those_of_the_model(tiny_llama, reference_directory, rows, folder, layout):
    batch = packed(rows) if layout == "packed" else padded(rows, layout)
    stored, computed = StoredReference(folder, tiny_llama), ReferenceModel(reference_directory, tiny_llama)
    if layout == "left":  # what a collator that pads on the left gives the model, for the same positions
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(losses(stored, batch), losses(computed, batch), **FP16)


def test_labels_masked_in_the_middle_and_positional_arguments(tiny_llama, rows, folder):
    batch = padded(rows, "right")
    whole = losses(StoredReference(folder, tiny_llama), batch)
    batch["labels"][0, :5] = -100
    assert torch.equal(losses(StoredReference(folder, tiny_llama), batch), whole[4:])
    reference = StoredReference(folder, tiny_llama)
    found = reference.nll(torch.tensor([0, 1]), rows[0][1:3], batch["input_ids"], batch["attention_mask"])
    assert torch.equal(found, whole[:2])


def train(model, rows, reference, output, method=tw.ExcessLoss, **fields):
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(output), max_steps=3, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd", report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1, seed=3,
    )  # fmt: skip
    batch = padded(rows, "right")
    data = [{name: values[index] for name, values in batch.items()} for index in range(len(rows))]
    trainer = Trainer(model, arguments, train_dataset=data)
    tw.weigh(trainer, method(reference=reference, **fields))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model.state_dict()


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
def test_training_with_a_store_is_training_with_the_model(
    tiny_llama, reference_directory, rows, folder, tmp_path, scope
):
    stored, ours = train(tiny_llama, rows, folder, tmp_path / "a", scope=scope)
    computed, theirs = train(tiny_llama, rows, reference_directory, tmp_path / "b", scope=scope)
    assert stored == pytest.approx(computed, rel=1e-6)
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-6)
    other, _ = train(tiny_llama, rows, folder, tmp_path / "c", scope=scope, keep=0.3)
    assert other != pytest.approx(computed, rel=1e-3)


def test_a_model_directory_is_still_a_model(tiny_llama, reference_directory, folder):
    assert isinstance(open_reference(reference_directory, tiny_llama), ReferenceModel)
    assert isinstance(open_reference(str(folder), tiny_llama), StoredReference)


def test_what_has_no_stored_score_is_refused(tiny_llama, rows, folder):
    reference = StoredReference(folder, tiny_llama)
    crossing = packed(rows)
    crossing["labels"] = crossing["input_ids"].clone()  # the first label of each packed row is not masked
    with pytest.raises(InputError, match=r"3 of 39 labels have no stored score.*Mask the first label of every row"):
        losses(reference, crossing)
    other_labels = padded(rows, "right")
    other_labels["labels"][1, 3] += 1
    with pytest.raises(InputError, match="1 of 36 labels have no stored score"):
        losses(reference, other_labels)
    unmasked = padded(rows, "left")
    unmasked["labels"] = unmasked["input_ids"].masked_fill(unmasked["attention_mask"] == 0, -100)
    with pytest.raises(InputError, match=r"2 of 38 labels have no stored score.*or pad on the right"):
        losses(reference, unmasked)
    other_rows = padded(rows, "right")
    other_rows["input_ids"][2, 4] += 1
    with pytest.raises(InputError, match=r"rows\[2\]: these 9 tokens"):
        losses(reference, other_rows)
    with pytest.raises(InputError, match="input_ids: is missing from the batch"):
        reference.nll(torch.tensor([0]), torch.tensor([1]), inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(InputError, match=r"has shape \(1, 1, 12, 12\)"):
        reference.nll(torch.tensor([0]), rows[0][1:2], input_ids=rows[0][None], attention_mask=torch.ones(1, 1, 12, 12))


def test_another_vocabulary_a_missing_statistic_and_another_tokenizer_are_refused(
    tiny_llama, reference_directory, rows, folder, tmp_path
):
    tw.scores.score(reference_directory, [rows[0].tolist()], tmp_path / "entropy", statistics=("entropy",))
    with pytest.raises(InputError, match=r"reference: .* have no 'logp', only entropy"):
        StoredReference(str(tmp_path / "entropy"), tiny_llama)
    tiny_llama.resize_token_embeddings(70)
    with pytest.raises(InputError, match=r"reference: .* a vocabulary of 64 tokens, the model in training has 70"):
        StoredReference(folder, tiny_llama)


def test_the_tokenizer_of_a_trainer_is_checked(reference_directory, tmp_path):
    ours, other = (train_tokenizer([text], 270) for text in ("one one one two", "three four three"))
    model = load_model(reference_directory)
    model.resize_token_embeddings(300)
    texts = [{"text": "one two"}, {"text": "two one"}]
    tw.scores.score(model, texts, tmp_path / "scores", tokenizer=ours)
    method = tw.ExcessLoss(reference=str(tmp_path / "scores"))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    data = [ours(record["text"]) for record in texts]
    with tw.weigh(Trainer(model, arguments, train_dataset=data, processing_class=ours), method):
        pass
    with pytest.raises(InputError, match=r"reference: the scores in .* were made with another tokenizer"):
        tw.weigh(Trainer(model, arguments, train_dataset=data, processing_class=other), method)


def gradients(model, method, batch):
    trained = copy.deepcopy(model).double()
    with tw.weigh(trained, method):
        loss = trained.train()(**batch).loss
        loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trained.parameters()])


@pytest.mark.parametrize("name", ["npo", "undial", "asft"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_divergences_from_stored_tokens(name, side, reference_directory, tiny_llama, rows, tmp_path):
    """All tokens stored is the reference itself; fewer is the divergence with all others counted as one."""

    def method(reference):
        made = {
            "npo": lambda: tw.NPO(reference=reference, retain="kl"),
            "undial": lambda: tw.UNDIAL(reference=reference),
            "asft": lambda: tw.ASFT(reference=reference),
        }
        return made[name]()

    batch = padded(rows, side)
    if name != "asft":
        batch["forget"] = torch.tensor([1, 0, 1, 0])[:, None].expand_as(batch["labels"])
    for count in (64, 8):
        given = {"statistics": ("logp", "top_k"), "top_k": count}
        tw.scores.score(reference_directory, [row.tolist() for row in rows], tmp_path / str(count), **given)
    loss, expected = gradients(tiny_llama, method(reference_directory), batch)
    whole, found = gradients(tiny_llama, method(str(tmp_path / "64")), batch)
    assert whole == pytest.approx(loss, rel=2e-3)
    assert (found - expected).norm() < 2e-3 * expected.norm()
    _, part = gradients(tiny_llama, method(str(tmp_path / "8")), batch)
    assert 2e-3 * expected.norm() < (part - expected).norm() < expected.norm()


def test_what_is_not_stored_counts_as_one_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(5, 11, generator=generator, dtype=torch.float64).log_softmax(1)
    logp, ids = theirs.topk(3)
    completed = Likeliest(ids, logp).complete(logits.detach(), slice(None))
    assert torch.allclose(completed.exp().sum(1), torch.ones(5, dtype=torch.float64))
    value, slope = divergence_from(logits.detach(), completed)

    def grouped(log_probabilities):
        rest = 1 - log_probabilities.gather(1, ids).exp().sum(1, keepdim=True)
        return torch.cat([log_probabilities.gather(1, ids), rest.log()], 1)

    reference, current = grouped(theirs), grouped(logits.log_softmax(1))
    expected = (reference.exp() * (reference - current)).sum(1)
    assert torch.allclose(value, expected)
    assert torch.allclose(slope, torch.autograd.grad(expected.sum(), logits)[0])
