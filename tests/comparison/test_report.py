from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_results import baseline, method, run, summary

from tokenwise.comparison import charts, figures
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.quality import UnlearningQuality
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.report import write_report


class Outline(HTMLParser):
    """Tags with their attributes, the text, and whether every element was closed."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]


def report(
    path: Path, results: list[Result], seeds: int = 3, plan_text: str = "seeds: [0]", **changes: object
) -> tuple[str, Outline]:
    plan = {**summary(seeds), **changes}
    write_report(path / "report.html", conclude(results, plan), results, plan_text, plan)
    html = (path / "report.html").read_text(encoding="utf-8")
    outline = Outline(html)
    assert outline.open == []
    return html, outline


@pytest.fixture
def results() -> list[Result]:
    return [
        *baseline(),
        *method("random", 0.01, role="control", flops=0.9e12),
        *method("excess", -0.08, control="random", flops=1.05e12, reference_flops=0.26e12),
        *method("dynamic", 0.0001, 2),
        run("dynamic", 2, None, reason="Killed: out of memory."),
    ]


def test_everything_is_there(tmp_path: Path, results: list[Result]) -> None:
    _, page = report(tmp_path, results, plan_text="seeds: [0, 1, 2]  # my plan")
    for expected in (
        conclude(results, summary()).sentence,
        "1,000,000 tokens seen",
        "Quality against cost",
        "Held-out loss on the way",
        "Difference to uniform",
        "dynamic, seed 2: Killed: out of memory.",
        "1.05 T + 260 G = 1.31×",
        "1.00 GiB",
        "2 of 3",
        "What each method did to one example",
        "compared together (Bonferroni). A number",
        "tokenwise compare plan.yaml --export DIR",
        "seeds: [0, 1, 2] # my plan",
        "2.13.0",
    ):
        assert expected in page.text
    for label in ("uniform", "random", "excess", "dynamic"):
        assert page.text.count(label) > 4


def test_it_is_self_contained_without_scripts(tmp_path: Path, results: list[Result]) -> None:
    html, page = report(tmp_path, results)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert page.attributes("src") == page.attributes("href") == []
    assert not re.search(r"https?:|url\(|@import", html)


def test_drawings_are_finite_labelled_and_come_wide_and_narrow(tmp_path: Path, results: list[Result]) -> None:
    html, page = report(tmp_path, results)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) == 12  # three costs, two parts of the curves, the differences; each twice
    assert all(attributes["aria-label"] for attributes in drawings)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    assert set(page.attributes("for")) <= set(identifiers)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>'
    results = [*baseline(), *method(evil, -0.1), run(evil, 3, None, reason=evil)]
    results[3].example = {"tokens": [evil, "</pre>"], "weights": [None, 1.0]}
    results[3].versions = {evil: evil}
    changes = dict.fromkeys(("task", "model", "data", "budget", "plan_file", "command", "folder"), evil)
    html, page = report(tmp_path, results, plan_text=f"a: {evil}</pre>", **changes)
    assert "<script" not in html
    assert evil in page.text


def test_example_shows_white_space_and_weights(tmp_path: Path, results: list[Result]) -> None:
    html, page = report(tmp_path, results)
    assert '<span class="none" title="not learnt: the first token, or one of a prompt">def</span>' in html
    assert '<span class="dropped" style="--w:0.00" title="weight 0"> x</span>' in html
    assert '<span class="weighted" style="--w:0.67" title="weight 1">↵\n</span>' in html
    assert '<span class="weighted" style="--w:1.00" title="weight 1.5">&lt;b&gt;</span>' in html
    assert "60% of the tokens weighted" in page.text


def test_only_one_method(tmp_path: Path) -> None:
    _, page = report(tmp_path, baseline())
    assert "Nothing to choose from" in page.text
    assert "names no winner" in page.text
    assert "Difference to uniform" not in page.text


def test_every_run_failed(tmp_path: Path) -> None:
    _, page = report(tmp_path, [*baseline(shift=None), *method("a", None)])
    assert "No answer: every run failed" in page.text
    assert page.text.count("seed 0: The loss became NaN at step 7.") == 2


def test_nothing_ran(tmp_path: Path) -> None:
    assert "nothing has run" in report(tmp_path, [])[1].text


def test_bare_results(tmp_path: Path) -> None:
    """No costs, no curve, no example: what is missing is said, not made up."""
    results = []
    for label, role, shift in (("uniform", "baseline", 0.0), ("a", "candidate", -0.1)):
        measured = method(label, shift, role=role)
        results += [Result(made.job, "finished", quality=made.quality) for made in measured]
    _, page = report(tmp_path, results)
    assert "not measured" in page.text
    assert "FLOPs of uniform and a" in page.text
    assert "Quality against cost" not in page.text
    assert "What each method did" not in page.text


def test_losses_that_are_not_finite(tmp_path: Path, results: list[Result]) -> None:
    assert results[-2].quality is not None
    results[-2].quality.nll[0] = math.nan
    results[-2].curve[-1].held_out = math.nan
    html, page = report(tmp_path, results)
    assert "not finite" in page.text
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)


def test_a_method_far_off_does_not_flatten_the_others(tmp_path: Path, results: list[Result]) -> None:
    html, _ = report(tmp_path, [*results, *method("lost", 4.0)])
    assert "off the scale" in html
    assert "+4.0" in html


def test_one_seed_and_shared_machine_are_said(tmp_path: Path) -> None:
    results = [*baseline(1), *method("a", -0.1, 1, seconds_comparable=False)]
    _, page = report(tmp_path, results, seeds=1)
    assert "only the held-out documents are resampled" in page.text
    assert "Wall time is not drawn" in page.text
    assert "not comparable" in page.text


def test_a_reference_is_no_row(tmp_path: Path) -> None:
    job = Job("reference", "clean", 0, {"uniform": {}}, "candidate", {}, {})
    _, page = report(tmp_path, [Result(job, "failed", "Out of memory."), *baseline()])
    assert "reference clean, seed 0: Out of memory." in page.text


def test_what_the_weights_did_is_a_table_of_means_over_the_seeds(tmp_path: Path, results: list[Result]) -> None:
    for result in results:
        if result.job.label == "excess":
            shares = [0, 0, 0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
            result.weights = {
                "mean_weight": 0.5 + 0.1 * result.job.seed,
                "effective_sample_size": 0.6,
                "kept_share": 0.7,
                "effective_learning_rate": 0.9,
                **{f"gradient_share_decile_{place}": share for place, share in enumerate(shares, 1)},
            }
            result.example = None
    html, page = report(tmp_path, results)
    assert "What the methods weighed" in page.text
    assert re.search(r"excess 0\.600 60\.0 70\.0 0\.900 20\.0", " ".join(page.text.split()))
    assert "smallest weights first: 0, 0, 0, 10, 10, 10, 10, 20, 20, 20" in html
    # Results of before there were more numbers than the kept share.
    assert re.search(r"uniform – – 60\.0 – – –", " ".join(page.text.split()))
    assert "Not shown: excess, which reads more than the text" in page.text
    assert "60% of the tokens weighted" in page.text


def test_what_was_forgotten_is_drawn_against_what_was_kept(tmp_path: Path) -> None:
    def unlearnt(label: str, seed: int, forget: float, keep: float, role: str = "candidate") -> Result:
        result = run(label, seed, 0.0, role=role)
        losses = [-4 * math.log(p) for p in (forget, forget, keep, keep)]
        result.quality = UnlearningQuality(losses, [4] * 4, [True, True, False, False])
        result.example, result.weights = None, {}
        return result

    results = [unlearnt("uniform", seed, 0.9 + 0.01 * seed, 0.95, "baseline") for seed in range(3)]
    results += [unlearnt("npo", seed, 0.2, 0.8 + 0.01 * seed) for seed in range(3)]
    _, page = report(tmp_path, results)
    assert "What was forgotten, what was kept" in page.text
    labels = [label for label in page.attributes("aria-label") if label and "against forgotten" in label]
    assert len(labels) == 2  # wide and narrow
    assert labels[0].startswith("Kept against forgotten, better towards the upper right. uniform: 9.0% forgotten, 95.0")
    assert "npo: 80.0% forgotten, 81.0% kept" in labels[0]
    assert "What the methods weighed" not in page.text
    styles = charts.styles([("uniform", "baseline"), ("npo", "candidate")])
    wide = figures.goals_figure(conclude(results, summary()), results, styles, True) or ""
    marks = dict(re.findall(r'transform="translate\(([\d. ]+)\)" class="marker (\w+)"', wide))
    places = {colour: tuple(map(float, place.split())) for place, colour in marks.items()}
    assert places["colour1"][0] > places["baseline"][0]  # forgot more
    assert places["colour1"][1] > places["baseline"][1]  # kept less, further down
    assert figures.goals_figure(conclude(baseline(), summary()), baseline(), {}, True) is None
