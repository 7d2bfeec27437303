"""compare: the same model and data, many methods, equal budgets, honest costs, one answer."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tokenwise.comparison.answer import Conclusion
    from tokenwise.comparison.measured_plan import MeasuredPlan
    from tokenwise.comparison.plan import Plan
    from tokenwise.comparison.records import Result


@dataclass(frozen=True)
class Comparison:
    """A comparison that has run.

    Args:
        plan: what was compared.
        folder: where everything it made lies.
        results: of every job, finished and failed, in the plan's order.
        conclusion: the answer with the figures behind it; `conclusion.answer` says it in words.
        report: the report, one self-contained HTML file.
        command: what repeats it in a terminal.
    """

    plan: Plan | MeasuredPlan
    folder: Path
    results: list[Result]
    conclusion: Conclusion
    report: Path
    command: str

    def export(self, folder: str | Path, method: str | None = None) -> Path:
        """Write a trained model with its tokenizer and the method's configuration, ready to load.

        Args:
            folder: where to; made if missing.
            method: label of the method to export; the winner unless given.

        Returns:
            The folder.

        Raises:
            InputError: when there is no winner and no method is named, no method has this label, or none of its runs
                finished.
        """
        from tokenwise.comparison.export import export_winner

        return export_winner(self.folder, self.results, self.conclusion, Path(folder), method)


def compare(
    plan: str | Path, out: str | Path | None = None, ray: str | None = None, console: Console | None = None
) -> Comparison:
    """Run the comparison of a plan file, and answer which method to use.

    Results that lie finished in the folder are used again, so a stopped comparison continues and a repeated one
    answers at once.

    Args:
        plan: the plan file.
        out: folder of the results; ``results/<name of the plan>`` in the current folder unless given.
        ray: address of a Ray cluster to run the jobs on, or ``local`` to start one; None runs one process at a time.
        console: where to show the progress; standard output unless given.

    Raises:
        InputError: with everything wrong with the plan and its data, before any run starts.
    """
    from tokenwise.comparison.answer import conclude
    from tokenwise.comparison.plan import read_plan
    from tokenwise.comparison.report import write_report
    from tokenwise.comparison.runner import run_comparison

    checked = read_plan(plan)
    folder = Path("results", Path(plan).stem) if out is None else Path(out)
    results = run_comparison(checked, folder, ray=ray, console=console)
    command = shlex.join(["tokenwise", "compare", str(plan), "--out", str(folder)])
    summary = {
        **checked.summary(),
        "seeds": list(checked.seeds),
        "budget": str(checked.budget),
        "folder": str(folder),
        "command": command,
    }
    conclusion = conclude(results, summary)
    report = folder / "report.html"
    write_report(report, conclusion, results, Path(plan).read_text(encoding="utf-8"), summary)
    return Comparison(checked, folder, results, conclusion, report, command)
