"""Measures prelu_gpu.

    python -m benchmarks ...             times its operators beside other providers, on a GPU
    python -m benchmarks training ...    times training steps of whole networks, on a GPU
    python -m benchmarks tune ...        proposes a table of launch rules, from a sweep on a GPU
    python -m benchmarks report ...      makes README's tables and the plots of what was timed

--help after any of them tells more.
"""

import importlib
import sys
from collections.abc import Sequence

from benchmarks.program import ProgramError

COMMANDS = ("training", "tune", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = "speed", arguments
    if arguments and arguments[0] in COMMANDS:
        command, *rest = arguments
    try:
        importlib.import_module(f"benchmarks.{command}").main(rest)
    except ProgramError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
