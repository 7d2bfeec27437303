import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import tokenwise as tw
from small_contexts import LAYERS, TEMPLATE, TOKEN, WORDS, context_plan, context_rows, remember
from tokenwise.cache.full import Full
from tokenwise.comparison import clock, long_context
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.contexts import Contexts, read_contexts
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.quality import RecallQuality
from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.comparison.report import write_report
from tokenwise.comparison.tasks import TASKS
from tokenwise.errors import InputError


def problems(call):
    with pytest.raises(InputError) as found:
        call()
    return [str(problem) for problem in found.value.problems]


def run_all(folder, plan):
    """All results of a plan, run in this process; one run for jobs that are the same."""
    plan.prepare(folder / "out")
    done, results = {}, []
    for job in plan.jobs(folder / "out"):
        if job.key not in done:
            done[job.key] = TASKS["long_context"].run(job, folder / "out", lambda event: None)
        results.append(Result(**{**vars(done[job.key]), "job": job}))
    summary = {**plan.summary(), "seeds": [0, 1], "budget": str(plan.budget), "folder": "out", "command": "again"}
    return results, conclude(results, summary), summary


@pytest.fixture(scope="module", autouse=True)
def few_timings():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WARM", 1), ("TIMED", 2), ("STEPS", 2)):
            patch.setattr(long_context, name, value)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    plan = read_plan(context_plan(folder))
    return folder, plan, *run_all(folder, plan)


def of(results, label):
    return next(result for result in results if result.job.label == label)


def opened(folder):
    """The model, and its rows as token ids."""
    [file] = (folder / "out" / "data").glob("*.npz")
    return LlamaForCausalLM.from_pretrained(folder / "model").eval(), Contexts.load(file)


def nll(logits, ids):
    return float(F.cross_entropy(logits.float(), torch.tensor(ids), reduction="sum"))


def test_every_method_runs_in_both_ways_beside_a_control_that_runs_so(compared):
    _, plan, _, conclusion, summary = compared
    shown = [(entry.label, entry.role, entry.control) for entry in plan.entries]
    assert shown == [
        ("full", "baseline", None),
        ("k_norm visible", "candidate", "random visible"),
        ("k_norm hidden", "candidate", "random hidden"),
        ("h2o visible", "candidate", "random visible"),
        ("h2o hidden", "candidate", "random hidden"),
        ("random visible", "control", None),
        ("random hidden", "control", None),
    ]
    assert "8 questions, contexts of 28 tokens on average" in summary["data"]
    assert "on a line of its own" in summary["data"]
    assert conclusion.item == "question"
    assert conclusion.ways == ("visible", "hidden")
    assert [point.split(":")[0] for point in conclusion.points] == [
        "Keep 0.5, question visible",
        "Keep 0.5, question hidden",
    ]


def test_the_full_cache_answers_as_the_model_does(compared):
    folder, _, results, _, _ = compared
    model, rows = opened(folder)
    quality = of(results, "full").quality
    for index in range(len(rows)):
        context, question, answer = rows.parts(index)
        ids = torch.tensor([context + question + answer])
        with torch.no_grad():
            logits = model(ids).logits[0, -len(answer) - 1 : -1]
        assert quality.nll[index] == pytest.approx(nll(logits, answer), rel=1e-4)
    assert quality.tokens == [2] * 8
    assert quality.depth == [number / 8 for number in range(8)]


