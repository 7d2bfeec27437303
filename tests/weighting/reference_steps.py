"""What every update is compared with: one step of plain gradient descent on whole logits.

Each sequence goes through the model alone and unpadded; nothing here knows of batches, tiles or processes. The weights
of tokens are the method's own, which are a function of tokens in any order; losses of objectives, of classifiers and
scores of parameters are written out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenwise as tw
from tokenwise.weighting.base import Run, TokenBatch, TokenWeighter
from tokenwise.weighting.loss import weighted_linear_cross_entropy

TOLERANCE = 1e-6
"""The models are fp64, but transformers' RMSNorm and rotary embedding compute in fp32 whatever the model's type."""
IGNORED = -100
SEED = 3

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Token ids and labels of each sequence, [tokens] each."""


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


def descend(model: nn.Module, loss: Tensor, clip: float = 0.0) -> float:
    """Take the step in place; the loss before it."""
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    step(model)
    return loss.item()


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Move along the gradients that the parameters hold."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.5 * parameter.grad


def weighted_step(
    model: nn.Module,
    pairs: Pairs,
    method: TokenWeighter,
    reference: nn.Module | None = None,
    columns: Sequence[dict[str, Tensor]] | None = None,
    clip: float = 0.0,
    normalize: str = "none",
) -> tuple[float, Any]:
    """The loss and the model after a step under weights of tokens.

    Args:
        reference: gives `reference_nll` where the columns do not.
        columns: of each sequence its values by name, [tokens].
        normalize: ``mean`` divides by the sum of the sizes of the weights.
    """
    model = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {}
    for index, (ids, labels) in enumerate(pairs):
        kept = labels[1:] != IGNORED
        target = labels[1:][kept]
        given = {} if columns is None else {name: value[1:][kept] for name, value in columns[index].items()}
        logits = model(ids[None]).logits[0, :-1][kept]
        nll = F.cross_entropy(logits, target, reduction="none")
        top = logits.detach().topk(20).values.log_softmax(1)
        values = {
            "nll": nll,
            "entropy": -(logits.softmax(1) * logits.log_softmax(1)).sum(1).detach(),
            "top_entropy": -(top.exp() * top).sum(1),
            "labels": target,
            "sequence": torch.full_like(target, index),
        }
        if "prompt_attention" in method.reads:
            values["prompt_attention"] = prompt_attention(model, ids, labels)
        if "reference_nll" in method.reads and "reference_nll" not in given:
            values["reference_nll"] = reference_nll(method, model, reference, ids, labels)
        for name, value in (values | given).items():
            seen.setdefault(name, []).append(value)
    found = {name: torch.cat(values) for name, values in seen.items()}
    nll = found["nll"]
    names, sequence = torch.unique(found["sequence"], return_inverse=True)
    batch = TokenBatch(found["labels"], sequence, len(names), 0)
    for name in method.reads | {"nll"}:
        setattr(batch, name, found[name].detach())
    weights = method.weights(batch, method.start(Run(seed=SEED, model=model))).detach().double()
    values = weights * nll
    if isinstance(method, tw.Focal):  # its weight has a gradient
        values = (1 - torch.exp(-nll)) ** method.gamma * nll
    divisor = {
        "token_mean": len(nll),
        "weight_mean": weights.sum(),
        "nonzero_mean": weights.count_nonzero(),
        "sequence_mean": len(names),
    }[method.reduction]
    if method.reduction == "sequence_mean":
        lengths = torch.bincount(sequence)[sequence]
        values, weights = values / lengths, weights / lengths
    if normalize == "mean":
        divisor = weights.abs().sum()
    return descend(model, values.sum() / divisor, clip), model


