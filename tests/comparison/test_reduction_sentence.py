import numpy as np

from tokenwise.comparison.answer import conclude
from tokenwise.comparison.quality import ImageQuality
from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.comparison.terminal import print_conclusion

IMAGES = 400


def run(label, seed, wrong, share=None, flops=50.0, control=None, role="candidate", seconds=0.5):
    """One run whose first `wrong` images are given another class."""
    budget = {"unit": "keep", "share": 1.0 if share is None else share}
    name = label.split()[0]
    job = Job("run", label, seed, {name: {}}, role, {}, budget, control=control, series=name, draws=role == "control")
    predictions = (np.arange(IMAGES) < wrong).astype(int).tolist()
    quality = ImageQuality([0] * IMAGES, predictions, [0] * IMAGES, [0.1] * IMAGES, 2)
    costs = Costs(flops, 0.01 * seconds, dense_seconds=0.01, tokens_after=8, token_share=share or 1.0)
    return Result(job, "finished", quality=quality, costs=costs)


def answer(*methods, seeds=3):
    """(label, wrong, share, flops) each; the controls have 120 errors at 0.75 and 200 at 0.5."""
    results = []
    for seed in range(seeds):
        results.append(run("dense", seed, 80, flops=100.0, role="baseline", seconds=1))
        for name, share, wrong, flops in methods:
            results.append(run(f"{name} {share}", seed, wrong, share, flops, f"random_drop {share}"))
        results += [run(f"random_drop {s}", seed, w, s, 50.0, role="control") for s, w in ((0.75, 120), (0.5, 200))]
    return conclude(results, {"baseline": "dense", "seeds": list(range(seeds)), "family": "reduction"})


def test_one_method_at_every_budget():
    found = answer(
        ("tome", 0.75, 82, 76.0), ("tome", 0.5, 100, 51.0), ("evit", 0.75, 110, 76.0), ("evit", 0.5, 150, 51.0)
    )
    assert found.sentence == "Use tome at keep 0.75 and 0.5."
    assert found.points[1] == "Keep 0.5: tome (error +5.00 points to dense, 0.51× the FLOPs, 0.50× the time)."
    assert "no difference shown" in found.points[0]
    assert found.chosen == ("tome 0.75", "tome 0.5")


def test_another_method_at_each_budget():
    found = answer(
        ("tome", 0.75, 82, 76.0), ("tome", 0.5, 180, 51.0), ("evit", 0.75, 110, 76.0), ("evit", 0.5, 110, 51.0)
    )
    assert found.sentence == "Use tome at keep 0.75 and evit at keep 0.5."


def test_the_cheaper_of_two_with_no_difference_shown():
    found = answer(("tome", 0.5, 100, 60.0), ("evit", 0.5, 101, 51.0))
    assert found.sentence.startswith("Use evit at keep 0.5; at keep 0.75 no method")
    assert "as no difference is shown to tome" in found.points[1]
    found = answer(("tome", 0.5, 100, 51.0), ("evit", 0.5, 101, 51.0))
    assert "tome or evit" in found.sentence


def test_no_method_is_named_that_does_not_beat_chance():
    found = answer(("tome", 0.75, 119, 76.0), ("tome", 0.5, 201, 51.0))
    assert found.sentence == "No method is shown to be better than chance at keep 0.75 and 0.5."
    assert found.chosen == ()
    assert "no difference shown to chance (random_drop 0.5)" in found.points[1]


def test_a_method_that_loses_to_chance_is_told():
    found = answer(("tome", 0.5, 100, 51.0), ("evit", 0.5, 260, 51.0))
    assert found.points[1].endswith("; evit does worse than chance.")


def test_a_method_that_could_not_go_as_low_is_told():
    result = answer(("tome", 0.5, 100, 51.0))
    assert not any("could not go as low" in note for note in result.notes)
    runs = [run("dense", 0, 80, role="baseline"), run("tome 0.5", 0, 90, 0.5, control=None)]
    runs[1].costs.token_share = 0.7
    found = conclude(runs, {"baseline": "dense", "seeds": [0], "family": "reduction"})
    assert any("tome 0.5 keeps 70%" in note for note in found.notes)


def test_the_table_shows_costs_of_one_image():
    from rich.console import Console

    console = Console(width=110, record=True)
    print_conclusion(answer(("tome", 0.5, 100, 51.0)), console)
    text = console.export_text()
    assert "per image" in text
    assert "5.00 ms" in text
    assert "- Keep 0.5: tome" in text


