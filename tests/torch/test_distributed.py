import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import CHECKS, WORLD
from support import GPU

ROOT = Path(__file__).parents[2]
TIMEOUT = 120

# Two processes for all of them, not for each of pytest's.
pytestmark = pytest.mark.xdist_group("distributed")


def environment(**variables):
    """For processes on the CPU, so that no machine needs several GPUs."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return {**inherited, **own, **variables}


def finish(process):
    """What a process prints; one that hangs is ended."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
    return output


def start(*command, **variables):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Of each process, by the check's name: an empty text or a traceback; and what it printed."""
    folder = tmp_path_factory.mktemp("distributed")
    program = ROOT / "tests" / "torch" / "distributed.py"
    processes = [start(program, rank, folder, TRITON_INTERPRET="1") for rank in range(WORLD)]
    printed = [finish(process) for process in processes]
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return list(zip(results, printed, strict=True))


@pytest.mark.skipif(GPU, reason="it interprets kernels, which a machine without a GPU is for")
@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name, results):
    for rank, (result, printed) in enumerate(results):
        assert name in result, f"rank {rank} did not come so far:\n{printed}"
        assert not result[name], f"rank {rank}:\n{result[name]}"


def test_the_example_under_torchrun(tmp_path):
    """On the CPU without kernels, where the shards are PyTorch's operators'."""
    example = ROOT / "tests" / "torch" / "tensor_parallel.py"
    program = tmp_path / "train.py"
    program.write_text(f"""
import os, runpy, torch
from torch.distributed.tensor import Shard

example = runpy.run_path({str(example)!r})
replica = example["replica"].module
assert replica[1].weight.grad.shape == (64,)
replica.zero_grad()
replica(torch.ones(8, 16)).sum().backward()  # the same weights: both are those of process 0

slopes = example["model"][1].weight
gradient = slopes.grad
for sharded in slopes, gradient:
    assert sharded.placements == (Shard(0),) and sharded.to_local().shape == (32,)
expected = replica[1].weight.grad.chunk(2)[int(os.environ["RANK"])]
torch.testing.assert_close(gradient.to_local(), expected)
print("as promised")
""")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", WORLD)
    output = finish(start(*torchrun, program))
    assert output.count("as promised") == WORLD, output


def test_dtensors_without_triton_compiled_and_not_imported_before_one_arrives():
    program = """
import sys
sys.modules["triton"] = None
import torch, prelu_gpu
x, weight = torch.randn(4, 3), torch.rand(3)
prelu_gpu.prelu(x, weight)
assert "torch.distributed.tensor" not in sys.modules, "it takes half a second"

import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
prelu_gpu.prelu(x, weight)
assert "prelu_gpu.sharding" not in sys.modules

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
sharded = distribute_tensor(x, mesh, [Shard(1)])
with torch.autograd.forward_ad.dual_level():
    prelu_gpu.prelu(x, weight)
torch.func.vmap(prelu_gpu.prelu, (0, None))(x[:, None], weight)
assert "prelu_gpu.sharding" not in sys.modules, "plain tensors"
compiled = torch.compile(prelu_gpu.prelu, backend="aot_eager", fullgraph=True)
for function in compiled, prelu_gpu.prelu:
    slopes = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    y = function(sharded, slopes)
    y.backward(y.detach())
    assert torch.equal(y.to_local(), torch.prelu(x, weight))
    assert slopes.grad.placements == (Shard(0),)
    torch.testing.assert_close(slopes.grad.to_local(), (x.clamp(max=0) ** 2 * weight).sum(0))
dist.destroy_process_group()
print("done")
"""
    assert finish(start("-c", program)).endswith("done\n")


def test_what_is_sharded():
    """A DTensor, or what a collective still fetches; plain tensors alone are not."""
    program = """
import torch, torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from prelu_gpu.route import Route, is_sharded, route

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
x, weight = torch.randn(4, 3), torch.nn.Parameter(torch.rand(3))
fetched = AsyncCollectiveTensor(torch.randn(4, 3))
on = init_device_mesh("cpu", (1,))
shards, slopes = (distribute_tensor(t.detach(), on, [Replicate()]) for t in (x, weight))
for given, sharded in [
    ((x, weight), False),
    ((x,), False),
    ((torch.nn.Buffer(x),), False),
    ((shards, slopes), True),
    ((fetched, weight), True),
    ((fetched,), True),
    ((shards, weight), False),
    ((x, slopes), False),
    ((fetched, slopes), False),
]:
    kinds = [type(tensor).__name__ for tensor in given]
    assert is_sharded(*given) == (route(*given) is Route.DISPATCHED) == sharded, kinds
with torch.autograd.forward_ad.dual_level():
    assert route(shards, slopes) is route(x, weight) is Route.COMPOSED
dist.destroy_process_group()
print("done")
"""
    assert finish(start("-c", program)).endswith("done\n")
