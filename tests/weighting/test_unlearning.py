"""The unlearning objectives: worked numbers, official implementations, closed gradients against autograd in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_steps import loss_of_logits
from torch import nn

import tokenwise as tw
from tokenwise import catalog
from tokenwise.errors import InputError
from tokenwise.signals import head as head_module
from tokenwise.signals.head import OutputHead
from tokenwise.weighting.asft import _Anchored
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.logit_objective import logit_sum
from tokenwise.weighting.objective import ObjectiveForward
from tokenwise.weighting.saturation_importance import mean_of_groups
from tokenwise.weighting.unlearning import Divergence
from tokenwise.weighting.unlearning_targets import _Adjusted, _Hinge, _Without

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "unlearning.json").read_text(encoding="utf-8"))


class Bigram(nn.Module):
    """The smallest model there is: hidden states are looked up by token."""

    def __init__(self, embedding, head):
        super().__init__()
        self.embedding = nn.Parameter(torch.tensor(embedding, dtype=torch.float64))
        self.head = nn.Linear(1, 1, bias=False)
        self.head.weight = nn.Parameter(torch.tensor(head, dtype=torch.float64))
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.device = torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def base_model(self, input_ids, attention_mask=None, **options):
        return SimpleNamespace(last_hidden_state=self.embedding[input_ids])

    def states(self, input_ids, **inputs):
        hidden = self.embedding[input_ids]
        return hidden.reshape(-1, hidden.shape[-1]).detach(), OutputHead(self.head.weight)


def golden_batch(forget):
    parts = [GOLDEN["rows"][forget], GOLDEN["rows"]["retain"]]
    batch = {name: torch.tensor(parts[0][name] + parts[1][name]) for name in ("input_ids", "labels")}
    batch["forget"] = torch.tensor([[1] * 9] * 3 + [[0] * 9] * 3)
    return batch


@pytest.mark.parametrize("name", [name for name, case in GOLDEN["cases"].items() if case["method"]])
def test_official_implementations(name):
    case = GOLDEN["cases"][name]
    model = Bigram(GOLDEN["embedding"], GOLDEN["head"])
    reference = Bigram(GOLDEN["reference_embedding"], GOLDEN["reference_head"])
    loss = ObjectiveForward(model, catalog.build(case["method"]), reference)(**golden_batch(case["forget"])).loss
    assert loss.item() == pytest.approx(case["loss"], rel=1e-8)
    loss.backward()
    for found, key in ((model.embedding.grad, "embedding_gradient"), (model.head.weight.grad, "head_gradient")):
        torch.testing.assert_close(found, torch.tensor(case[key], dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_official_divergence():
    case = GOLDEN["cases"]["kl"]
    model = Bigram(GOLDEN["embedding"], GOLDEN["head"])
    reference = Bigram(GOLDEN["reference_embedding"], GOLDEN["reference_head"])
    ids = torch.tensor(GOLDEN["rows"]["full"]["input_ids"]).reshape(-1)
    rows = torch.arange(ids.shape[0])
    batch = TokenBatch(ids, torch.zeros_like(rows), 1)
    total = logit_sum(
        model.embedding[ids], OutputHead(model.head.weight), rows, batch, Divergence(), reference.states(ids)
    )
    (total / len(rows)).backward()
    assert total.item() / len(rows) == pytest.approx(case["loss"], rel=1e-8)
    torch.testing.assert_close(model.head.weight.grad, torch.tensor(case["head_gradient"], dtype=torch.float64))


def losses_of(method, nll, sequence=None, reference_nll=None):
    nll = torch.as_tensor(nll, dtype=torch.float64)
    sequence = torch.zeros(len(nll), dtype=torch.int64) if sequence is None else torch.tensor(sequence)
    batch = TokenBatch(torch.zeros_like(sequence), sequence, int(sequence.max()) + 1, nll=nll)
    batch.reference_nll = reference_nll
    return method.forget_term().loss(batch)


def test_worked_numbers():
    half, quarter = -torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    values, slopes = losses_of(tw.SatImp(b2=0.1), [half, quarter])
    torch.testing.assert_close(-values, torch.tensor([0.0202103, 0.00131541]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(-slopes, torch.tensor([0.0291573, 0.00094887]).double(), rtol=1e-5, atol=0)
    values, slopes = losses_of(tw.SatImp(), [half, quarter])
    torch.testing.assert_close(-values, torch.tensor([0.0108304, 0.00101535]).double(), rtol=1e-5, atol=0)
    values, slopes = losses_of(tw.NPO(), [1.5, 1.0], reference_nll=torch.tensor([0.5, 0.0]))
    assert values.item() == pytest.approx(11.9627774, abs=1e-6)
    torch.testing.assert_close(slopes, torch.full((2,), -0.9003320, dtype=torch.float64), rtol=1e-6, atol=0)
    values, _ = losses_of(tw.SimNPO(), [1.0, 1.4])
    assert values.item() == pytest.approx(0.00200285, rel=1e-5)
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert _Hinge().tile(logits, TokenBatch(torch.tensor([0]), torch.tensor([0]), 1), None)[0].item() == pytest.approx(
        1.3
    )


@given(st.lists(st.floats(0, 30), min_size=1, max_size=12))
def test_limits_are_gradient_ascent(nll):
    values, slopes = losses_of(tw.GradientAscent(), nll)
    for method in (tw.SatImp(b1=0, b2=0), tw.WGA(beta=0), tw.weighting.SimSat(beta=0), tw.weighting.SimImp(beta=0)):
        found = losses_of(method, nll)
        torch.testing.assert_close(found[0], values)
        torch.testing.assert_close(found[1], slopes)
    _, npo = losses_of(tw.NPO(beta=1e-6), nll, reference_nll=torch.ones(len(nll)).double())
    torch.testing.assert_close(npo, slopes, atol=1e-3, rtol=0)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_groups_are_means_in_descending_order(lengths, size, seed):
    weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)).double()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = torch.empty_like(weights)
    for index in range(len(lengths)):
        place = (sequence == index).nonzero().squeeze(1)
        order = place[weights[place].argsort(descending=True)]
        for start in range(0, len(order), size):
            expected[order[start : start + size]] = weights[order[start : start + size]].mean()
    torch.testing.assert_close(mean_of_groups(weights, sequence, len(lengths), size), expected)


OBJECTIVES = {
    "kl": Divergence(),
    "undial": _Adjusted(10.0),
    "ceu": _Without(),
    "inverted_hinge": _Hinge(),
    "asft": _Anchored(0.1),
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_autograd_in_fp64(name, softcap, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    monkeypatch.setattr(head_module, "_TILE_BYTES", 4 * 23 * 16)  # tiles of sixteen rows
    hidden, weight, bias = (normal(*shape).requires_grad_() for shape in ((60, 7), (23, 7), (23,)))
    other, other_weight = normal(60, 5), normal(23, 5)
    head = OutputHead(weight, bias, 0.7, softcap)
    reference_head = OutputHead(other_weight)
    labels = torch.randint(23, (60,), generator=generator)
    rows = torch.randperm(60, generator=generator)[:41].sort().values
    batch = TokenBatch(labels[rows], torch.zeros_like(rows), 1)
    reference = (other, reference_head) if name in ("kl", "undial", "asft") else None
    total = logit_sum(hidden, head, rows, batch, OBJECTIVES[name], reference)
    found = torch.autograd.grad(2 * total, [hidden, weight, bias])
    value = loss_of_logits(name, head.logits(hidden[rows]), labels[rows], reference_head.logits(other[rows])).sum()
    torch.testing.assert_close(total, value)
    for ours, theirs in zip(found, torch.autograd.grad(2 * value, [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rivals_that_tie_give_no_nan_and_the_first_counts():
    batch = TokenBatch(torch.tensor([1, 0]), torch.tensor([0, 0]), 1)
    values, gradient = _Hinge().tile(torch.zeros(2, 3, dtype=torch.float64), batch, None)
    torch.testing.assert_close(values, torch.ones(2).double())
    third = 1 / 3
    torch.testing.assert_close(gradient, torch.tensor([[-third, third, 0], [third, -third, 0]]).double())


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(sorted(OBJECTIVES)))
def test_gradients_sum_to_zero_over_the_vocabulary(seed, name):
    generator = torch.Generator().manual_seed(seed)
    logits, theirs = (5 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(9, (6,), generator=generator)
    values, gradient = OBJECTIVES[name].tile(logits, TokenBatch(labels, torch.zeros(6), 1), theirs)
    assert (values >= -1e-12).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(6).double(), atol=1e-12, rtol=0)


def test_without_a_token_the_sum_is_a_differentiable_zero():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total = logit_sum(hidden, OutputHead(weight), none, TokenBatch(none, none, 0), _Hinge())
    total.backward()
    assert total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_the_first_tokens_of_each_answer_are_left_alone():
    model = Bigram(GOLDEN["embedding"], GOLDEN["head"])
    forward = ObjectiveForward(model, tw.CEU(skip=3), None)
    (term,) = forward.terms
    labels = torch.tensor([[-100, 4, 5, 6, 7, 8], [-100, -100, -100, 1, 2, 3]])
    columns = {"forget": torch.ones(2, 6)}
    rows, sequence = forward._rows(term, F.pad(labels[:, 1:], (0, 1), value=-100), columns, None)
    assert rows.tolist() == [3, 4]
    assert sequence.tolist() == [0, 0]


def test_losses_of_the_reference_as_a_column():
    model = Bigram(GOLDEN["embedding"], GOLDEN["head"])
    reference = Bigram(GOLDEN["reference_embedding"], GOLDEN["reference_head"])
    batch = golden_batch("forget")
    nll = F.cross_entropy(
        (reference.embedding[batch["input_ids"]] @ reference.head.weight.T)[:, :-1].transpose(1, 2),
        batch["labels"][:, 1:],
        reduction="none",
        ignore_index=-100,
    )
    batch["reference_nll"] = F.pad(nll.detach(), (1, 0))
    method = tw.NPO(reference="reference_nll")
    assert not method.needs_reference()
    loss = ObjectiveForward(model, method, None)(**batch).loss
    assert loss.item() == pytest.approx(GOLDEN["cases"]["npo"]["loss"], rel=1e-6)  # the column is read in fp32
    del batch["reference_nll"]
    with pytest.raises(InputError, match="reads the column 'reference_nll', which is not"):
        ObjectiveForward(model, method, None)(**batch)
    with pytest.raises(InputError, match="needs the model itself"):
        tw.NPO(reference="reference_nll", retain="kl")


def test_bad_fields_are_refused():
    for wrong in (
        lambda: tw.NPO(beta=0),
        lambda: tw.GradientDifference(retain="mse"),
        lambda: tw.SatImp(granularity="word"),
        lambda: tw.UNDIAL(forget_coefficient=-1),
    ):
        with pytest.raises(InputError):
            wrong()
