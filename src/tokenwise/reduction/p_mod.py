"""Mixture of depths: every layer works on the image tokens that a router of its own chooses, the others skip it.

After "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay" (arXiv 2412.04449). Nothing leaves for good:
what skips one layer comes before the router of the next. The routers are there to be trained, with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import PrivateAttr
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem, missing_file
from tokenwise.files import write_binary
from tokenwise.models.decoders import find_decoder
from tokenwise.policies.allocators import shifted_cosine
from tokenwise.reduction.base import DecoderReducer, DecoderTokens
from tokenwise.reduction.decoder import DecoderReduction, Prompt


def mixture_ratios(layers: int, shift: float = 0.0, floor: float = 0.15, dense_above: float = 0.85) -> dict[int, float]:
    """The share of the image tokens that each layer with a router works on: the paper's shifted cosine.

    Args:
        layers: how many layers the decoder has.
        shift: how far the wave is moved down; with 0 and 32 layers the mean share is 0.54.
        floor: the smallest share.
        dense_above: the share above which a layer has no router and works on all tokens.
    """
    shares = shifted_cosine(layers, shift, floor, dense_above)
    return {layer: share for layer, share in enumerate(shares) if share <= dense_above}


class _Routed(DecoderReducer):
    """Which tokens a layer works on, by the weight that its router gave them."""

    _ratios: dict[int, float] = PrivateAttr()

    def counts(self, candidates: int, layers: int) -> list[int]:
        shares = [self._ratios.get(layer, 1.0) for layer in range(layers)]
        # Even of a small image one token goes through each layer.
        return [min(candidates, max(int(share * candidates + 1e-9), 1)) for share in shares]

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.memory["weight"]


class MixtureOfDepths(DecoderReduction):
    """Layers of a language model that work on some of the image tokens each, until `undo`.

    In each layer with a router an image token has the weight ``1 + scale * tanh(router(token))``. The tokens with the
    largest go through the layer, what its feed-forward layer adds to them taken times the weight; the others skip it,
    are in this layer's cache for no later token, and are taken times their weight themselves. At the beginning routers
    are 0 and all weights 1, so that the first tokens go through: train them together with the model, by giving
    ``routers.parameters()`` to the optimizer too. In training, a token that predicts a label skips nothing. The router
    of the last layer stays as it is: no word reads what that layer gives for an image.

    Attributes:
        routers: one linear layer from a token to its logit for each layer with a router, named by its index; fp32.
        ratios: share of the image tokens that goes through each of these layers.
        stats: as of every reduction inside a decoder.

    Args:
        model: a vision-language model.
        ratios: by the index of the layer, from 0, in (0, 1]; the paper's `mixture_ratios` unless given. Numbers of
            tokens are rounded down, to one at least.
        scale: how far a weight can be from 1, at least 0.
        masked: let all tokens go through and hide those that would skip from attention: slow, and the reference.

    Raises:
        InputError: when a ratio is out of range or its layer not there, or the model's layout does not fit.
    """

    def __init__(
        self, model: nn.Module, ratios: Mapping[int, float] | None = None, scale: float = 0.2, masked: bool = False
    ):
        decoder = find_decoder(model)
        layers = len(decoder.layers)
        given = mixture_ratios(layers) if ratios is None else dict(sorted(ratios.items()))
        problems = []
        if decoder.images is None:
            message = f"{type(model).__name__} reads no images, whose tokens would skip layers."
            problems.append(Problem("model", message, "Give a vision-language model."))
        if not given or not all(0 <= layer < layers and 0 < ratio <= 1 for layer, ratio in given.items()):
            message = f"{given} are not shares in (0, 1] for layers of 0 to {layers - 1}."
            problems.append(Problem("ratios", message, "Write {8: 0.5, 9: 0.25}."))
        if not scale >= 0:
            problems.append(Problem("scale", f"{scale} is less than 0.", "The paper has 0.2."))
        first: Any = decoder.layers[0]
        if hasattr(first, "post_feedforward_layernorm") or getattr(first, "residual_multiplier", 1) != 1:
            message = f"{type(first).__name__} changes what its feed-forward layer gives before adding it."
            problems.append(Problem("model", message, "Use a Llama-like language model."))
        if problems:
            raise InputError(problems)
        method = _Routed(keep=1.0)
        method._ratios = given
        super().__init__(decoder, model, method, masked)
        self.ratios = given
        self.scale = scale
        self.routers = nn.ModuleDict()
        self._added: Tensor | None = None
        for index in given:
            router = nn.Linear(decoder.width, 1, device=next(decoder.layers[index].parameters()).device)
            nn.init.zeros_(router.weight)
            nn.init.zeros_(router.bias)
            self.routers[str(index)] = router
            self.on_undo(decoder.layers[index].mlp.register_forward_hook(self._see_added(index)).remove)

    def weights(self, index: int, hidden: Tensor) -> Tensor:
        """The weight of each token ([..., channels]) before a layer with a router: [...], fp32 or finer."""
        router: Any = self.routers[str(index)]
        kind = torch.promote_types(hidden.dtype, torch.float32)
        logit = nn.functional.linear(hidden.to(kind), router.weight.to(kind), router.bias.to(kind))
        return logit.squeeze(-1).tanh() * self.scale + 1

    def save(self, path: str | Path) -> None:
        """Write the routers and their ratios as safetensors, atomically."""
        values = {name: value.contiguous() for name, value in self.routers.state_dict().items()}
        values["ratios"] = torch.tensor(list(self.ratios.values()), dtype=torch.float64)
        content = save(values)
        write_binary(Path(path), lambda stream: stream.write(content))

    def load(self, path: str | Path) -> None:
        """Read routers that `save` wrote.

        Raises:
            InputError: when the file is missing or no safetensors, or was written for other layers, ratios or widths.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(missing_file("path", path))
        try:
            found = load(path.read_bytes())
        except SafetensorError as error:
            raise InputError(Problem("path", f"{str(path)!r} is no safetensors file: {error}.")) from None
        own = self.routers.state_dict()
        ratios = found.pop("ratios", torch.zeros(0)).tolist()
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if shapes != {name: tuple(value.shape) for name, value in own.items()} or ratios != list(self.ratios.values()):
            message = f"{str(path)!r} has routers for other layers, ratios or widths: {shapes} with ratios {ratios}."
            raise InputError(Problem("path", message, "Give the model and the ratios they were trained with."))
        self.routers.load_state_dict(found)

    def plan(self, candidates: int, tokens: int) -> list[int]:
        return self.method.counts(candidates, len(self.decoder.layers))

    def _see_added(self, index: int) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            # Recorded here and weighted behind the layer: while gradients are computed a checkpoint runs this again.
            if self._prompt is not None and self._prompt.inside == index:
                self._added = output[0] if isinstance(output, tuple) else output

        return see

    def _drop(self, prompt: Prompt, index: int, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        batch, tokens = prompt.real.shape
        prompt.index = torch.arange(tokens, device=hidden.device).expand(batch, -1)
        prompt.left, prompt.counts = prompt.real, prompt.candidates.sum(1).tolist()
        prompt.states, prompt.memory = None, {}
        if index not in self.ratios:
            return hidden
        weight = self.weights(index, hidden).where(prompt.candidates, 1)
        prompt.memory["weight"] = weight
        hidden = super()._drop(prompt, index, hidden, options)
        if prompt.states is not None:
            prompt.states = prompt.states * weight.unsqueeze(2).to(hidden.dtype)
        return hidden

    def _leaving(self, index: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            prompt, added = self._prompt, self._added
            self._added = None
            if prompt is None:
                return None
            prompt.inside = prompt.hidden = None
            if index not in self.ratios:
                return None
            assert added is not None
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and not added.requires_grad:
                raise InputError(
                    Problem(
                        "gradient_checkpointing_kwargs",
                        "ask for reentrant checkpoints, which hide what a router weights.",
                        "Set {'use_reentrant': False}.",
                    )
                )
            hidden, added = self._left(prompt, hidden), self._left(prompt, added)
            more = (prompt.memory["weight"] - 1).unsqueeze(2).to(hidden.dtype)
            whole = prompt.put_back(hidden + more * added)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return leave
