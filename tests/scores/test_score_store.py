"""The store's numbers against whole logits, its files, resuming, looking up and joining."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.flops import FlopMeter
from tokenwise.models.load import train_tokenizer
from tokenwise.scores import layout, scorer, scoring, store
from tokenwise.scores.layout import row_key
from tokenwise.scores.rows import Encoder, make_shards

LENGTHS = (12, 7, 1, 12, 3, 9, 2, 5, 31, 12)
EVERYTHING = ("logp", "entropy", "rank", "top_k")


def make_rows(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (length,), generator=generator).tolist() for length in lengths]


ROWS = make_rows()


def score(model, out, rows=ROWS, **options):
    return tw.scores.score(model, rows, out, **{"batch_tokens": 30, "shard_tokens": 25, **options})


def expected(model, row):
    """fp64 log-probabilities of the whole vocabulary, [tokens - 1, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)


def said(error):
    return str(error.value)


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.parquet"))}


# What is stored


def test_every_statistic_equals_that_of_the_whole_logits(tiny_llama, tmp_path):
    made = score(tiny_llama.double(), tmp_path / "s", statistics=EVERYTHING, top_k=3)
    assert made.rows == len(ROWS)
    assert made.manifest.tokens == sum(LENGTHS)
    assert made.manifest.shards > 2
    for row in ROWS:
        found = made.lookup(row)
        whole = expected(tiny_llama, row)
        logp = whole.gather(1, torch.tensor(row[1:])[:, None])[:, 0] if len(row) > 1 else whole.new_zeros(0)
        # Half of fp16's spacing at most, beside the rounding of the model itself.
        torch.testing.assert_close(found["logp"][1:].double(), logp, rtol=2**-11, atol=2e-6)
        torch.testing.assert_close(found["entropy"][1:].double(), -(whole.exp() * whole).sum(1), rtol=2**-11, atol=2e-6)
        assert torch.equal(found["nll"], -found["logp"])
        assert found["rank"][1:].tolist() == (whole > logp[:, None]).sum(1).tolist()
        top = whole.topk(3, dim=1)
        assert torch.equal(found["top_ids"][1:], top.indices)
        torch.testing.assert_close(found["top_logp"][1:].double(), top.values, rtol=2**-11, atol=2e-6)
        # The first token is given: its log-probability is 0, so that the sum is that of the row.
        assert [found[name][0].item() for name in ("logp", "nll", "entropy", "rank")] == [0, 0, 0, 0]
        assert found["top_ids"][0].tolist() == [-1, -1, -1]


def test_the_files_are_plain_parquet_in_half_precision(tiny_llama, tmp_path):
    score(tiny_llama, tmp_path / "s", statistics=("logp", "rank"))
    tables = [parquet.read_table(file) for file in sorted((tmp_path / "s").glob("*.parquet"))]
    assert {str(table.schema.field("logp").type.value_type) for table in tables} == {"halffloat"}
    assert {str(table.schema.field("rank").type.value_type) for table in tables} == {"int32"}
    keys = [key for table in tables for key in table["key"].to_pylist()]
    assert keys == [row_key(np.array(row, dtype=np.int32)) for row in ROWS]
    assert [length for table in tables for length in table["length"].to_pylist()] == list(LENGTHS)


def test_what_half_precision_cannot_hold_is_its_largest_number():
    values = scorer._half(torch.tensor([-1e9, -65504.0, -1.5, 1e9]))
    assert values.tolist() == [-65504.0, -65504.0, -1.5, 65504.0]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    found = list(scorer.batches(lengths, budget))
    assert sorted(index for batch in found for index in batch) == [i for i, length in enumerate(lengths) if length > 1]
    for batch in found:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 20), st.sets(st.integers(0, 8)))
