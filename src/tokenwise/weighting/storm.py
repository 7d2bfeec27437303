"""STORM: a small network learns, while the classifier trains, how far to trust each example's label."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import mean_one
from tokenwise.signals.classes import label_statistics
from tokenwise.weighting.base import Run
from tokenwise.weighting.classification import ClassBatch, ClassObjective


class StormState:
    """The rescaler, its optimizer, the generator of dropout, and the examples the next meta step validates on."""

    def __init__(self, run: Run, hidden: int, learning_rate: float):
        self.generator = torch.Generator().manual_seed(run.seed + run.rank)
        # Every process starts with the same rescaler, whatever its draws.
        initial = torch.Generator().manual_seed(run.seed)
        self.rescaler = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Sigmoid())
        with torch.no_grad():
            for parameter in self.rescaler.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=initial))
        self.rescaler.to(run.device)
        self.optimizer = torch.optim.Adam(self.rescaler.parameters(), lr=learning_rate)
        self.previous: tuple[Tensor, Tensor] | None = None

    def weights(self, statistics: Tensor) -> Tensor:
        """The weight of each example from its statistics [examples, 5]: [examples], of mean 1, with gradient."""
        return mean_one(self.rescaler(statistics.to(next(self.rescaler.parameters()))).squeeze(1))

    def tensors(self) -> dict[str, Tensor]:
        found = {f"rescaler.{name}": tensor for name, tensor in self.rescaler.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        if self.previous is not None:
            found |= {"previous.features": self.previous[0], "previous.labels": self.previous[1]}
        return {**found, "generator": self.generator.get_state()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.rescaler.load_state_dict(under("rescaler."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("optimizer.").items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        previous = under("previous.")
        if previous:
            device = next(self.rescaler.parameters()).device
            self.previous = previous["features"].to(device), previous["labels"].to(device)
        self.generator.set_state(tensors["generator"])


class Storm(ClassObjective):
    """Weigh each example by a small network that reads how the model judges it, and learns what helps the next step.

    Per micro-batch: take one step of the classification head under the present weights, in thought; see what it does to
    the (weighted) loss of the micro-batch before; improve the weighting network by that gradient; then train with the
    weights it gives now, of mean 1. No clean data is needed. What is rare and hard looks like noise to it.
    """

    card: ClassVar[Card] = Card(
        id="weighting/storm",
        paper=Paper(
            title="Learning from Noisy Labels via Self-Taught On-the-Fly Meta Loss Rescaling",
            arxiv="2412.12955",
            venue="AAAI 2025",
        ),
        needs=("micro-batches of several examples",),
        status="RECONSTRUCTION",
        checked="the paper's order of inner and outer step, validating on the noisy data itself with the weights of "
        "the network in training; meta-gradient against finite differences. Ours are the five features, the network's "
        "size, normalisation and rates, dropout and look-ahead on the head alone, and validating on the micro-batch "
        "before",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"features"})
    scope: ClassVar[str] = "micro_batch"

    hidden: int = Field(16, ge=1)
    """Width of the weighting network."""
    passes: int = Field(4, ge=2)
    """Draws of dropout on the head's input from which an example's uncertainty is read."""
    dropout: float = Field(0.1, gt=0, lt=1)
    """Share of the head's input that each draw leaves out."""
    look_ahead: float = Field(0.1, gt=0)
    """Learning rate of the step taken in thought."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of the weighting network (Adam)."""

    def start(self, run: Run) -> StormState:
        return StormState(run, self.hidden, self.learning_rate)

    def losses(self, batch: ClassBatch, state: StormState) -> Tensor:  # type: ignore[override]
        assert batch.features is not None
        assert batch.weight is not None
        features = batch.features.detach().float()
        head = {"weight": batch.weight.detach().float()}
        if batch.bias is not None:
            head["bias"] = batch.bias.detach().float()
        with torch.autocast(features.device.type, enabled=False):
            statistics = self._statistics(features, batch.labels, head, state)
            self._improve(features, batch.labels, statistics, head, state)
            if batch.labels.numel():
                state.previous = features, batch.labels
            with torch.no_grad():
                weights = state.weights(statistics)
        return weights.to(batch.logits.dtype) * batch.nll()

    @torch.no_grad()
    def _statistics(self, features: Tensor, labels: Tensor, head: dict[str, Tensor], state: StormState) -> Tensor:
        draws = torch.rand((self.passes, *features.shape), generator=state.generator).to(features.device)
        dropped = features * (draws >= self.dropout) / (1 - self.dropout)
        seen = F.linear(dropped, **head).softmax(-1)
        seen = seen.gather(2, labels.expand(self.passes, -1).unsqueeze(2)).squeeze(2)
        spread = (seen - seen.mean(0)).square().mean(0).sqrt()
        return label_statistics(F.linear(features, **head), labels, spread)

    def _improve(
        self, features: Tensor, labels: Tensor, statistics: Tensor, head: dict[str, Tensor], state: StormState
    ) -> None:
        """One step of the weighting network along the meta-gradient, averaged over the processes that have one."""
        state.optimizer.zero_grad(set_to_none=False)
        parameters = list(state.rescaler.parameters())
        found = torch.tensor(float(state.previous is not None), device=features.device)
        if state.previous is not None:
            earlier, earlier_labels = state.previous
            with torch.enable_grad():
                ahead = self.look_one_step_ahead(features, labels, state.weights(statistics), head)
                seen = {name: tensor.detach() for name, tensor in ahead.items()}
                judged = state.weights(self._statistics(earlier, earlier_labels, seen, state))
                # The gradient reaches the network through that step, and through the weights of the loss itself.
                (judged * _nll(ahead, earlier, earlier_labels)).mean().backward()
        if torch.distributed.is_initialized():
            # Every process takes part, also one whose batches had no label yet: the others would wait for it.
            torch.distributed.all_reduce(found)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= found.clamp_min(1)
        if found:
            state.optimizer.step()

    def look_one_step_ahead(
        self, features: Tensor, labels: Tensor, weights: Tensor, head: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The head after one step of gradient descent on the weighted loss, as a differentiable function of `weights`.

        Args:
            features: the head's input, [examples, hidden].
            labels: [examples].
            weights: [examples].
            head: ``weight`` [classes, hidden] and perhaps ``bias`` [classes].
        """
        start = {name: tensor.detach().requires_grad_() for name, tensor in head.items()}
        loss = (weights * _nll(start, features, labels)).sum() / max(labels.shape[0], 1)
        slopes = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        return {
            name: tensor - self.look_ahead * slope for (name, tensor), slope in zip(start.items(), slopes, strict=True)
        }


def _nll(head: dict[str, Tensor], features: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, **head), labels, reduction="none")
