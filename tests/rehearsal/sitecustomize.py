"""Gives every Python that has this folder on its PYTHONPATH the stand-in for a GPU."""

import sys
from pathlib import Path

import stand_in

sys.path.append(str(Path(__file__).parents[1]))  # the folder of the package ptx
stand_in.install()

import emulated  # imports prelu_gpu, which asks for PyTorch's version of CUDA

emulated.install()
if sys.orig_argv[1:3] == ["-m", "benchmarks"]:
    import small_shapes

    small_shapes.install()
