"""How long `import tokenwise`, `tokenwise --help` and `tokenwise methods` take, each in a process of its own.

Usage: python benchmarks/startup.py [--rounds 9]

Prints the median seconds, and the seconds beyond those of a Python that does nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from timing import interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    command_line = "from tokenwise.cli.main import main; main({})"
    programs = {
        "python alone": "",
        "import tokenwise": "import tokenwise",
        "tokenwise --help": f"try:\n {command_line.format(['--help'])}\nexcept SystemExit: pass",
        "tokenwise methods": command_line.format(["methods"]),
    }

    def start(program: str) -> None:
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

    seconds = interleaved({name: lambda p=program: start(p) for name, program in programs.items()}, rounds)
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s, {median - medians['python alone']:+.3f}")


if __name__ == "__main__":
    main()