def prompt_attention(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Share of the last layer's attention that each labelled token pays to unlabelled ones, [labels]."""
    # Eager attention computes its softmax in fp32, so it serves for nothing else.
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attention = eager(ids[None], output_attentions=True).attentions[-1][0].mean(0)[1:][labels[1:] != IGNORED]
    return attention[:, labels == IGNORED].sum(1).detach()


@torch.no_grad()
def reference_nll(
    method: TokenWeighter, model: nn.Module, reference: nn.Module | None, ids: Tensor, labels: Tensor
) -> Tensor:
    """What each label of a sequence costs the model that the method measures against, [labels]."""
    kept = labels[1:] != IGNORED
    if isinstance(method, tw.SsTokenAverage):  # the average of the model over no step yet
        logits = model(ids[None]).logits[0, :-1]
    elif isinstance(method, tw.ContextualGap):  # the model itself, on the labelled tokens and the one before them
        first = int(kept.nonzero()[0]) if kept.any() else 0
        logits = torch.zeros(len(kept), model.config.vocab_size, dtype=torch.float64)
        logits[first:] = model(ids[None, first:]).logits[0, :-1]
    else:
        assert reference is not None
        logits = reference(ids[None]).logits[0, :-1]
    return F.cross_entropy(logits[kept], labels[1:][kept], reduction="none")


def objective_step(
    model: nn.Module,
    pairs: Pairs,
    method: Any,
    reference: nn.Module,
    columns: Sequence[dict[str, Tensor]],
    clip: float = 0.0,
) -> tuple[float, Any]:
    """The loss and the model after a step under an objective, of the columns ``forget``."""
    model = copy.deepcopy(model)
    return descend(model, sum(objective_terms(model, pairs, method, reference, columns)), clip), model


def objective_terms(
    model: nn.Module, pairs: Pairs, method: Any, reference: nn.Module, columns: Sequence[dict[str, Tensor]]
) -> list[Tensor]:
    """The terms of an objective with their coefficients, the forget term first."""
    everything, forgotten, kept = [], [], []
    for (ids, labels), column in zip(pairs, columns, strict=True):
        logits, theirs = model(ids[None]).logits[0, :-1], reference(ids[None]).logits[0, :-1].detach()
        labelled, forget = labels[1:] != IGNORED, column["forget"][1:].bool()
        for chosen, part in ((labelled, everything), (labelled & forget, forgotten), (labelled & ~forget, kept)):
            if chosen.any():
                part.append((logits[chosen], labels[1:][chosen], theirs[chosen]))
    if method.card.name == "asft":
        return [torch.cat([loss_of_logits("asft", *part, factor=method.alpha) for part in everything]).mean()]
    found = [method.forget_coefficient * forget_losses(method, forgotten).mean()]
    if method.retain != "none" and method.retain_coefficient:
        losses = torch.cat([loss_of_logits(method.retain, *part) for part in kept])
        found.append(method.retain_coefficient * losses.mean())
    return found


def forget_losses(method: Any, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """What an unlearning method's forget term is the mean of: one loss for each token or for each sequence.

    Args:
        parts: logits, labels and the reference's logits of what is to be forgotten of each sequence.
    """
    name = method.card.name
    nll = [loss_of_logits("nll", *part) for part in parts]
    if name in ("gradient_ascent", "gradient_difference"):
        return -torch.cat(nll)
    if name == "wga":
        return torch.cat([-(torch.exp(-each.detach()) ** method.beta) * each for each in nll])
    if name == "npo":
        before = [F.cross_entropy(theirs, labels, reduction="sum") for _, labels, theirs in parts]
        gained = torch.stack([each.sum() for each in nll]) - torch.stack(before)
        return -2 / method.beta * F.logsigmoid(method.beta * gained)
    if name == "sim_npo":
        mean = torch.stack([each.mean() for each in nll])
        return -2 / method.beta * F.logsigmoid(method.beta * (mean - method.delta))
    if name in ("sat_imp", "sim_sat", "sim_imp"):
        return reweighted_ascent(method, nll)
    if name == "ceu":
        return torch.cat([loss_of_logits("ceu", *part)[method.skip :] for part in parts])
    factor = method.beta if name == "undial" else None
    return torch.cat([loss_of_logits(name, *part, factor=factor) for part in parts])


def reweighted_ascent(method: Any, nll: Sequence[Tensor]) -> Tensor:
    """Ascent weighted by ``p ** b1 * (1 - p) ** b2``, p being of a token or of a whole sequence."""
    name = method.card.name
    if name == "sat_imp":
        b1, b2 = method.b1, method.b2
    else:
        b1, b2 = (method.beta, 0.0) if name == "sim_sat" else (0.0, method.beta)

    def weight(nll: Tensor) -> Tensor:
        p = torch.exp(-nll.detach())
        return p**b1 * (1 - p) ** b2

    if method.granularity == "token":
        return torch.cat([-weight(each) * each for each in nll])
    if method.granularity == "group":
        groups = [(each, weight(each).argsort(descending=True).split(method.group_size)) for each in nll]
        return torch.cat([-weight(each)[group].mean() * each[group] for each, parts in groups for group in parts])
    total = torch.stack([each.sum() for each in nll])
    weights = weight(total)
    return -(weights.mean() if method.granularity == "batch" else weights) * total


def loss_of_logits(
    name: str, logits: Tensor, labels: Tensor, theirs: Tensor | None, factor: float | None = None
) -> Tensor:
    """A loss of each row of logits, written out for autograd: [rows].

    Args:
        theirs: the reference's logits.
        factor: by how much UNDIAL lowers a logit, 10 by default; what ASFT multiplies the divergence with, 0.1.
    """
    log_p, p = logits.log_softmax(1), logits.softmax(1)
    one_hot = F.one_hot(labels, logits.shape[1]).bool()
    of_label = p[one_hot]
    if name == "nll":
        return -log_p[one_hot]
    if name == "ceu":
        target = logits.detach().masked_fill(one_hot, -torch.inf).softmax(1)
        return -(target * log_p).sum(1)
    if name == "inverted_hinge":
        return 1 + of_label - p.masked_fill(one_hot, -1).amax(1)
    assert theirs is not None
    if name == "undial":
        return -((theirs - (10 if factor is None else factor) * one_hot).softmax(1) * log_p).sum(1)
    q = theirs.softmax(1)
    divergence = (q * (q.log() - log_p)).sum(1)
    if name == "kl":
        return divergence
    assert name == "asft", name
    return -of_label.detach() * of_label.log() + (0.1 if factor is None else factor) * divergence


def class_step(model: Any, rows: Sequence[dict[str, Any]], method: Any, clip: float = 0.0) -> tuple[float, Any]:
    """The loss and the classifier after a step, all examples at once; the data are this one step."""
    model = copy.deepcopy(model)
    if method.card.name == "storm":
        loss = storm_loss(model, rows, method)
    else:
        loss = class_loss(method, *logits_and_labels(model, rows))
    return descend(model, loss, clip), model


def logits_and_labels(model: Any, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Of every example (or token) that has a label: [examples, classes] and [examples]."""
    logits = model(
        torch.stack([row["input_ids"] for row in rows]), torch.stack([row["attention_mask"] for row in rows])
    ).logits
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    if labels.is_floating_point():
        return logits, labels
    kept = labels.reshape(-1) != IGNORED
    return logits.reshape(-1, logits.shape[-1])[kept], labels.reshape(-1)[kept]


def class_loss(method: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a classifier's step, written out."""
    name = method.card.name
    if labels.dim() == 2:
        bce = F.binary_cross_entropy_with_logits
        if name == "class_uniform":
            return bce(logits, labels)
        if name == "ldam":
            return bce(logits - labels * method.max_margin / labels.sum(0).clamp_min(1) ** 0.25, labels)
        if name == "dice":
            return overlap_loss(method, logits.sigmoid(), labels)
        assert name == "class_focal", name
        return ((labels - logits.sigmoid()).abs() ** method.gamma * bce(logits, labels, reduction="none")).mean()
    counts = labels.bincount(minlength=logits.shape[1]).double()
    nll = F.cross_entropy(logits, labels, reduction="none")
    if name == "class_uniform":
        return nll.mean()
    if name in ("class_balanced", "inverse_frequency"):
        weights = counts**-method.power if name == "inverse_frequency" else effective_numbers(method.beta, counts)
        if method.divide_by == "examples":
            return (weights / weights.mean())[labels].mul(nll).mean()
        # The data are one batch: what is expected of as many examples is what they have.
        return F.cross_entropy(logits, labels, weights)
    if name == "ldam":
        margins = method.max_margin * (counts / counts.min()) ** -0.25
        late = None if method.defer > 0 else effective_numbers(method.beta, counts)
        return F.cross_entropy(logits - F.one_hot(labels, len(counts)) * margins, labels, late)
    if name == "logit_adjustment":
        return F.cross_entropy(logits + method.tau * (counts / counts.sum()).log(), labels)
    if name == "dice":
        return overlap_loss(method, logits.softmax(1), F.one_hot(labels, len(counts)))
    assert name == "class_focal", name
    return ((1 - torch.exp(-nll)) ** method.gamma * nll).mean()


def effective_numbers(beta: float, counts: Tensor) -> Tensor:
    return (1 - beta) / (1 - beta**counts)


def overlap_loss(method: Any, p: Tensor, y: Tensor) -> Tensor:
    """Dice loss, summed over the classes."""
    damped = (1 - p) ** method.alpha * p
    size = {
        "square": lambda: damped**2 + y,
        "paper": lambda: damped + y,
        "batch": lambda: (damped + y).sum(0, keepdim=True),
    }[method.denominator]()
    return (1 - (2 * damped * y + method.smoothing) / (size + method.smoothing)).sum(1).mean()


def storm_loss(model: Any, rows: Sequence[dict[str, Any]], method: Any) -> Tensor:
    """STORM's first step on a Llama classifier, when its network of weights has not learnt anything yet."""
    ids = torch.stack([row["input_ids"] for row in rows])
    mask = torch.stack([row["attention_mask"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    features = model.model(ids, mask).last_hidden_state[torch.arange(len(rows)), last]
    head = model.score.weight
    p = (features @ head.T).softmax(1).detach()
    own = p.gather(1, labels[:, None])[:, 0]
    rival = p.scatter(1, labels[:, None], -1).amax(1)
    entropy = -(p * p.log()).sum(1) / torch.tensor(float(p.shape[1])).log()
    draws = torch.rand(method.passes, *features.shape, generator=torch.Generator().manual_seed(SEED))
    dropped = features * (draws >= method.dropout) / (1 - method.dropout)
    seen = (dropped @ head.T).softmax(2)[:, torch.arange(len(rows)), labels]
    statistics = torch.stack([-own.log(), own, own - rival, entropy, seen.std(0, unbiased=False)], 1).detach()
    generator = torch.Generator().manual_seed(SEED)
    shapes = ((method.hidden, 5), (method.hidden,), (1, method.hidden), (1,))
    one, one_bias, two, two_bias = (0.1 * torch.randn(shape, generator=generator).double() for shape in shapes)
    weights = ((statistics @ one.T + one_bias).tanh() @ two.T + two_bias).sigmoid()[:, 0]
    return (weights / weights.mean() * F.cross_entropy(features @ head.T, labels, reduction="none")).mean()


def chosen_parameters(
    model: Any, method: Any, forget: Sequence[dict[str, Tensor]], retain: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Masks of the parameters with the highest scores under a `ParameterMasks`, over all of them together."""

    def gradients(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        copied = copy.deepcopy(model).eval()
        for batch in batches:
            logits = copied(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        return {name: parameter.grad for name, parameter in copied.named_parameters()}

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = method.card.name
    if name == "wagle":
        f, r = gradients(forget), gradients(retain)
        scores = {key: ((value - r[key] / method.mu) * f[key]).abs() for key, value in parameters.items()}
    elif name == "largest_gradients":
        scores = {key: value.abs() for key, value in gradients(forget).items()}
    elif name == "largest_weights":
        scores = {key: value.abs() for key, value in parameters.items()}
    else:
        assert name == "random_parameters", name
        generator = torch.Generator().manual_seed(0)
        scores = {key: torch.rand(value.shape, generator=generator) for key, value in parameters.items()}
    ordered = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
    least = ordered[int(method.keep * len(ordered) + 0.5) - 1]
    return {key: score >= least for key, score in scores.items()}


def masked_step(model: nn.Module, pairs: Pairs, masks: dict[str, Tensor], clip: float = 0.0) -> tuple[float, Any]:
    """The loss and the model after a step under plain cross-entropy that only changes what the masks allow."""
    loss, found = weighted_step(model, pairs, tw.Uniform(), clip=clip)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(torch.where(masks[name], parameter, model.get_parameter(name)))
    return loss, found


def check_official_loss(method: TokenWeighter, golden: Any, case: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the fused loss and its gradients with those that official code gave; the inputs, with their gradients.

    Returns:
        Hidden states [batch, tokens, hidden], the head's weight, and labels moved to what predicts them.
    """
    hidden, weight = (torch.tensor(golden[name], requires_grad=True) for name in ("hidden", "weight"))
    labels = F.pad(torch.tensor(golden["labels"])[:, 1:], (0, 1), value=IGNORED)
    loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=method, denominator=golden["num_items"])
    loss.backward()
    assert abs(loss.item() - case["loss"]) <= 1e-6
    torch.testing.assert_close(hidden.grad, torch.tensor(case["hidden_gradient"]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weight.grad, torch.tensor(case["weight_gradient"]), atol=1e-6, rtol=1e-5)
    return hidden, weight, labels
