"""ssToken: worked numbers, invariants, and whole training steps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import Run, TokenBatch
from tokenwise.weighting.ss_token import LossHistory, SsToken, SsTokenAverage, SsTokenPreviousEpoch

CURRENT, HISTORY, ATTENTION = [1.0, 1, 1, 1], [2.0, 1, 3, 0.5], [0.1, 0.6, 0.3, 0.2]


def tokens(nll=CURRENT, history=HISTORY, attention=ATTENTION, sequence=None, step=0, sample=None):
    ids = torch.tensor(sequence or [0] * len(nll))
    return TokenBatch(
        torch.zeros(len(nll), dtype=torch.int64),
        ids,
        int(ids.max()) + 1,
        step,
        nll=torch.tensor(nll),
        reference_nll=torch.tensor(history),
        prompt_attention=torch.tensor(attention),
        sample_id=None if sample is None else torch.tensor(sample),
    )


def test_worked_numbers():
    # Improvement [1, 0, 2, -0.5], scaled [.6, .2, 1, 0], mixed [.35, .4, .65, .1].
    assert SsToken(keep=0.5, reference="r").weights(tokens()).tolist() == [0, 1, 1, 0]
    assert SsToken(keep=0.25, reference="r").weights(tokens()).tolist() == [0, 0, 1, 0]
    assert SsToken(keep=0.75, reference="r").weights(tokens()).tolist() == [1, 1, 1, 0]
    assert SsToken(keep=0.5, gamma=1, reference="r").weights(tokens()).tolist() == [1, 0, 1, 0]
    assert SsToken(keep=0.5, gamma=0, reference="r").weights(tokens()).tolist() == [0, 1, 1, 0]


def test_invariants():
    method = SsToken(keep=0.6, reference="r")
    generator = torch.Generator().manual_seed(0)
    sequence = [0] * 7 + [1] + [2] * 10
    nll, history, attention = (torch.rand(18, generator=generator).tolist() for _ in range(3))
    batch = tokens(nll, history, attention, sequence)
    kept = torch.bincount(torch.tensor(sequence), method.weights(batch)).tolist()
    assert kept == [math.ceil(0.6 * n - 1e-9) for n in (7, 1, 10)]
    assert method.replace(keep=1).weights(batch).tolist() == [1] * 18
    other_attention = tokens(nll, history, attention[::-1], sequence)
    other_losses = tokens(history, nll, attention, sequence)
    by_losses, by_attention = method.replace(gamma=1), method.replace(gamma=0)
    assert torch.equal(by_losses.weights(batch), by_losses.weights(other_attention))
    assert torch.equal(by_attention.weights(batch), by_attention.weights(other_losses))
    assert not torch.equal(method.weights(batch), by_losses.weights(batch))
    # At the start history and present are the same, and attention alone decides.
    assert torch.equal(method.weights(tokens(nll, nll, attention, sequence)), by_attention.weights(batch))
    warming = method.replace(warm_up=3)
    early, late = tokens(nll, history, attention, sequence, 2), tokens(nll, history, attention, sequence, 3)
    assert torch.equal(warming.weights(early), by_attention.weights(batch))
    assert torch.equal(warming.weights(late), method.weights(batch))


def batches(count=4):
    """Rows of 12 with a prompt, a label run, a second prompt and a second run; padded by 0 to 3 tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (count, 12), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[:, 6:8] = -100
    mask = torch.ones_like(ids)
    for index in range(count):
        if index % 4:
            labels[index, -(index % 4) :] = -100
            mask[index, -(index % 4) :] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def expected_loss(model, reference, batch, keep, gamma):
    """The definition, sample by sample, on whole attention maps."""
    eager = LlamaForCausalLM(copy.deepcopy(model.config))
    eager.set_attn_implementation("eager")
    eager.load_state_dict(model.state_dict())
    total, kept = 0.0, 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        ids, labels = ids[:length], labels[:length]
        output = eager(input_ids=ids[None], output_attentions=True)
        losses = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")
        with torch.no_grad():
            history = F.cross_entropy(reference(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        at = (labels != -100).nonzero().squeeze(1)
        improved = (history - losses)[at - 1].detach()
        improved = (improved - improved.min()) / (improved.max() - improved.min() + 1e-8)
        attention = output.attentions[-1][0].mean(0)[at][:, labels == -100].sum(1).detach()
        score = gamma * improved + (1 - gamma) * attention
        chosen = score.topk(math.ceil(keep * len(at))).indices
        total = total + losses[at - 1][chosen].sum()
        kept += len(chosen)
    return total / kept


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_equals_the_definition(tiny_llama, reference_directory, packed):
    method = SsToken(keep=0.5, gamma=0.4, reference=reference_directory)
    reference = LlamaForCausalLM.from_pretrained(reference_directory)
    batch = batches()
    expected = expected_loss(tiny_llama, reference, batch, 0.5, 0.4)
    given = dict(batch)
    if packed:
        lengths = batch["attention_mask"].sum(1).tolist()
        given = {
            "input_ids": batch["input_ids"][batch["attention_mask"] == 1][None],
            "labels": batch["labels"][batch["attention_mask"] == 1][None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
    tiny_llama.train()
    with tw.weigh(tiny_llama, method) as handle:
        loss = tiny_llama(**given).loss
        loss.backward()
        assert 0.5 <= handle.stats["kept_share"] < 0.65
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    plain = tiny_llama.model.layers[-1].self_attn
    assert plain.config is tiny_llama.config


def test_everything_kept_is_plain_training(tiny_llama, reference_directory):
    batch = batches()
    plain = tiny_llama(**batch).loss
    tiny_llama.train()
    with tw.weigh(tiny_llama, SsToken(keep=1, reference=reference_directory)):
        torch.testing.assert_close(tiny_llama(**batch).loss, plain, atol=1e-5, rtol=0)


def rows_of(batch):
    return [
        {name: value[index] for name, value in batch.items()} | {"sample_id": torch.full((12,), index)}
        for index in range(len(batch["input_ids"]))
    ]


@pytest.mark.parametrize("kind", ["reference", "average", "previous_epoch"])
def test_accumulation_checkpoints_and_resume_change_nothing(tiny_llama, reference_directory, tmp_path, kind):
    method = {
        "reference": lambda: SsToken(keep=0.5, reference=reference_directory),
        "average": lambda: SsTokenAverage(keep=0.5, decay=0.5),
        "previous_epoch": lambda: SsTokenPreviousEpoch(keep=0.5),
    }[kind]()

    def train(folder, batch, accumulate, resume=None):
        model = copy.deepcopy(tiny_llama)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=5,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows_of(batches(4)))
        with tw.weigh(trainer, method):
            trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    whole = train("whole", 4, 1)
    torch.testing.assert_close(train("split", 2, 2), whole, atol=2e-4, rtol=0)
    resumed = train("whole", 4, 1, resume=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=0)


def test_previous_epoch_remembers_by_sample():
    method = SsTokenPreviousEpoch(keep=0.5)
    state = method.start(Run())
    first = tokens(nll=HISTORY, sample=[7] * 4)
    assert method.weights(first, state).tolist() == [0, 1, 1, 0]  # no history yet: attention alone
    now = tokens(nll=CURRENT, sample=[7] * 4)
    assert method.replace(gamma=1).weights(now, state).tolist() == [1, 0, 1, 0]
    # The state now holds the present losses, survives a checkpoint, and keeps samples apart.
    method.weights(tokens(nll=[5.0, 6.0], history=[0.0, 0], attention=[0.0, 0], sample=[3, 9], sequence=[0, 1]), state)
    resumed = LossHistory()
    resumed.load_tensors(state.tensors())
    assert resumed.exchange(7, torch.zeros(4)).tolist() == CURRENT
    assert resumed.exchange(9, torch.zeros(1)).tolist() == [6.0]
    assert resumed.exchange(1, torch.ones(2)).tolist() == [1, 1]
    LossHistory().load_tensors(LossHistory().tensors())
    with pytest.raises(InputError, match="sample 7 has 3 labels, and had 4"):
        state.exchange(7, torch.zeros(3))


def test_sharded_parameters_cannot_be_averaged(tiny_llama, tmp_path, monkeypatch):
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True)
    trainer = Trainer(model=tiny_llama, args=arguments, train_dataset=rows_of(batches(4)))
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(InputError, match="shards the parameters that SsTokenAverage averages"):
        tw.weigh(trainer, SsTokenAverage())


def test_attention_needs_labels_that_the_model_reads(tiny_llama):
    tiny_llama.train()
    ids = torch.randint(1, 64, (1, 6))
    with tw.weigh(tiny_llama, SsTokenPreviousEpoch()), pytest.raises(InputError, match="shift_labels"):
        tiny_llama(input_ids=ids, shift_labels=ids, sample_id=torch.zeros_like(ids))