def test_no_method_is_named_that_loses_to_chance_elsewhere():
    def found(wrong_inside):
        results = []
        for seed in range(3):
            results += [
                run("dense", seed, 80, role="baseline"),
                run("before 0.5", seed, 120, 0.5, control="chance 0.5"),
                run("inside 0.5", seed, wrong_inside, 0.5, control="chance_inside 0.5"),
                run("chance 0.5", seed, 200, 0.5, role="control"),
                run("chance_inside 0.5", seed, 84, 0.5, role="control"),
            ]
        return conclude(results, {"baseline": "dense", "seeds": [0, 1, 2], "family": "reduction"})

    none = found(84)
    assert none.sentence == "No method is shown to be better than chance at keep 0.5."
    assert none.points[0].startswith("Keep 0.5: no difference shown to chance (chance_inside 0.5), with inside ahead")
    assert none.points[0].endswith("; chance elsewhere (chance_inside) does better than before.")
    only = found(130)
    assert only.sentence == none.sentence
    assert only.points[0].startswith("Keep 0.5: before is ahead (error")
    one = found(40)
    assert one.sentence == "Use inside at keep 0.5."
    assert one.points[0].endswith("; chance elsewhere (chance_inside) does better than before.")


def test_what_is_lost_at_a_budget_is_said_and_which_budget_loses_nothing():
    found = answer(("tome", 0.75, 82, 76.0), ("tome", 0.5, 180, 51.0), ("evit", 0.5, 185, 51.0))
    # The dense model has 80 of 400 wrong: tome keeps (400 - 180) / (400 - 80) of what it gets right.
    worse, smallest = found.remarks
    assert worse.startswith("Even so worse than dense: at keep 0.5 tome keeps 69% of its right answers (6")
    row = next(row for row in found.rows if row.label == "tome 0.5")
    low, high = (round(100 * (1 - end / 80)) for end in (row.versus_baseline.high, row.versus_baseline.low))
    assert worse.endswith(f"({low}% to {high}%).")
    near = next(row for row in found.rows if row.label == "tome 0.75").versus_baseline
    assert smallest == (
        "Smallest budget at which a method is not shown to be worse than dense: keep 0.75 "
        f"(tome, {near.high:.2f} points worse at most)."
    )
    assert found.answer == " ".join([found.sentence, worse, smallest])
    best = answer(("tome", 0.75, 82, 76.0), ("tome", 0.5, 80, 51.0))
    # Not one image is given another class: an interval that is a point bounds nothing, which a note says.
    assert best.remarks == ("Smallest budget at which a method is not shown to be worse than dense: keep 0.5 (tome).",)
    assert any("not one of the 400 held-out images came out otherwise. Up to 0.9 percentage" in n for n in best.notes)
    none = answer(("tome", 0.75, 110, 76.0), ("tome", 0.5, 180, 51.0))
    assert none.remarks[-1].endswith("worse than dense: none.")


def test_what_stores_everything_is_no_rival_of_what_stores_less():
    results = []
    for seed in range(3):
        results.append(run("full", seed, 80, role="baseline"))
        for share, wrong, reads in ((0.5, 100, 82), (0.25, 180, 110)):
            results.append(run(f"h2o {share}", seed, wrong, share, control=f"random {share}"))
            results.append(run(f"quest {share}", seed, reads, share, control=f"random {share}"))
            costs = results[-1].costs
            costs.token_share, costs.tokens_before, costs.tokens_read = 1.0, 100, 100 * share
            results.append(run(f"random {share}", seed, 250, share, role="control"))
    summary = {"baseline": "full", "seeds": [0, 1, 2], "family": "cache"}
    found = conclude(results, summary)
    assert found.sentence == "Use h2o at keep 0.5 and 0.25."
    assert found.remarks[0] == "To store all and read less of it: use quest at keep 0.5 and 0.25."
    assert "at keep 0.25 h2o keeps 69% of its right answers" in found.remarks[1]
    assert "at keep 0.25 and all stored quest keeps 91% of its right answers" in found.remarks[1]
    assert "full: none; keep 0.5 and all stored (quest, " in found.remarks[2]
    assert found.points[1].startswith("Keep 0.5, all stored: quest (")
    # It stores everything as it should, and reads no more than the budget says.
    assert not any("could not go as low" in note or "reads" in note for note in found.notes)
    for result in results:
        if result.costs.tokens_read is not None:
            result.costs.tokens_read = 30
    note = next(note for note in conclude(results, summary).notes if "reads" in note)
    assert note.endswith(": quest 0.5 reads 30 tokens of a budget of 50, quest 0.25 reads 30 tokens of a budget of 25.")
    alone = conclude([result for result in results if "h2o" not in result.job.label], summary)
    assert alone.sentence == "Use quest at keep 0.5 and 0.25."