@pytest.mark.parametrize("way", ["visible", "hidden"])
@pytest.mark.parametrize("name", ["k_norm", "h2o"])
def test_answers_follow_from_what_is_left_of_what_the_method_saw(compared, name, way):
    folder, _, results, _, _ = compared
    model, rows = opened(folder)
    method = {"k_norm": tw.KNorm(keep=0.5), "h2o": tw.H2O(keep=0.5, recent=2)}[name]
    found = of(results, f"{name} {way}").quality.nll
    for index in range(len(rows)):
        context, question, answer = rows.parts(index)
        # Hidden instead of evicted, token by token, without `Reader`.
        with torch.no_grad(), tw.evict(model, method, masked=True) as cache:
            seen = context + question if way == "visible" else context
            model(torch.tensor([seen]), past_key_values=cache)
            if way == "visible":
                before = cache.kept(1).sum(2)
                assert (before == round(0.5 * len(seen) + 0.01)).all()
                cache.take_back(1)
                rest = question[-1:]
            else:
                rest = question
            logits = [model(torch.tensor([rest]), past_key_values=cache).logits[0, -1:]]
            logits += [model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in answer[:-1]]
        assert found[index] == pytest.approx(nll(torch.cat(logits), answer), rel=1e-3)


def test_even_the_first_token_follows_from_what_is_left(compared):
    folder, _, _, _, _ = compared
    model, rows = opened(folder)
    first = []
    with torch.no_grad():
        for method in (Full(), tw.cache.Random(keep=0.2)):
            reader = long_context.Reader(model, method, rows, hidden=False)
            first.append([long_context.losses(reader, index, rows.parts(index)[2])[0] for index in range(8)])
    assert np.abs(np.subtract(*first)).min() > 1e-3


def test_an_answer_that_is_read_at_once_is_as_if_it_was_written(compared):
    folder, _, _, _, _ = compared
    model, rows = opened(folder)
    for hidden in (False, True):
        found = []
        for interval in (None, 10_000):  # never reached, but then every token is read by itself
            reader = long_context.Reader(model, tw.KNorm(keep=0.4, interval=interval), rows, hidden)
            with torch.no_grad():
                found.append(long_context.losses(reader, 3, [5, 6, 7, 8]))
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_bytes_and_tokens_are_those_stored(compared):
    folder, _, results, _, _ = compared
    _, rows = opened(folder)
    lengths = rows.lengths
    for way, seen in (("visible", lengths[:, :2].sum(1)), ("hidden", lengths[:, 0])):
        costs = of(results, f"k_norm {way}").costs
        kept = np.floor(0.5 * seen + 0.5)
        assert costs.cache_bytes == kept.mean() * LAYERS * TOKEN
        assert costs.full_cache_bytes == seen.mean() * LAYERS * TOKEN
        assert costs.tokens_after == pytest.approx(kept.mean())
        assert costs.wall_seconds > costs.scoring_seconds > 0
        assert costs.decode_seconds > 0 == costs.decode_scoring_seconds  # it evicts once, and h2o goes on
        costs = of(results, f"h2o {way}").costs
        assert costs.decode_seconds > costs.decode_scoring_seconds > 0
    full = of(results, "full").costs
    assert full.cache_bytes == full.full_cache_bytes == lengths[:, :2].sum(1).mean() * LAYERS * TOKEN
    assert full.token_share == 1
    assert full.scoring_seconds is full.decode_scoring_seconds is None


