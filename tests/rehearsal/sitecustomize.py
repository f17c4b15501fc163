"""Gives every Python that has this folder on its PYTHONPATH the stand-in for a GPU."""

import sys
from pathlib import Path

import stand_in


def start():
    stand_in.install()
    # The folders of prelu_gpu and ptx: of this checkout, whatever is installed.
    checkout = Path(__file__).parents[2]
    sys.path[1:1] = [str(checkout), str(checkout / "tests")]
    import emulated  # and prelu_gpu, which asks for PyTorch's version of CUDA

    emulated.install()
    if sys.orig_argv[1:3] == ["-m", "benchmarks"]:
        import small_shapes

        small_shapes.install()


start()
