"""`tokenwise compare`: run a plan, live, and end with the table, the answer and the report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from rich.console import Console

_EXIT_CODES = "Exit code 0 when at least one run of every method finished, 1 when a method has none, 2 for a bad plan."

_VERBS = {"reduction": "reduce", "cache": "evict"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = commands.add_parser(
        "compare",
        help="compare methods on your model and data at equal budgets",
        description="Run the methods of a plan at equal budgets and answer which one to use. A comparison that was "
        "stopped continues where it was; one that is complete answers at once.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("plan", metavar="PLAN.yaml", type=Path, help="what to compare, on what, with which budget")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the results (default: results/<plan name>)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the jobs on this Ray cluster (needs tokenwise[ray])")
    parser.add_argument("--export", metavar="DIR", type=Path, help="write the winner, ready to load, to this folder")
    parser.add_argument("--method", metavar="LABEL", help="export this method instead of the winner")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.method is not None and options.export is None:
        raise InputError(Problem("--method", "only says what to export.", "Add --export DIR."))

    from rich.console import Console

    from tokenwise.comparison import compare
    from tokenwise.comparison.export import check_label, check_target
    from tokenwise.comparison.measured_plan import MeasuredPlan
    from tokenwise.comparison.plan import read_plan
    from tokenwise.comparison.terminal import print_conclusion

    # What would fail after hours of training must fail before it.
    if options.export is not None:
        check_target(options.export)
    if options.export is not None:
        plan = read_plan(options.plan)
        if isinstance(plan, MeasuredPlan):
            fix = f"Leave it out: use the method on your model with tokenwise.{_VERBS[plan.task.family]}."
            raise InputError(Problem("--export", f"a comparison of {plan.task.kind} trains no model.", fix))
        if options.method is not None:
            check_label(options.method, [entry.label for entry in plan.entries])
    console = Console()
    comparison = compare(options.plan, options.out, ray=options.ray, console=console)
    conclusion = comparison.conclusion
    print_conclusion(conclusion, console)
    _say(console, f"Report: {comparison.report}")
    if options.export is not None:
        _say(console, f"Exported: {comparison.export(options.export, options.method)}")
    elif conclusion.trains:
        which = "" if conclusion.winner else " --method LABEL"
        what = conclusion.winner or "a method of your choice"
        _say(console, f"Write out {what}, ready to load: {comparison.command} --export DIR{which}")
    return int(any(not row.finished for row in conclusion.rows))


def _say(console: Console, line: str) -> None:
    # Paths must survive copying: no wrapping, no markup.
    console.print(line, markup=False, highlight=False, soft_wrap=True)
