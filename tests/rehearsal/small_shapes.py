"""The benchmarks' tensors and networks, so small that the emulator is done with them in minutes."""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import nn

import prelu_gpu
from benchmarks import cases, networks, srgan, workloads

ELEMENTS = 2**11
"""Of a case at most: an emulated launch takes longer only beyond."""


def install():
    """Replaces shapes and networks; programs and kernels stay as they are."""
    cases.Case.shape = Small()
    workloads.WORKLOADS = tuple(
        replace(workload, batch=2, **CHANGES[workload.network]) for workload in workloads.WORKLOADS
    )
    prelu_gpu.set_kernel_threshold(0)  # such sizes would be PyTorch's


class Small:
    """The field `shape` of a case: the largest side is halved until the case is small."""

    def __get__(self, case, owner):
        shape = list(vars(case)["shape"])
        while math.prod(shape) > ELEMENTS:
            largest = shape.index(max(shape))
            shape[largest] = -(-shape[largest] // 2)
        return tuple(shape)

    def __set__(self, case, shape):
        vars(case)["shape"] = shape


def build_iresnet():
    """The first of its layers, and one that classifies pictures of 8 x 8."""
    return nn.Sequential(*networks.iresnet()[:4], nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def build_conv_tasnet():
    """With the first two of its blocks."""
    network = networks.ConvTasNet()
    network.blocks, network.skips = network.blocks[:2], network.skips[:2]
    network.onward = network.onward[:1]
    return network


CHANGES = {
    "iresnet50": {
        "build": build_iresnet,
        "draw": lambda batch: (torch.randn(batch, 3, 8, 8), torch.randint(10, (batch,))),
    },
    "unet3d": {
        "build": partial(networks.unet, (4, 8)),
        "draw": partial(workloads.draw_volumes, side=8),
    },
    "conv-tasnet": {
        "build": build_conv_tasnet,
        "draw": partial(workloads.draw_voices, samples=160),
    },
    "srgan": {
        "build": partial(srgan.Generator, 4),
        "draw": partial(workloads.draw_pictures, side=16),
    },
}
"""Of workloads, by network."""