def test_finished_shards_are_passed_over_exactly(lengths, shard_tokens, there):
    values = [(str(index), [index % 64] * length) for index, length in enumerate(lengths)]
    source = type("Source", (), {"values": lambda self: iter(values)})()
    encoder = Encoder("ids", None, 64, None)
    whole = list(make_shards(source, encoder, shard_tokens, lambda index: None))
    again = make_shards(
        source, encoder, shard_tokens, lambda i: whole[i].facts() if i in there and i < len(whole) else None
    )
    for before, after in zip(whole, again, strict=True):
        assert (after if isinstance(after, dict) else after.facts()) == before.facts()
    assert sum(shard.records for shard in whole) == len(lengths)


# Resuming


def test_a_run_that_failed_continues_to_the_same_files(tiny_llama, tmp_path, monkeypatch):
    score(tiny_llama, tmp_path / "whole")
    whole = shard_bytes(tmp_path / "whole")
    written = []

    def failing(folder, table, write=scoring.write_shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(table)
        return write(folder, table)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            score(tiny_llama, tmp_path / "parts")
    assert len(shard_bytes(tmp_path / "parts")) == 2
    with pytest.raises(InputError, match=r"not finished.*Run the same command again"):
        tw.scores.open(tmp_path / "parts")
    # A hole, as parallel workers leave one, and half a file, as kill -9 does.
    (tmp_path / "parts" / "shard-000000.parquet").unlink()
    (tmp_path / "parts" / ".shard-000002.parquet.x").write_bytes(b"half")
    monkeypatch.setattr(scoring, "write_shard", lambda f, t, w=scoring.write_shard: written.append(t) or w(f, t))
    score(tiny_llama, tmp_path / "parts")
    assert len(written) == 2 + len(whole) - 1
    assert shard_bytes(tmp_path / "parts") == whole
    assert not list((tmp_path / "parts").glob(".shard*"))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "parts")]
    assert all(manifest.pop("cost") for manifest in manifests)  # what was computed twice was paid twice
    assert manifests[0] == manifests[1]


def test_a_killed_run_continues_to_the_same_files(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    program = (
        "import os, signal, sys, json\n"
        "from tokenwise.scores import scoring\n"
        "model, out, rows, dies = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])\n"
        "write, count = scoring.write_shard, 0\n"
        "def counted(*arguments):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == dies: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(*arguments)\n"
        "scoring.write_shard = counted\n"
        "scoring.score(model, rows, out, batch_tokens=30, shard_tokens=25)\n"
    )

    def run(out, dies):
        command = [sys.executable, "-c", program, str(tmp_path / "model"), str(tmp_path / out), json.dumps(ROWS), dies]
        return subprocess.run(command, check=False).returncode

    assert run("parts", "3") == -9
    assert len(shard_bytes(tmp_path / "parts")) == 2
    score(str(tmp_path / "model"), tmp_path / "parts")
    score(str(tmp_path / "model"), tmp_path / "whole")
    assert shard_bytes(tmp_path / "parts") == shard_bytes(tmp_path / "whole")


def test_a_finished_run_answers_at_once(tiny_llama, tmp_path, monkeypatch):
    score(tiny_llama, tmp_path / "s")
    monkeypatch.setattr(scorer.Scorer, "columns", None)
    assert score(tiny_llama, tmp_path / "s").rows == len(ROWS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": make_rows(seed=1)}, "data.fingerprint"),
        ({"statistics": ("logp", "rank")}, "statistics"),
        ({"max_length": 5}, "max_length"),
        ({"batch_tokens": 31}, "batch_tokens"),
        ({"other": True}, "model.fingerprint"),
    ],
)
def test_a_folder_with_other_scores_is_refused(tiny_llama, tmp_path, change, named):
    score(tiny_llama, tmp_path / "s")
    before = shard_bytes(tmp_path / "s")
    if change.pop("other", False):
        tiny_llama.lm_head.weight.data[3, 3] += 1
    with pytest.raises(InputError, match=rf"holds scores with {named} .*Use another folder"):
        score(tiny_llama, tmp_path / "s", **change)
    assert shard_bytes(tmp_path / "s") == before