@pytest.mark.parametrize(
    "method",
    [
        tw.SnapKV(keep=0.5, queries=4),
        tw.H2O(keep=0.5, recent=2),
        tw.AdaKV(keep=0.5, queries=4),
        tw.KVzip(keep=0.5),
        tw.Quest(keep=0.5, page=4, dense_layers=0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_all_of_a_method_s_work_is_timed_and_nothing_twice(compared, monkeypatch, method):
    folder, _, _, _, _ = compared
    model, rows = opened(folder)
    # Each time that a method is asked something takes a second, and nothing else takes time.
    seconds = [0]
    monkeypatch.setattr(clock, "now", lambda device: seconds[0])

    def counted(plain):
        def asked(*args):
            seconds[0] += 1
            return plain(*args)

        return asked

    for name in {"observe", "score", "select"} & set(dir(type(method))):
        monkeypatch.setattr(type(method), name, counted(getattr(type(method), name)))
    reader = long_context.Reader(model, method, rows, hidden=False)
    found = clock.Clock(method, model.device)
    with torch.no_grad(), reader.cache() as cache:
        with found.around(cache, cache.works_in):
            reader.forward(reader.first(0), cache)
            assert found.seconds == seconds[0] > 0
            reader.write(cache, reader.first(0)[:, -1:], 2)
            assert found.seconds == seconds[0]
        assert not vars(cache).keys() & set(cache.works_in)


def test_methods_that_read_less_say_how_much(tmp_path):
    plan = read_plan(
        context_plan(
            tmp_path, seeds=[0], methods=[{"quest": {"page": 4, "dense_layers": 0}}], task={"question": "hidden"}
        )
    )
    results, conclusion, summary = run_all(tmp_path, plan)
    costs = of(results, "quest").costs
    assert costs.token_share == 1
    assert 0.4 * costs.tokens_before < costs.tokens_read < 0.65 * costs.tokens_before
    assert costs.cache_bytes > costs.full_cache_bytes
    assert not any("could not go as low" in note for note in conclusion.notes)
    write_report(tmp_path / "report.html", conclusion, results, "plan", summary)
    assert f"{costs.tokens_read:.1f} read" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_the_model_writes_is_right_where_it_is_expected(tmp_path):
    file = context_plan(tmp_path, methods=["k_norm"], seeds=[0], task={"question": "visible", "max_new_tokens": 2})
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    right = []
    for number, row in enumerate(rows):
        ids = torch.tensor([[WORDS.index(word) for word in f"{row['context']} {row['question']}".split()]])
        written = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :].tolist()
        right.append(bool(number % 2) and min(written) > 2)
        row["answer"] = " ".join(WORDS[token] for token in written) if right[-1] else "a a"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    results, conclusion, _ = run_all(tmp_path, read_plan(file))
    quality = of(results, "full").quality
    assert quality.correct == right
    assert sum(right) > 1
    assert conclusion.ways == ()
    # The loss comes from what was written where that is right, and else from another reading.
    reader = long_context.Reader(model, Full(), opened(tmp_path)[1], hidden=False)
    which = right.index(True)
    with torch.no_grad():
        found = sum(long_context.losses(reader, which, reader.rows.parts(which)[2]))
    assert quality.nll[which] == pytest.approx(found, rel=1e-4)


def test_texts_are_continued(tmp_path):
    plan = read_plan(context_plan(tmp_path, continued=True, seeds=[0], budget={"unit": "tokens", "amounts": [8, 16]}))
    assert [entry.label for entry in plan.entries][:3] == ["full", "k_norm 16 tokens", "k_norm 8 tokens"]
    results, conclusion, _ = run_all(tmp_path, plan)
    model, rows = opened(tmp_path)
    context, _, target = rows.parts(2)
    with torch.no_grad():
        logits = model(torch.tensor([context + target])).logits[0, -len(target) - 1 : -1]
    assert of(results, "full").quality.nll[2] == pytest.approx(nll(logits, target), rel=1e-4)
    assert of(results, "k_norm 8 tokens").costs.tokens_after == 8
    assert conclusion.measure.name == "continuation loss"
    assert "at 16 tokens and 8 tokens" in conclusion.sentence


def test_budgets_of_memory_hold(tmp_path):
    plan = read_plan(
        context_plan(tmp_path, seeds=[0], methods=["k_norm"], budget={"unit": "bytes", "amounts": ["4 KiB"]})
    )
    assert plan.entries[1].label == "k_norm visible"
    assert str(plan.budget) == "4 KiB of keys and values"
    results, conclusion, _ = run_all(tmp_path, plan)
    assert of(results, "k_norm visible").costs.cache_bytes == 4096 // (LAYERS * TOKEN) * LAYERS * TOKEN
    assert conclusion.points[0].startswith("4 KiB, question visible: ")


def test_the_report_draws_answers_by_depth(compared, tmp_path):
    _, _, results, conclusion, summary = compared
    write_report(tmp_path / "report.html", conclusion, results, "plan", summary)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Right answers by depth" in page
    # Two drawings, wide and narrow, for each way; four rows, ten or five columns.
    assert page.count('class="cell') == 2 * 4 * (10 + 5)
    assert "Key-value cache, question hidden" in page
    assert "k_norm hidden, 0 to 10% of the context" in page
    assert "Time of a token, question visible" in page
    assert "no scoring" in page
    # Of the settings those that the full cache does not have, too.
    assert "recent 2, interval 1, recent_share 0.5<" in page
    assert "floor 0.2" not in page


def test_results_are_read_as_they_were_written(compared, tmp_path):
    _, _, results, _, _ = compared
    results[1].write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == results[1]


def made(label, seed, wrong, way="", control=None, role="candidate"):
    """One run whose first `wrong` answers of 200 are wrong."""
    budget = {"unit": "keep", "share": 1.0 if role == "baseline" else 0.5, "way": way}
    job = Job("run", label, seed, {label.split()[0]: {}}, role, {}, budget, control=control, series=label)
    quality = RecallQuality([1.0] * 200, [1] * 200, [index >= wrong for index in range(200)], [])
    return Result(job, "finished", quality=quality, costs=Costs(cache_bytes=5.0, full_cache_bytes=10.0))


def test_the_answer_is_given_for_each_way():
    results = []
    for seed in range(3):
        results += [made("full", seed, 2, role="baseline")]
        for way, first, second in (("visible", 10, 150), ("hidden", 150, 20)):
            results += [
                made(f"snap_kv {way}", seed, first, way, f"random {way}"),
                made(f"k_norm {way}", seed, second, way, f"random {way}"),
                made(f"random {way}", seed, 120, way, role="control"),
            ]
    found = conclude(results, {"baseline": "full", "seeds": [0, 1, 2], "family": "cache"})
    assert found.sentence == (
        "With the question visible, use snap_kv at keep 0.5; with the question hidden, use k_norm at keep 0.5."
    )
    assert found.remarks == (
        "Even so worse than full: at keep 0.5 with the question visible snap_kv keeps 96% of its right answers (92% to "
        "99%); at keep 0.5 with the question hidden k_norm keeps 91% of its right answers (85% to 96%).",
    )
    assert found.chosen == ("snap_kv visible", "k_norm hidden")
    assert found.points[0] == (
        "Keep 0.5, question visible: snap_kv (wrong answers +4.00 points to full, 0.50× the bytes); k_norm does worse "
        "than chance."
    )


def test_the_chat_template_writes_context_and_question(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(remember(tmp_path / "model", TEMPLATE))
    file = context_rows(tmp_path, 1)
    row = json.loads(file.read_text())
    found = read_contexts([file], None, tokenizer, 3, "task.data.eval")
    context, question, answer = (" ".join(WORDS[token] for token in part) for part in found.parts(0))
    assert (context, question, answer) == (f"a {row['context']}", f"{row['question']} b c", row["answer"])


def test_bad_rows_are_named_together(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(remember(tmp_path / "model"))
    rows = [
        {"context": "a b c", "question": "ask a", "answer": "b"},
        {"context": "a b c", "question": "ask a"},
        {"context": "a b c", "question": "ask a", "answer": 3},
        {"context": "a b c", "question": "ask a", "answer": "b", "depth": 1.5},
        {"context": "a b c", "target": "b"},
        {"context": "a b c", "question": "ask a", "answer": "b c d"},
        {"context": "a", "question": "ask a", "answer": "b"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = problems(lambda: read_contexts([file], None, tokenizer, 2, "task.data.eval"))
    for expected in (
        "no field 'answer'",
        "'answer' holds 3, not text",
        "'depth' holds 1.5",
        "the first row is of the other kind",
        "more than 2 tokens",
        "too little text",
    ):
        assert any(expected in problem for problem in found), expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ["tome"]}, ["'reduction/tome' is no cache policy"]),
        ({"methods": [{"k_norm": {"keep": 0.5}}]}, ["keep: is set by the plan"]),
        ({"methods": [{"h2o": {"recent": 12}}], "budget": {"unit": "tokens", "amounts": [8]}}, ["less than the 12"]),
        ({"budget": {"unit": "bytes", "amounts": ["300 bytes"]}}, ["less than 1 tokens take", "less than 2 tokens"]),
        (
            {"budget": {"unit": "keep", "amounts": [1.5, "x"]}, "task": {"question": "seen"}},
            ["budget.amounts[0]", "budget.amounts[1]", "task.question"],
        ),
        ({"budget": {"unit": "flops", "amounts": [0.5]}}, ["budget.unit"]),
        ({"task": {"model": "./nowhere"}, "training": {}}, ["task.model", "training: is no part of a plan"]),
    ],
)
def test_a_bad_plan_is_refused_with_all_that_is_wrong(tmp_path, changes, expected):
    found = problems(lambda: read_plan(context_plan(tmp_path, **changes)))
    for text in expected:
        assert any(text in problem for problem in found), found


def test_what_means_nothing_to_continuations_is_refused(tmp_path):
    found = problems(lambda: read_plan(context_plan(tmp_path, continued=True, task={"question": "hidden"})))
    assert found == [
        "task.question: means nothing where the data holds no questions, but a target to continue with. Leave it out."
    ]


def test_methods_that_would_keep_more_than_the_others_are_refused(tmp_path):
    plan = read_plan(context_plan(tmp_path, methods=["k_norm", {"h2o": {"recent": 20}}]))
    found = problems(lambda: plan.prepare(tmp_path / "out"))
    assert len(found) == 2  # in both ways
    assert "keeps 20 whatever their score" in found[0]


def test_contexts_longer_than_the_model_reads_are_refused(tmp_path):
    file = context_plan(tmp_path)
    remember(tmp_path / "model", max_position_embeddings=32)
    found = problems(lambda: read_plan(file).prepare(tmp_path / "out"))
    assert "the longest row takes 36 tokens" in found[0]


def test_the_example_is_a_plan_to_start_from(tmp_path):
    written = Path(__file__).parents[2] / "examples" / "recall" / "plan.yaml"
    plan = yaml.safe_load(written.read_text(encoding="utf-8"))
    plan["task"]["model"] = str(remember(tmp_path / "model"))
    plan["task"]["data"]["eval"] = str(context_rows(tmp_path, 4))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    labels = [entry.label for entry in read_plan(tmp_path / "plan.yaml").entries]
    assert labels[:3] == ["full", "snap_kv 0.5 visible", "snap_kv 0.5 hidden"]
    assert "random 0.2 hidden" in labels


@pytest.mark.parametrize("hidden", [False, True])
def test_layers_with_a_window_see_it_whole_when_the_last_token_is_read_again(hidden):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma2Config(
        vocab_size=50, num_key_value_heads=2, sliding_window=8, layer_types=kinds, eos_token_id=None, **sizes
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(3, 50, (33,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Contexts(np.array(ids, np.int32), np.array([[27, 30, 33]]), np.array([0.0]), np.array([], np.uint8), 1)
    with torch.no_grad():
        found = long_context.losses(long_context.Reader(model, Full(), rows, hidden), 0, ids[30:])
        logits = model(torch.tensor([ids])).logits[0, 29:32]
        assert sum(found) == pytest.approx(nll(logits, ids[30:]), rel=1e-4)
        # All that can be evicted stays: the layer with a window is the stock one.
        again = long_context.Reader(model, tw.KNorm(keep="40 tokens"), rows, hidden)
        assert long_context.losses(again, 0, ids[30:]) == pytest.approx(found, rel=1e-4)


def test_nothing_is_exported(tmp_path, capsys):
    from tokenwise.cli.main import main

    assert main(["compare", str(context_plan(tmp_path)), "--export", str(tmp_path / "winner")]) == 2
    assert "use the method on your model with tokenwise.evict" in capsys.readouterr().err
