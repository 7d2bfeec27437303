"""A whole training step of TRL's SFTTrainer, weighted against stock: time per step and peak memory.

Usage: python benchmarks/sft_step.py [--rounds 15] [--threads 2] [--tiny]

Llama, hidden 512, 8 layers, vocabulary 32,768, 2,048 tokens (4 x 512), fp32, CPU, AdamW. Each contestant is a trainer
of its own on the same weights; a round is one optimizer step of each, so the ratios come from one interleaved run. Peak
memory is the high-water mark of a process that takes three steps of one contestant, less what it held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable

import torch
from datasets import Dataset
from timing import interleaved, table
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import tokenwise as tw

BATCH = 4
STATIC = {keep: f"static weights, keep {keep}" for keep in (1.0, 0.6, 0.3, 0.0)}
CONTESTANTS = ("stock nll", "stock dft", "uniform", "DFT", *STATIC.values())


def model(tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = (
        {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        if tiny
        else {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    )
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **sizes))


def data(vocabulary: int, length: int, keep: float) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(BATCH):
        ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        weights = (torch.rand(length, generator=generator) < keep).float().tolist()
        rows.append({"input_ids": ids, "labels": ids, "loss_weights": weights})
    return Dataset.from_list(rows)


def step(name: str, tiny: bool) -> Callable[[], None]:
    """A function that takes one optimizer step of an SFTTrainer that lives on."""
    trained = model(tiny)
    keep = float(name.rsplit(" ", 1)[1]) if "keep" in name else 1.0
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        loss_type="dft" if name == "stock dft" else "nll",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = SFTTrainer(
        trained,
        arguments,
        train_dataset=data(trained.config.vocab_size, 64 if tiny else 512, keep),
        processing_class=tokenizer,
    )
    methods = {"uniform": tw.Uniform(), "DFT": tw.DFT()}
    if not name.startswith("stock"):
        tw.weigh(trainer, methods.get(name, tw.LossWeights()))
    trainer.create_optimizer()
    trained.train()
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> None:
        (sample,), items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.current_gradient_accumulation_steps = 1
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer.training_step(trained, sample, items)
        trainer._clip_grad_norm(trained)
        trainer.optimizer.step()
        trained.zero_grad()
        trainer.state.global_step += 1

    return run


def peak(name: str, tiny: bool, threads: int) -> float:
    """MiB by which three steps raise the high-water mark of this process."""
    torch.set_num_threads(threads)
    run = step(name, tiny)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that the benchmark runs")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    peaks = {}
    for name in CONTESTANTS:
        with spawn.Pool(1) as pool:
            peaks[name] = pool.apply(peak, (name, arguments.tiny, arguments.threads))
    torch.set_num_threads(arguments.threads)
    runs = {name: step(name, arguments.tiny) for name in CONTESTANTS}
    print("tiny\n" if arguments.tiny else f"Llama, hidden 512, 8 layers, 2,048 tokens, {arguments.threads} threads\n")
    seconds = interleaved(runs, arguments.rounds)
    print(table(seconds, ["stock nll", "stock dft"]))
    print("\nTime saved by labels of weight zero, as a share of what leaving them out of the output layer can save:")
    for keep in (0.6, 0.3):
        rounds = zip(seconds[STATIC[1.0]], seconds[STATIC[keep]], seconds[STATIC[0.0]], strict=True)
        shares = [(whole - kept) / ((whole - none) * (1 - keep)) for whole, kept, none in rounds]
        print(f"  keep {keep}: {statistics.median(shares):.2f}")
    print("\n| | peak MiB | / stock nll |\n|---|---|---|")
    for name, value in peaks.items():
        print(f"| {name} | {value:.0f} | {value / max(peaks['stock nll'], 1):.2f} |")


if __name__ == "__main__":
    main()