def test_progress_is_a_line_per_shard_where_nobody_watches(tiny_llama, tmp_path):
    stream = io.StringIO()
    made = score(tiny_llama, tmp_path / "s", console=Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == made.manifest.shards
    assert lines[-1].startswith("10 of 10 records: ")
    assert all("tokens/s, " in line and " min left" in line for line in lines)


# Bad input


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"statistics": ("logp", "entrpy")}, "statistics: there is no statistic 'entrpy'. Did you mean 'entropy'?"),
        ({"statistics": ()}, "statistics: () is no list of names."),
        ({"statistics": ("top_k",), "top_k": 65}, "top_k: 65 is more than the vocabulary of 64 tokens."),
        ({"max_length": 1}, "max_length: 1 is too small."),
        ({"max_length": 65}, "max_length: 65 is more than the model reads (64)."),
        ({"rows": [[1, 64]]}, "data[0] has token ids outside 0 to 63"),
        ({"rows": [[1, -1]]}, "data[0] has token ids outside 0 to 63"),
        ({"rows": [[1, 2], {"text": "a"}]}, "data[1] holds text, where other records hold ids."),
        ({"rows": [{"text": "a"}]}, "data: holds text, and there is no tokenizer."),
        ({"rows": [1.5]}, "data: holds float, which is neither text nor messages nor token ids."),
        ({"rows": []}, "data: is empty."),
        ({"rows": [[], []]}, "data: all 2 records are empty."),
        ({"rows": [{"ids": [1]}], "field": "idz"}, "data[0] has no field 'idz'; it has ids. Did you mean 'ids'?"),
        ({"rows": (row for row in ROWS)}, "data: generator cannot be read more than once."),
        ({"adapters": False}, "adapters: LlamaForCausalLM has no adapters to leave out."),
    ],
)
def test_bad_input_is_named(tiny_llama, tmp_path, options, expected):
    with pytest.raises(InputError) as error:
        score(tiny_llama, tmp_path / "s", **options)
    assert expected in said(error)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_folder_with_other_files_is_refused(tiny_llama, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        score(tiny_llama, tmp_path)
    with pytest.raises(InputError, match=r"holds no token scores.*tokenwise score MODEL DATA"):
        tw.scores.open(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        tw.scores.open(tmp_path / "nowhere")
    score(tiny_llama, tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text('{"kind": "tokenwise scores", "tokenwise": "9.9"}')
    with pytest.raises(InputError, match=r"written by tokenwise 9\.9 in another format"):
        tw.scores.open(tmp_path / "s")


def test_a_run_killed_before_its_manifest_was_written_can_be_repeated(tiny_llama, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".manifest.json.x").write_text("{")
    assert score(tiny_llama, tmp_path / "s").rows == len(ROWS)


# Looking up


def test_padding_on_either_side_and_packing_change_nothing(tiny_llama, tmp_path):
    made = score(tiny_llama, tmp_path / "s", statistics=EVERYTHING, top_k=2)
    alone = [made.lookup(row) for row in ROWS[:2]]
    ids = torch.tensor([[0] * 3 + ROWS[0] + [0], ROWS[1] + [0] * 9])
    mask = torch.tensor([[0] * 3 + [1] * 12 + [0], [1] * 7 + [0] * 9])
    found = made.lookup(ids, attention_mask=mask)
    for name, values in found.items():
        assert torch.equal(values[0, 3:15], alone[0][name])
        assert torch.equal(values[1, :7], alone[1][name])
        assert values[~mask.bool()].unique().tolist() == ([-1] if name == "top_ids" else [0])
    packed = made.lookup(
        torch.tensor([ROWS[0] + ROWS[2] + ROWS[1]]), position_ids=torch.tensor([[*range(12), 0, *range(7)]])
    )
    for name, values in packed.items():
        assert torch.equal(values[0, :12], alone[0][name])
        assert torch.equal(values[0, 13:], alone[1][name])


def test_a_row_that_was_not_scored_is_named(tiny_llama, tmp_path):
    made = score(tiny_llama, tmp_path / "s", max_length=20)
    assert made.manifest.truncated == 1
    assert ROWS[8][:20] in made
    with pytest.raises(InputError) as error:
        made.lookup(torch.tensor([ROWS[0], [*ROWS[3][:-1], 63]]))
    assert said(error).startswith("rows[1]: these 12 tokens (")
    assert "Score the rows exactly as they are trained on" in said(error)
    with pytest.raises(InputError, match="Scored rows have at most 20 tokens"):
        made.lookup(ROWS[8])
    with pytest.raises(InputError, match="have no 'entropy', only logp, nll"):
        made.lookup(ROWS[0], columns=["entropy"])


def test_a_full_cache_forgets_and_reads_again(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CACHE_BYTES", 200)
    made = score(tiny_llama, tmp_path / "s", statistics=("logp", "entropy"))
    roomy = [tuple(values.tolist()) for row in ROWS for values in made.lookup(row).values()]
    assert [tuple(values.tolist()) for row in ROWS for values in made.lookup(row).values()] == roomy
    assert made._cached_bytes == sum(a.nbytes for read in made._cache.values() for a in read) <= 200 or (
        len(made._cache) == 1
    )


# Joining


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_join_adds_a_column_aligned_with_the_tokens(tiny_llama, tmp_path, kind):
    records = [{"input_ids": row, "n": index} for index, row in enumerate(ROWS)]
    data = records if kind == "list" else Dataset.from_list(records)
    made = tw.scores.score(tiny_llama, data, tmp_path / "s", field="input_ids", statistics=("logp", "rank"))
    joined = made.join(data, {"reference_nll": "nll", "its_rank": "rank"})
    for row, record in zip(ROWS, joined, strict=True):
        assert record["input_ids"] == row
        assert record["reference_nll"] == made.lookup(row)["nll"].tolist()
        assert record["its_rank"] == made.lookup(row)["rank"].tolist()
    assert set(data[0]) == {"input_ids", "n"}
    with pytest.raises(InputError, match="has 'reference_nll' already"):
        made.join(joined)


def test_join_refuses_other_text_another_tokenizer_and_a_wrong_sign(tiny_llama, tmp_path):
    texts = ["one two three", "four five six", "seven eight nine"]
    ours = train_tokenizer(texts, 290)
    tiny_llama.resize_token_embeddings(290)
    made = tw.scores.score(tiny_llama, [{"text": text} for text in texts], tmp_path / "s", tokenizer=ours)
    rows = [{"input_ids": ours(text)["input_ids"]} for text in texts]
    assert len(made.join(rows, tokenizer=ours)) == 3
    other = train_tokenizer(["another text altogether"], 290)
    with pytest.raises(InputError, match=r"tokenizer: the scores in .* were made with another tokenizer"):
        made.join(rows, tokenizer=other)
    with pytest.raises(InputError, match=r"rows\[1\]: these 2 tokens"):
        made.join([rows[0], {"input_ids": [1, 2]}])
    with pytest.raises(InputError, match="'logp' has the other sign"):
        made.join(rows, {"reference_nll": "logp"})
    with pytest.raises(InputError, match="has no 'input_ids'; it has text"):
        made.join([{"text": "a"}])


# Models with adapters


def test_without_adapters_a_peft_model_scores_as_its_base(tiny_llama, tmp_path):
    import peft

    plain = score(tiny_llama, tmp_path / "plain")
    wrapped = peft.get_peft_model(
        tiny_llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["up_proj"])
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.train()
    without = score(wrapped, tmp_path / "without", adapters=False)
    adapted = score(wrapped, tmp_path / "with")
    assert wrapped.training
    assert shard_bytes(tmp_path / "without") == shard_bytes(tmp_path / "plain")
    assert without.manifest.model["fingerprint"] == plain.manifest.model["fingerprint"]
    assert adapted.manifest.model["fingerprint"] != plain.manifest.model["fingerprint"]
    with torch.no_grad():
        wrapped.eval()
        logits = wrapped(torch.tensor([ROWS[0]])).logits[0, :-1].double().log_softmax(-1)
    logp = logits.gather(1, torch.tensor(ROWS[0][1:])[:, None])[:, 0]
    torch.testing.assert_close(adapted.lookup(ROWS[0])["logp"][1:].double(), logp, rtol=2**-10, atol=1e-5)


# Ray


def test_a_cluster_gives_the_same_files(tiny_llama, tmp_path):
    ray = pytest.importorskip("ray")
    tiny_llama.save_pretrained(tmp_path / "model")
    score(str(tmp_path / "model"), tmp_path / "here", statistics=EVERYTHING)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        score(str(tmp_path / "model"), tmp_path / "there", statistics=EVERYTHING, ray="local")
    finally:
        ray.shutdown()
    assert shard_bytes(tmp_path / "there") == shard_bytes(tmp_path / "here")
    there, here = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("there", "here"))
    costs = [manifest.pop("cost") for manifest in (there, here)]
    assert there == here
    assert costs[0] == {"flops": costs[1]["flops"], "seconds": None, "machine": None}


# What it cost


@pytest.mark.parametrize("statistics", [("logp",), EVERYTHING])
def test_the_operations_scaled_from_short_passes_are_those_of_the_whole(tiny_llama, statistics):
    rows = [np.array(row, dtype=np.int32) for row in ROWS]
    made = scorer.Scorer(tiny_llama.train(), statistics, 3, 30)
    expected = made.flops([len(row) for row in rows])
    assert tiny_llama.training
    with FlopMeter() as meter:
        made.columns(rows)
    assert expected == pytest.approx(meter.flops, rel=1e-9)
    assert made.flops([1, 1]) == 0


def test_what_a_store_cost_is_kept_and_what_was_lost_is_counted(tiny_llama, tmp_path, monkeypatch):
    whole = score(tiny_llama, tmp_path / "whole").manifest
    assert whole.cost.flops == pytest.approx(
        sum(
            scorer.Scorer(tiny_llama, ("logp",), 0, 30).flops(parquet.read_table(file)["length"].to_pylist())
            for file in (tmp_path / "whole").glob("*.parquet")
        )
    )
    assert whole.cost.seconds > 0
    assert "threads" in whole.cost.machine

    def failing(folder, table, write=scoring.write_shard):
        if len(list(folder.glob("*.parquet"))) == 2:
            raise KeyboardInterrupt
        return write(folder, table)

    monkeypatch.setattr(scoring, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        score(tiny_llama, tmp_path / "s")
    monkeypatch.undo()
    costs = tmp_path / "s" / layout.COSTS
    costs.write_text(costs.read_text() + '\n{"shard": 2, "flo')
    continued = score(tiny_llama, tmp_path / "s").manifest
    assert continued.cost.flops > whole.cost.flops  # the third shard was computed twice

    # What nobody noted is not known, and that is not zero.
    written = json.loads((tmp_path / "s" / layout.MANIFEST).read_text())
    del written["cost"]
    (tmp_path / "s" / layout.MANIFEST).write_text(json.dumps(written))
    assert tw.scores.open(tmp_path / "s").manifest.cost == layout.Cost()
    lines = costs.read_text().splitlines()
    costs.write_text("\n".join(line for line in lines if '"shard": 0' not in line))
    assert layout.read_cost(tmp_path / "s", continued.shards) == layout.Cost()
    costs.unlink()
    assert layout.read_cost(tmp_path / "s", continued.shards) == layout.Cost()
