"""What `token_weights` says of objectives, against the gradients that training takes."""

from __future__ import annotations

import math

import pytest
import torch

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.apply import token_weights

IDS = [3, 17, 22, 5, 41, 9, 30, 12]
LABELS = [-100, -100, 22, 5, 41, 9, 30, 12]
FORGET = {"forget": [1] * 8}
RETAIN = {"forget": [0] * 8}


@pytest.fixture
def model(tiny_llama):
    return tiny_llama.double().eval()


def gradient_of_training(model, method, columns):
    """The gradient of the method's loss at the last hidden states of the labels, [labels, hidden]."""
    states = []

    def keep(module, arguments, output):
        if output.requires_grad:  # not the reference's
            output.retain_grad()
            states.append(output)

    handle = model.model.norm.register_forward_hook(keep)
    inputs = {"input_ids": torch.tensor([IDS]), "labels": torch.tensor([LABELS])}
    with tw.weigh(model, method):
        model.train()
        model(**inputs, **{name: torch.tensor([values]) for name, values in columns.items()}).loss.backward()
    model.eval()
    handle.remove()
    return states[0].grad[0, 1:-1]


@pytest.mark.parametrize(
    "method",
    [
        tw.weighting.GradientAscent(),
        tw.weighting.GradientDifference(forget_coefficient=0.5),
        tw.weighting.WGA(beta=2.0),
        tw.weighting.NPO(beta=0.5),
        tw.weighting.SimNPO(),
        tw.weighting.SatImp(),
        tw.weighting.SatImp(granularity="instance"),
    ],
    ids=lambda method: method.card.name,
)
@pytest.mark.parametrize("columns", [FORGET, RETAIN], ids=["forget", "retain"])
def test_factors_times_the_gradient_of_the_loss_are_the_gradient_of_training(
    model, method, columns, reference_directory
):
    if method.needs_reference():
        method = method.replace(reference=reference_directory)
    told = token_weights(model, method, IDS, labels=LABELS, columns=columns)
    assert told.quantity == "factor"
    assert told.weights[:2] == [None, None]
    factors = torch.tensor(told.weights[2:], dtype=torch.float64)
    if columns is RETAIN and not method.retains():
        assert not factors.any()
        return
    logits = model(input_ids=torch.tensor([IDS])).logits[0, 1:-1].detach()
    plain = logits.softmax(1) - torch.nn.functional.one_hot(torch.tensor(IDS[2:]), logits.shape[1])
    # There is one sequence.
    units = 1 if columns is FORGET and method.terms()[0].unit == "sequence" else 6
    expected = factors[:, None] * plain @ model.lm_head.weight.detach() / units
    torch.testing.assert_close(gradient_of_training(model, method, columns), expected, rtol=1e-5, atol=1e-8)
    assert (factors < 0).all() if columns is FORGET else (factors > 0).all()


def test_npo_as_it_starts_is_ascent_and_fades_with_what_was_forgotten(model, reference_directory):
    started = token_weights(model, tw.NPO(), IDS, labels=LABELS, columns=FORGET)
    assert started.weights[2:] == pytest.approx([-1.0] * 6)
    columns = {**FORGET, "reference_nll": [loss and loss - 2.0 for loss in (0.0, 0.0, *started.nll[2:])]}
    later = token_weights(model, tw.NPO(reference="reference_nll"), IDS, labels=LABELS, columns=columns)
    # Six tokens have gained 2 nats each: 2 / (1 + exp(0.1 * 12)).
    assert later.weights[2:] == pytest.approx([-2 / (1 + math.exp(1.2))] * 6, rel=1e-5)


@pytest.mark.parametrize(
    "method", [tw.weighting.CEU(), tw.weighting.UNDIAL(), tw.weighting.InvertedHinge(), tw.weighting.ASFT()]
)
def test_norms_of_gradients_at_the_logits(model, method, reference_directory):
    if method.needs_reference():
        method = method.replace(reference=reference_directory)
    told = token_weights(model, method, IDS, labels=LABELS, columns=FORGET)
    assert told.quantity == "gradient"
    logits = model(input_ids=torch.tensor([IDS])).logits[0, 1:-1].detach().requires_grad_()
    labels = torch.tensor(IDS[2:])
    theirs = type(model).from_pretrained(reference_directory).double()
    before = theirs(input_ids=torch.tensor([IDS])).logits[0, 1:-1].detach()
    total = reference_loss(method, logits, labels, before)
    total.sum().backward()
    slope = logits.grad.gather(1, labels[:, None]).squeeze(1)
    expected = logits.grad.norm(dim=1) * -slope.sign()
    if isinstance(method, tw.weighting.CEU):
        expected[0] = 0  # the first token of an answer is left alone
    torch.testing.assert_close(torch.tensor(told.weights[2:], dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)


def reference_loss(method, logits, labels, before):
    """The losses in plain autograd."""
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    logp = logits.log_softmax(1)
    if isinstance(method, tw.weighting.CEU):
        return -(logits.detach().masked_fill(own, -math.inf).softmax(1) * logp).sum(1)
    if isinstance(method, tw.weighting.UNDIAL):
        return -((before - method.beta * own).softmax(1) * logp).sum(1)
    if isinstance(method, tw.weighting.InvertedHinge):
        probabilities = logits.softmax(1)
        return 1 + probabilities[own] - probabilities.masked_fill(own, -1).amax(1)
    nll = -logp[own]
    kl = (before.softmax(1) * (before.log_softmax(1) - logp)).sum(1)
    return nll.detach().neg().exp() * nll + method.alpha * kl


def test_a_text_of_both_kinds_has_one_quantity(model):
    """Tokens that are kept have the norm of their loss's own gradient beside those that CE-U forgets."""
    columns = {"forget": [1, 1, 1, 1, 1, 0, 0, 0]}
    told = token_weights(model, tw.weighting.CEU(skip=0, retain="nll", retain_coefficient=2.0), IDS, columns=columns)
    assert told.quantity == "gradient"
    probabilities = model(input_ids=torch.tensor([IDS])).logits[0, 4:-1].detach().softmax(1)
    own = torch.nn.functional.one_hot(torch.tensor(IDS[5:]), probabilities.shape[1])
    assert told.weights[5:] == pytest.approx((2 * (probabilities - own).norm(dim=1)).tolist(), rel=1e-4)
    assert all(weight < 0 for weight in told.weights[1:5])


def test_a_mixed_text_of_factors(model):
    columns = {"forget": [1, 1, 1, 0, 0, 0, 1, 1]}
    told = token_weights(model, tw.weighting.GradientDifference(retain_coefficient=0.3), IDS, columns=columns)
    assert told.weights[1:] == pytest.approx([-1, -1, 0.3, 0.3, 0.3, -1, -1])
    left = token_weights(model, tw.weighting.GradientAscent(), IDS, columns=columns)
    assert left.weights[1:] == [-1, -1, 0, 0, 0, -1, -1]


def test_the_column_forget_is_asked_for(model):
    with pytest.raises(InputError, match="reads the column 'forget'"):
        token_weights(model, tw.NPO(), IDS)
