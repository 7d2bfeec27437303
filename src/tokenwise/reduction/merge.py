"""What a reduction does to the tokens: which stay, and where the others go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


def take(values: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index` ([batch, taken], int64) of values [batch, tokens, channels].

    Copies whole rows: `gather` looks up every channel by itself, which takes several times as long.
    """
    batch, tokens = values.shape[:2]
    rows = index + torch.arange(0, batch * tokens, tokens, device=index.device).unsqueeze(1)
    return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


@dataclass
class Merge:
    """Fewer tokens made from many: some stay, each other one goes into one of them or is dropped.

    Args:
        kept: for each output token the input token whose place it takes, [batch, kept], int64.
        target: the output token that each input token goes to, [batch, tokens], int64; -1 where it is dropped. None
            where all but the kept ones are dropped. An output token to which none goes has size 0 and fills up its
            row: it is the kept token once more, and attention does not see it (`fills`).
        weights: of each input token in the sum it goes to, [batch, tokens]; its size unless given.
        average: whether each sum is divided by the sum of its weights.
        sizes: what each token adds to the size of the output token, [batch, tokens]; its size unless given.
        fills: whether there may be output tokens to which none goes.
        joining: the tokens that go into one that stays, [batch, joining], where they are as many in each image and all
            others stay: makes a merge of few tokens cheap.
    """

    kept: Tensor
    target: Tensor | None = None
    weights: Tensor | None = None
    average: bool = True
    sizes: Tensor | None = None
    fills: bool = False
    joining: Tensor | None = None

    def apply(self, values: Tensor, size: Tensor) -> Tensor:
        """The output tokens' values.

        Args:
            values: [batch, tokens, channels].
            size: of each token, [batch, tokens].

        Returns:
            [batch, kept, channels], in the type of `values`; sums are made in fp32 (fp64 for fp64).
        """
        if self.target is None:
            return take(values, self.kept)
        dtype = torch.promote_types(values.dtype, torch.float32)
        weights = (size if self.weights is None else self.weights).to(dtype)
        if self.joining is not None and self.average:
            return self._joined(values, weights)
        # A token that nothing joins is passed on as it is, whatever the arithmetic of the others.
        total = self._sum(weights.unsqueeze(2) * values.to(dtype))
        if self.average:
            weight = self._sum(weights.unsqueeze(2))
            total = total / weight.where(weight != 0, 1)
        alone = self._sum(torch.ones_like(weights).unsqueeze(2)) <= 1
        own = take(values, self.kept)
        unchanged = alone if self.average else alone & (weights.gather(1, self.kept) == 1).unsqueeze(2)
        return torch.where(unchanged, own, total.to(values.dtype))

    def _joined(self, values: Tensor, weights: Tensor) -> Tensor:
        """The means where few tokens join others: only these are added up."""
        assert self.joining is not None
        into = self._into
        share = weights.gather(1, self.joining) / self._joined_sums(weights).gather(1, into)
        output = take(values, self.kept).to(weights.dtype)
        # A mean moves towards what joins it by its share of the sum: a token that nothing joins is not touched.
        added = (take(values, self.joining).to(weights.dtype) - take(output, into)) * share.unsqueeze(2)
        return output.scatter_add_(1, into.unsqueeze(2).expand_as(added), added).to(values.dtype)

    @cached_property
    def _into(self) -> Tensor:
        """The output token that each of those `joining` goes to, [batch, joining]."""
        assert self.target is not None
        assert self.joining is not None
        return self.target.gather(1, self.joining)

    def _joined_sums(self, values: Tensor) -> Tensor:
        """`values` ([batch, tokens]) of each output token and of what joins it, [batch, kept]."""
        assert self.joining is not None
        return values.gather(1, self.kept).scatter_add_(1, self._into, values.gather(1, self.joining))

    def new_size(self, size: Tensor) -> Tensor:
        """The size of each output token, [batch, kept], from the input's [batch, tokens]."""
        if self.target is None:
            return size.gather(1, self.kept)
        if self.joining is not None and self.sizes is None:
            return self._joined_sums(size)
        return self._sum((size if self.sizes is None else self.sizes.to(size.dtype)).unsqueeze(2)).squeeze(2)

    def moved(self) -> Tensor:
        """The output token of each input token, [batch, tokens]; -1 where it is dropped."""
        if self.target is not None:
            return self.target
        batch, count = self.kept.shape
        places = torch.arange(count, device=self.kept.device).expand(batch, -1)
        tokens = int(self.kept.max()) + 1 if count else 0
        return torch.full((batch, tokens), -1, device=self.kept.device).scatter_(1, self.kept, places)

    def matrix(self, size: Tensor) -> Tensor:
        """The same as a matrix, [batch, kept, tokens] in fp64: ``matrix @ values`` is `apply`."""
        batch, tokens = size.shape
        target = torch.full((batch, tokens), -1, device=size.device)
        moved = self.moved()
        target[:, : moved.shape[1]] = moved
        places = torch.arange(self.kept.shape[1], device=size.device)
        member = (target.unsqueeze(1) == places[:, None]).double()
        if self.target is None:
            return member
        weighted = member * (size if self.weights is None else self.weights).double().unsqueeze(1)
        filling = nn.functional.one_hot(self.kept, tokens).double()
        weighted = weighted.where(member.sum(2, keepdim=True) > 0, filling)
        return weighted / weighted.sum(2, keepdim=True) if self.average else weighted

    def _sum(self, values: Tensor) -> Tensor:
        """Sums over what goes to each output token, [batch, kept, channels]; the dropped go to a row cut off."""
        assert self.target is not None
        count = self.kept.shape[1]
        index = torch.where(self.target < 0, count, self.target).unsqueeze(2).expand_as(values)
        whole = values.new_zeros(values.shape[0], count + 1, values.shape[2])
        return whole.scatter_add_(1, index, values)[:, :count]


@dataclass
class Mixture:
    """Output tokens that are sums of any inputs, as a learned slimming makes them or a neighbourhood does.

    Args:
        kept: for each output token the input token whose place it takes, [batch, kept], int64.
        mixing: the weight of each input token in each output token, [batch, kept, tokens].
    """

    kept: Tensor
    mixing: Tensor

    def apply(self, values: Tensor, size: Tensor) -> Tensor:
        """As `Merge.apply`."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return (self.mixing.to(dtype) @ values.to(dtype)).to(values.dtype)

    def new_size(self, size: Tensor) -> Tensor:
        """As `Merge.new_size`."""
        return (self.mixing.to(size.dtype) @ size.unsqueeze(2)).squeeze(2)

    def moved(self) -> Tensor:
        """The output token that stands in each kept input token's place, [batch, tokens]; -1 elsewhere."""
        places = torch.arange(self.kept.shape[1], device=self.kept.device).expand(self.kept.shape[0], -1)
        empty = torch.full((self.kept.shape[0], self.mixing.shape[2]), -1, device=self.kept.device)
        return empty.scatter_(1, self.kept, places)

    def matrix(self, size: Tensor) -> Tensor:
        """As `Merge.matrix`."""
        return self.mixing.double()


def keep_only(kept: Tensor) -> Merge:
    """The tokens `kept` ([batch, kept], int64) in this order; the others are dropped."""
    return Merge(kept)
