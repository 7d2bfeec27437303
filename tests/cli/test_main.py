import json
import subprocess
import sys

import pytest

import tokenwise
from tokenwise.cli import main as cli
from tokenwise.errors import InputError, Problem

HEAVY = {"torch", "transformers", "pydantic", "datasets", "numpy"}


def loaded_after(*arguments: str) -> set[str]:
    """The heavy packages in memory after the command ran in a process of its own."""
    program = (
        "import sys, json\n"
        "from tokenwise.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["methods"],
        ["methods", "--json"],
        ["methods", "show", "uniform"],
        ["compare", "--help"],
        ["score", "--help"],
        ["explain", "--help"],
        ["unlearn", "--help"],
    ],
)
def test_light_commands_load_nothing_heavy(arguments):
    assert loaded_after(*arguments) == set()


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"tokenwise {tokenwise.__version__}\n"


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def raising(error):
    def run(options):
        raise error

    return run


@pytest.fixture
def methods_raise(monkeypatch):
    """Makes `tokenwise methods` raise an error."""
    return lambda error: monkeypatch.setattr(cli.methods, "_list", raising(error))


def test_all_problems_are_listed_with_field_message_and_fix(methods_raise, capsys):
    problems = [Problem("budget.unit", "'stepz' is unknown.", "Did you mean 'steps'?"), Problem("seeds", "is empty.")]
    methods_raise(InputError(problems))
    assert cli.main(["methods"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "tokenwise: 2 problems in the input:\n"
        "\n  budget.unit\n    'stepz' is unknown.\n    Did you mean 'steps'?\n"
        "\n  seeds\n    is empty.\n"
    )


def test_interrupt_is_no_traceback(methods_raise, capsys):
    methods_raise(KeyboardInterrupt())
    assert cli.main(["methods"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_an_error_of_our_own_is_not_hidden(methods_raise):
    methods_raise(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["methods"])


def test_a_reader_that_leaves_is_no_traceback():
    program = (
        "import sys, tokenwise.catalog\n"
        "from tokenwise.cli.main import main\n"
        # Far more than a pipe holds, so that the write meets the closed end.
        "tokenwise.catalog.entries = lambda: {'x': {'y': 'z' * 1_000_000}}\n"
        "sys.exit(main(['methods', '--json']))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
