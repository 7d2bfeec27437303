"""The running average of parameters: its arithmetic, when it moves, and that it leaves no trace."""

from __future__ import annotations

import copy
import gc

import torch

from tokenwise.models.average import ParameterAverage


def test_it_follows_every_step_and_scores_as_the_averaged_model(tiny_llama):
    model = tiny_llama.double()
    model.model.embed_tokens.requires_grad_(False)
    model.train()
    average = ParameterAverage(model, decay=0.75)
    assert "model.embed_tokens.weight" not in average.tensors()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    unrelated = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        unrelated.step()
        optimizer.zero_grad()
        expected = {name: 0.75 * expected[name] + 0.25 * p.detach() for name, p in model.named_parameters()}
    for name, value in average.tensors().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)

    averaged = copy.deepcopy(model)
    averaged.load_state_dict(expected, strict=False)
    with torch.no_grad():
        logits = averaged.eval()(input_ids=ids).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), ids[:, 1:].reshape(-1), reduction="none")
    rows = torch.arange(16).view(2, 8)[:, :-1].reshape(-1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = [p.data_ptr() for p in model.parameters()]
    found = average.nll(rows, ids[:, 1:].reshape(-1), input_ids=ids)
    torch.testing.assert_close(found, nll, atol=1e-5, rtol=0)
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert storages == [p.data_ptr() for p in model.parameters()]

    other = ParameterAverage(model, decay=0.75)
    other.load_tensors(average.tensors())
    torch.testing.assert_close(other.nll(rows, ids[:, 1:].reshape(-1), input_ids=ids), found)


def test_the_hook_on_optimizers_ends_with_the_average(tiny_llama):
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks)
    average = ParameterAverage(tiny_llama, decay=0.5)
    assert len(optimizer._global_optimizer_post_hooks) == before + 1
    del average
    gc.collect()
    assert len(optimizer._global_optimizer_post_hooks) == before
