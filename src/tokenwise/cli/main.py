"""The `tokenwise` command: hands over to one module per subcommand, and turns bad input into one clear message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import tokenwise
from tokenwise.cli import compare, evict, explain, methods, reduce, score, unlearn
from tokenwise.errors import InputError

_DESCRIPTION = "Score what matters in a transformer's work, spend a budget on it, and compare the methods that do so."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 when all went well, 1 when the command ran and its outcome is a failure or the reader of a pipe went away, 2 for
    bad input, 130 when interrupted.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except InputError as error:
        print(_message(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has all it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenwise", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"tokenwise {tokenwise.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (methods, compare, reduce, evict, score, explain, unlearn):
        module.add_parser(commands)
    return parser


def _message(error: InputError) -> str:
    count = len(error.problems)
    lines = ["tokenwise: the input cannot be used:" if count == 1 else f"tokenwise: {count} problems in the input:"]
    for problem in error.problems:
        lines += ["", f"  {problem.field}", f"    {problem.message}"]
        if problem.fix:
            lines.append(f"    {problem.fix}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
