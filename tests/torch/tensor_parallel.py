"""An accelerated model in two processes: data parallel, then tensor parallel.

    torchrun --nproc-per-node 2 tests/torch/tensor_parallel.py

It runs on CPUs. On GPUs the backend is "nccl", the mesh "cuda", and each process has a device.
"""

import copy

import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import prelu_gpu

distributed.init_process_group("gloo")
model = prelu_gpu.accelerate(nn.Sequential(nn.Linear(16, 64), nn.PReLU(64), nn.Linear(64, 16)))

# Each process has the whole model and its own part of the batch.
replica = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
replica(torch.randn(8, 16)).sum().backward()


# Each process has half of the channels, with their slopes, and the whole batch.
def shard_slopes(name, module, mesh):
    module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))


mesh = init_device_mesh("cpu", (2,))
plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
parallelize_module(model, mesh, plan)
distribute_module(model[1], mesh, shard_slopes)
model(torch.ones(8, 16)).sum().backward()

distributed.destroy_process_group()
