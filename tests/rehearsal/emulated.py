"""Triton's side of the stand-in: launches go to the emulator, or into a graph that is captured."""

import functools
import time

from ptx import driver
from stand_in import CLOCK, DEVICE, Graph, current_stream, is_capturing

LAUNCH_S = 3e-3
"""What a launch takes by the clock of the device: a batch of the benchmarks is then one call."""


class Launcher(driver.Launcher):
    """Launches a kernel, or takes note of its launch where a graph is captured."""

    def __call__(self, *arguments):
        launch = functools.partial(self._emulate, arguments)
        if is_capturing():
            Graph.capturing.add(launch)
        else:
            launch()

    def _emulate(self, arguments):
        start = time.perf_counter()
        super().__call__(*arguments)
        CLOCK.emulated += time.perf_counter() - start
        CLOCK.work(LAUNCH_S)


def install():
    """Makes Triton launch here, for the rest of the process."""
    active = driver.activate()
    active.launcher_cls = Launcher
    active.get_current_stream = lambda device=None: current_stream().cuda_stream
    active.get_active_torch_device = lambda: DEVICE
