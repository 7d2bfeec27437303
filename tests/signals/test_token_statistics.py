import pytest
import torch

from tokenwise.signals import head as heads
from tokenwise.signals.head import OutputHead, token_statistics


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rank_and_most_likely_tokens_equal_those_of_whole_logits(monkeypatch, softcap):
    monkeypatch.setattr(heads, "_TILE_BYTES", 0)  # tiles of 16 rows
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    head = OutputHead(weight, torch.randn(30, generator=generator, dtype=torch.float64), 0.7, softcap)
    rows = torch.arange(49, 9, -1)
    labels = torch.randint(30, (40,), generator=generator)
    whole = head.logits(hidden).log_softmax(1)[rows]
    of_label = whole.gather(1, labels[:, None])
    for entropy in (False, True):
        found = token_statistics(
            hidden, head, labels, rows=rows, reads={"rank", "entropy"} if entropy else {"rank"}, top_k=5
        )
        assert torch.equal(found.rank, (whole > of_label).sum(1).int())
        assert torch.equal(found.top_ids.long(), whole.topk(5, dim=1).indices)
        torch.testing.assert_close(found.top_logp, whole.topk(5, dim=1).values)
        torch.testing.assert_close(found.nll, -of_label[:, 0])
    plain = token_statistics(hidden, head, labels, rows=rows)
    assert (plain.rank, plain.top_ids, plain.top_logp, plain.entropy) == (None, None, None, None)
