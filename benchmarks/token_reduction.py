"""Token reduction against the official ToMe, and what the attention tap costs.

    python benchmarks/token_reduction.py --encoder --tome path/to/ToMe --rounds 5
    python benchmarks/token_reduction.py --tap --rounds 9

`--tome` is a checkout of facebookresearch/ToMe, whose `tome/merge.py` and `tome/patch/timm.py` are run as they are.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, ratio, table
from torch.nn import functional

import tokenwise as tw
from tokenwise.models.tap import AttentionCall

Clock = Callable[[], float]

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reduction"))


def vision_transformer(size: int = 224, **options: object) -> torch.nn.Module:
    """timm's ViT-S with random weights."""
    from timm_models import load_timm

    load_timm()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=size, embed_dim=384, depth=12, num_heads=6, num_classes=10, **options).eval()


def official(path: Path):
    """The official patch, without its package's imports for drawing."""
    for name in ("tome", "tome.patch"):
        module = types.ModuleType(name)
        module.__path__ = [str(path / name.replace(".", "/"))]
        sys.modules[name] = module
    from timm_models import load_timm

    load_timm()
    from tome.patch.timm import apply_patch

    return apply_patch


@torch.no_grad()
def encoder(rounds: int, batch: int, rates: list[int], tome: Path | None, clock: Clock) -> None:
    """Forward passes of ViT-S."""
    images = torch.randn(batch, 3, 224, 224)
    plain = vision_transformer()
    contestants = {"dense": lambda: plain(images)}
    for r in rates:
        ours = vision_transformer()
        tw.reduce(ours, tw.ToMe(r=r))
        contestants[f"tokenwise ToMe r={r}"] = lambda ours=ours: ours(images)
        if tome is not None:
            theirs = vision_transformer()
            official(tome)(theirs)
            theirs.r = r
            contestants[f"official ToMe r={r}"] = lambda theirs=theirs: theirs(images)
            difference = (ours(images) - theirs(images)).abs().max()
            print(f"r={r}: largest difference of the logits {difference:.1e}")
    seconds = interleaved(contestants, rounds, clock)
    print(table(seconds, ["dense"]))
    for r in rates if tome is not None else []:
        print(
            f"r={r}: throughput {ratio(seconds, f'official ToMe r={r}', f'tokenwise ToMe r={r}'):.2f} of the official"
        )


@torch.no_grad()
def unreduced(tome: Path) -> None:
    """How far the official patch at r=0 is from the dense model, where it knows the model's parts and where not."""
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for name, options in {
        "plain": {},
        "LayerScale": {"init_values": 0.1},
        "q/k-norm": {"qk_norm": True},
        "registers": {"reg_tokens": 4},
    }.items():
        dense = vision_transformer(**options)
        expected = dense(images)
        with tw.reduce(dense, tw.ToMe(r=0)):
            ours = (dense(images) - expected).abs().max()
        theirs = vision_transformer(**options)
        official(tome)(theirs)
        theirs.r = 0
        difference = (theirs(images) - expected).abs().max()
        print(f"r=0, {name}: official {difference:.1e}, tokenwise {ours:.1e}, logits up to {expected.abs().max():.1e}")


@torch.no_grad()
def tap(rounds: int, repeats: int, clock: Clock) -> None:
    """Rows and column means beside one call of PyTorch's attention."""
    print("| batch x heads x tokens x channels | SDPA ms | one row / SDPA | 8 rows / SDPA | column means / SDPA |")
    print("|---|---|---|---|---|")
    for batch, heads, tokens, width in ((8, 6, 197, 64), (1, 16, 577, 64), (4, 6, 577, 64), (1, 8, 2048, 64)):
        query, key, value = (torch.randn(batch, tokens, heads, width).transpose(1, 2) for _ in range(3))
        call = AttentionCall(torch.nn.Identity(), query, key, value, None, width**-0.5)
        first, several = torch.zeros(1, dtype=torch.long), torch.arange(8)
        times = repeats if tokens < 2000 else max(repeats // 4, 1)

        def repeated(run, times=times):
            def runs():
                for _ in range(times):
                    run()

            return runs

        seconds = interleaved(
            {
                "sdpa": repeated(lambda: functional.scaled_dot_product_attention(query, key, value)),  # noqa: B023
                "row": repeated(lambda: call.rows(first)),  # noqa: B023
                "rows": repeated(lambda: call.rows(several)),  # noqa: B023
                "columns": repeated(call.columns),
            },
            rounds,
            clock,
        )
        ratios = " | ".join(f"{ratio(seconds, name, 'sdpa'):.2f}" for name in ("row", "rows", "columns"))
        milliseconds = sorted(seconds["sdpa"])[rounds // 2] / times * 1e3
        print(f"| {batch} x {heads} x {tokens} x {width} | {milliseconds:.2f} | {ratios} |")


@torch.no_grad()
def scoring(rounds: int, batch: int, clock: Clock) -> None:
    """What EViT's scores and selections cost at 577 tokens, beside the whole dense encoder."""
    from tokenwise.reduction.encoder import EncoderReduction

    model, images = vision_transformer(384), torch.randn(batch, 3, 384, 384)
    method = tw.EViT(rate=0.7)
    spent: list[float] = []
    reduce = type(method).reduce

    def timed(self, tokens, count):
        start = clock()
        change = reduce(self, tokens, count)
        spent[-1] += clock() - start
        return change

    def reduced() -> None:
        spent.append(0.0)
        type(method).reduce = timed
        try:
            with tw.reduce(model, method) as handle:
                assert isinstance(handle, EncoderReduction)
                model(images)
        finally:
            type(method).reduce = reduce

    seconds = interleaved({"dense": lambda: model(images), "evit": reduced}, rounds, clock)
    shares = sorted(score / dense for score, dense in zip(spent[-rounds:], seconds["dense"], strict=True))
    print(
        f"EViT at 577 tokens, batch {batch}: scores and selection {100 * shares[len(shares) // 2]:.2f}% of dense,",
        end=" ",
    )
    print(f"the whole pass {ratio(seconds, 'evit', 'dense'):.2f} of dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="store_true", help="ToMe in ViT-S")
    parser.add_argument("--tap", action="store_true", help="rows and column means of attention")
    parser.add_argument("--tome", type=Path, help="a checkout of facebookresearch/ToMe")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rates", type=int, nargs="+", default=[8, 13, 16])
    parser.add_argument("--repeats", type=int, default=20, help="calls of the tap in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="for a machine with other work; with --threads 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.encoder:
        if options.tome is not None:
            unreduced(options.tome)
        encoder(options.rounds, options.batch, options.rates, options.tome, clock)
    if options.tap:
        tap(options.rounds, options.repeats, clock)
        scoring(options.rounds, max(options.batch // 4, 1), clock)


if __name__ == "__main__":
    main()
