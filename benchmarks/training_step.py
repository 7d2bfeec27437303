"""A whole training step of transformers' Trainer, weighted against stock: time per step.

Usage: python benchmarks/training_step.py [--rounds 15] [--threads 2]

Llama, hidden 512, 8 layers, vocabulary 32,768, 2,048 tokens (4 x 512), fp32, CPU, AdamW. Each contestant is a Trainer
of its own on the same weights; a round is one optimizer step of each, so the ratios come from one interleaved run.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable

import torch
from timing import interleaved, table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tokenwise as tw

BATCH, LENGTH = 4, 512


def data(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(BATCH):
        ids = torch.randint(vocabulary, (LENGTH,), generator=generator)
        rows.append(
            {
                "input_ids": ids,
                "labels": ids,
                "loss_weights": torch.rand(LENGTH, generator=generator) + 0.01,
                "reference_nll": torch.rand(LENGTH, generator=generator) * 10,
            }
        )
    return rows


class ExcessLossFromColumn(tw.weighting.TokenWeighter):
    """Excess loss with the reference's losses computed beforehand."""

    reads = frozenset({"nll", "reference_nll"})
    reduction = "nonzero_mean"
    scope: str = "micro_batch"
    keep: float = 0.6

    def weights(self, batch, state=None):
        from tokenwise.policies.selection import top_share

        return top_share(batch.nll - batch.reference_nll, self.keep).float()


def step(model: LlamaForCausalLM, method: tw.weighting.TokenWeighter | None, accumulate: int = 1) -> Callable[[], None]:
    """A function that takes one optimizer step of a Trainer that lives on."""
    rows = data(model.config.vocab_size)
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH // accumulate,
        gradient_accumulation_steps=accumulate,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    if method is not None:
        tw.weigh(trainer, method)
    trainer.create_optimizer()
    model.train()
    size = BATCH // accumulate
    parts = [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}
        for start in range(0, BATCH, size)
    ]
    if method is None:
        parts = [{key: part[key] for key in ("input_ids", "labels")} for part in parts]

    def run() -> None:
        samples, items = trainer.get_batch_samples(iter(map(dict, parts)), accumulate, trainer.args.device)
        trainer.current_gradient_accumulation_steps = accumulate
        for index, sample in enumerate(samples):
            trainer.accelerator.gradient_state._set_sync_gradients(index == accumulate - 1)
            trainer.training_step(model, sample, items)
        trainer._clip_grad_norm(model)
        trainer.optimizer.step()
        model.zero_grad()
        trainer.state.global_step += 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as reference:
        model.save_pretrained(reference)
        runs = {
            "stock loss": step(model, None),
            "uniform": step(model, tw.Uniform()),
            "static weights": step(model, tw.LossWeights()),
            "pointwise: DFT": step(model, tw.DFT()),
            "pointwise: focal": step(model, tw.Focal()),
            "random, keep 0.6": step(model, tw.weighting.Random(keep=0.6)),
            "selection: excess loss, keep 0.6, reference losses in the data": step(model, ExcessLossFromColumn()),
            "selection: top entropy, keep 0.2": step(model, tw.TopEntropy(keep=0.2)),
            "selection: excess loss, keep 0.6, reference model in the step": step(
                model, tw.ExcessLoss(keep=0.6, reference=reference)
            ),
            "soft: dynamic loss": step(model, tw.DynamicLoss()),
            "stock loss, 2 micro-batches": step(model, None, 2),
            "scope step, 2 micro-batches: dynamic loss": step(model, tw.DynamicLoss(scope="step"), 2),
            "scope step, 2 micro-batches: excess loss, keep 0.6": step(model, ExcessLossFromColumn(scope="step"), 2),
        }
        print(
            f"Llama, hidden 512, 8 layers, vocabulary 32768, {BATCH} x {LENGTH} tokens, {arguments.threads} threads\n"
        )
        print(table(interleaved(runs, arguments.rounds), ["stock loss", "stock loss, 2 micro-batches"]))


if __name__ == "__main__":
    main()
