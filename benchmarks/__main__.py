"""Measures prelu_gpu, draws it and shows it at work: `python -m benchmarks --help`."""

import importlib
import sys
from collections.abc import Sequence

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks: {error}. Install what they need: pip install '.[benchmarks]'")

PROGRAMS = {
    "speed": "Times the operators beside PyTorch's, torch.compile and a copy. Needs a GPU.",
    "training": "Times training steps of whole networks. Needs a GPU.",
    "tune": "Proposes another table of launch rules, from a sweep. Needs a GPU.",
    "report": "Makes README's tables and the plots of what was timed.",
    "traffic": "Counts passes over memory, launches and saved bytes, of ours and others.",
    "demo": "Trains a small super-resolution network with torch.nn.PReLU and with prelu_gpu.",
    "functions": "Draws PReLU, Leaky ReLU and their gradients.",
    "machine-code": "Tells what the kernels compile to for GPUs that need not be here.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a program; ends with SystemExit, as command lines do."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    app = typer.Typer(
        help="Measures prelu_gpu.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, purpose in PROGRAMS.items():
        # Only the chosen one is imported: whether kernels are interpreted is decided by the import.
        if arguments[:1] == [name]:
            app.command(name)(_load(name))
        else:
            app.command(name, help=purpose)(lambda: None)
    app(arguments, prog_name="python -m benchmarks")


def _load(name: str) -> object:
    try:
        return importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in ("benchmarks", "prelu_gpu"):
            raise
        sys.exit(f"benchmarks: {error}. Install what they need: pip install '.[benchmarks]'")


if __name__ == "__main__":
    main()
