"""An emulator of PTX, for the kernels that Triton compiles, on a machine without a GPU.

`driver.install()` makes Triton's own JIT compile for an H100 and launch here. instructions.py knows
what an instruction does to registers, machine.py the threads, their memory and its checks.
"""
