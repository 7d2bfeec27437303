"""Conversations of two rows whose turns have different lengths, what each row is alone, and methods for them."""

import contextlib

import torch
from small_decoders import prompt

import tokenwise as tw

METHODS = {
    "snap_kv": tw.SnapKV(queries=4),
    "ada_kv": tw.AdaKV(queries=4),
    "chunk_kv": tw.ChunkKV(queries=4, chunk=4),
    "critical_kv": tw.CriticalKV(queries=4),
    "h2o": tw.H2O(),
    "keyformer": tw.Keyformer(),
    "tova": tw.TOVA(),
    "streaming_llm": tw.StreamingLLM(sink=1),
    "sp_atten_cache": tw.SpAttenCache(),
    "lag_kv": tw.LagKV(lag=4, sink=1),
    "expected_attention": tw.ExpectedAttention(sink=1),
    "observed_attention": tw.ObservedAttention(),
    "k_norm": tw.KNorm(),
    "key_diff": tw.KeyDiff(),
    "pyramid_kv": tw.PyramidKV(queries=4),
    "think": tw.ThinK(queries=4),
    "kv_zip": tw.KVzip(sink=1, chunk=16),
    "random": tw.cache.Random(),
}


def batch_of(turns):
    """Ids [2, columns], padded on the left in each turn, their mask, and where turns end."""
    ids, mask, ends = [], [], []
    for number, sizes in enumerate(turns):
        most = max(sizes)
        rows = [prompt(size, seed=10 * number + place)[0] for place, size in enumerate(sizes)]
        ids.append(torch.stack([torch.nn.functional.pad(row, (most - len(row), 0)) for row in rows]))
        mask.append(torch.arange(most) >= torch.tensor([[most - size] for size in sizes]))
        ends.append(most + (ends[-1] if ends else 0))
    return torch.cat(ids, 1), torch.cat(mask, 1), ends


def read(cache, ids, mask, ends, start=0, piece=None):
    """Logits [rows, columns, words], and what is kept after each turn, [layers, rows, heads, columns]."""
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits, kept = [], []
    for end in ends:
        with cache.held(until=end) if piece else contextlib.nullcontext():
            while start < end:
                stop = min(start + (piece or end), end)
                options = {"attention_mask": mask[:, :stop].long(), "position_ids": places[:, start:stop]}
                logits.append(cache.model(ids[:, start:stop], past_key_values=cache, **options).logits)
                start = stop
        kept.append(torch.stack([cache.kept(index) for index in cache.places]))
    return torch.cat(logits, 1), kept


def assert_rows_are_as_alone(model, method, turns, piece=None, protect=None, **options):
    """And return what each keeps after each turn, of a layer and head, [rows][turns]."""
    if model.config._attn_implementation == "sdpa":
        # So that what differs is what was kept. Eager attention takes the softmax of padding in single precision: NaN.
        model = model.double()
    ids, mask, ends = batch_of(turns)
    with torch.no_grad(), tw.evict(model, method, protect=protect, **options) as cache:
        logits, kept = read(cache, ids, mask, ends, piece=piece)
    for row in range(2):
        own = mask[row]
        some = None if protect is None else protect[row : row + 1, own[: protect.shape[1]]]
        with torch.no_grad(), tw.evict(model, method, protect=some, **options) as cache:
            sizes = [int(own[:end].sum()) for end in ends]
            alone, alone_kept = read(cache, ids[row : row + 1, own], own[own].unsqueeze(0), sizes)
        for end, found, expected in zip(ends, kept, alone_kept, strict=True):
            assert torch.equal(found[:, row][..., own[:end]], expected[:, 0])
        assert float((logits[row, own] - alone[0]).abs().max()) < 1e-5
    return [
        [float((each[:, row] & mask[row, : each.shape[-1]]).sum(2).float().mean()) for each in kept] for row in range(2)
    ]
