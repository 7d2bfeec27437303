from __future__ import annotations

import io

from made_results import baseline, method, summary
from rich.console import Console

from tokenwise.comparison.answer import conclude
from tokenwise.comparison.terminal import print_conclusion


def printed(results: list, seeds: int = 3) -> tuple[str, str]:
    conclusion = conclude(results, summary(seeds))
    stream = io.StringIO()
    print_conclusion(conclusion, Console(file=stream, width=100))
    return stream.getvalue(), conclusion.sentence


def test_fits_100_columns_and_ends_with_the_sentence() -> None:
    text, sentence = printed(
        [
            *baseline(),
            *method("random", 0.01, role="control"),
            *method("excess_loss", -0.08, control="random", flops=1.234e15, reference_flops=1.1e14),
            *method("a_method_with_a_long_label", None),
        ]
    )
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(text.split()).endswith(sentence)
    assert "+ ref 110 T" in text
    assert "against random" in text
    assert "3/3" in text
    assert "a_method_with_a_long_label, seed 0, failed: The loss became NaN at step 7." in " ".join(text.split())
    assert "…" not in text


def test_labels_are_text_not_markup() -> None:
    text, _ = printed([*baseline(), *method("[red]x[/red]", 0.1)])
    assert "[red]x[/red]" in text


def test_nothing_ran() -> None:
    assert printed([])[0].strip() == "No answer: nothing has run."


def test_time_beside_other_runs_is_not_compared() -> None:
    text, _ = printed([*baseline(), *method("a", 0.1, seconds_comparable=False)])
    assert "comparable" in text
