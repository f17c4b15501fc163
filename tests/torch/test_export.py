"""Models as others get them: exported programs, traces, fx graphs and ONNX, without `restore`."""

import copy
import importlib.util
import io
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from support import assert_same, randn
from torch import nn

import prelu_gpu
from prelu_gpu import PReLU, SharedAxesPReLU, leaky_relu, prelu

pytestmark = pytest.mark.filterwarnings(
    # PyTorch's exporters of their own affairs.
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
)

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="onnx, onnxruntime or onnxscript is not installed",
)

SIZE = 4
SHAPE = (2, SIZE, SIZE, SIZE)
"""Of the inputs: slopes along a wrong dimension would do nothing but compute something else."""

MODULES = {
    "per channel": lambda: PReLU(SIZE),
    "shared": PReLU,
    "dim=-1": lambda: PReLU(SIZE, dim=-1),
    "dim=0": lambda: PReLU(SHAPE[0], dim=0),
    "shared axes 2, 3": lambda: SharedAxesPReLU(SHAPE[1:], [2, 3]),
    "shared axes 1, 2": lambda: SharedAxesPReLU(SHAPE[1:], [1, 2]),
    "shared axis 2": lambda: SharedAxesPReLU(SHAPE[1:], 2),
    "no shared axis": lambda: SharedAxesPReLU(SHAPE[1:]),
    "every element": lambda: EveryElement(),
    "leaky_relu": lambda: prelu_gpu.LeakyReLU(0.2),
    "leaky_relu in place": lambda: prelu_gpu.LeakyReLU(0.3, inplace=True),
}
STATIC = ("dim=0", "every element")
"""With slopes along the batch, whose size is theirs."""
DYNAMIC = tuple(name for name in MODULES if name not in STATIC)
TORCHS = {"per channel": lambda: nn.PReLU(SIZE), "shared": nn.PReLU, "leaky_relu": nn.LeakyReLU}


class EveryElement(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SHAPE))

    def forward(self, x):
        return prelu(x, self.weight)


class Slopes(nn.Module):
    """Slopes of any shape, along any dimension."""

    def __init__(self, shape, dim=1):
        super().__init__()
        self.weight = nn.Parameter(randn(shape, torch.float32, "cpu", seed=len(shape)))
        self.dim = dim

    def forward(self, x):
        return prelu(x, self.weight, dim=self.dim)


class ChannelsLast(nn.Module):
    """Views that only the memory layout of their input allows, and PyTorch's module behind ours."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.ModuleList((PReLU(SIZE, dim=-1), nn.PReLU(SIZE), PReLU(SIZE, dim=2)))

    def forward(self, x):
        last, torchs, rows = self.slopes
        x = last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return rows(torchs(x.view(x.shape[0], SIZE * SIZE, SIZE).view(x.shape)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(SIZE, 6, 3), nn.PReLU(6), nn.Conv2d(6, SIZE, 1))
        self.act = nn.PReLU()
        self.leaky = nn.LeakyReLU(0.1)

    def forward(self, x):
        return self.leaky(self.act(self.body(x)))


class Family(nn.ModuleList):
    """Several modules, one output of each."""

    def forward(self, x):
        return tuple(member(x.clone()) for member in self)


def network(device):
    """An accelerated model, and the same one of PyTorch's modules."""
    torch.manual_seed(0)
    torchs = Network().to(device)
    ours = prelu_gpu.accelerate(copy.deepcopy(torchs))
    assert type(ours.body[1]) is type(ours.act) is PReLU
    return ours, torchs


def module(name, device):
    made = MODULES[name]().to(device)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(randn(weight.shape, torch.float32, device, seed=[*MODULES].index(name)))
    return made.eval()


def batches(name, device):
    """Inputs of the shape that is recorded and, where slopes allow it, of two more batch sizes."""
    sizes = SHAPE[:1] if name in STATIC else (*SHAPE[:1], 7, 1)
    return [randn((size, *SHAPE[1:]), torch.float32, device, seed=size) for size in sizes]


def dynamic_batch(name):
    return None if name in STATIC else ({0: torch.export.Dim("batch")},)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def saved(save, value):
    file = io.BytesIO()
    save(value, file)
    file.seek(0)
    return file


def gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = (x, *model.parameters())
    return torch.autograd.grad(y, parameters, torch.cos(y.detach()))


@pytest.fixture
def small(threshold):
    """PyTorch's operator serves small inputs, as it does on a user's GPU."""
    threshold(2**22)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    @pytest.mark.parametrize("name", MODULES)
    def test_a_program_computes_the_same_with_pytorchs_operators(
        self, name, strict, device, launches
    ):
        ours = module(name, device)
        inputs = batches(name, device)
        program = torch.export.export(
            ours, (inputs[0].clone(),), dynamic_shapes=dynamic_batch(name), strict=strict
        )
        assert {target.namespace for target in targets(program)} == {"aten"}
        # Converters of ONNX take all its slopes for those of dimension 1.
        assert torch.ops.aten._prelu_kernel.default not in targets(program)
        loaded = torch.export.load(saved(torch.export.save, program))
        for x in inputs:
            left = x.clone()
            expected = ours(left)
            for run in (program.module(), loaded.module()):
                given = x.clone()
                assert_same(run(given).detach(), expected.detach())
                assert torch.equal(given, left)

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    def test_a_program_of_a_static_batch_computes_the_same(self, strict, device, launches):
        family = Family(module(name, device) for name in MODULES)
        x = randn(SHAPE, torch.float32, device)
        program = torch.export.export(family, (x,), strict=strict)
        assert {target.namespace for target in targets(program)} == {"aten"}
        for name, given, expected in zip(MODULES, program.module()(x), family(x), strict=True):
            assert torch.equal(given, expected), name

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    def test_an_accelerated_model_gives_the_graph_of_pytorchs(self, strict, device):
        x = randn(SHAPE, torch.float32, device)
        ours, torchs = (
            torch.export.export(model, (x,), strict=strict) for model in network(device)
        )
        assert targets(ours) == targets(torchs)
        assert targets(ours.run_decompositions()) == targets(torchs.run_decompositions())

    def test_a_program_trains_as_pytorchs_does(self, device):
        x = randn(SHAPE, torch.float32, device)
        ours, torchs = network(device)
        program = torch.export.export(ours, (x,), dynamic_shapes=dynamic_batch("network"))
        x = torch.cat([x, -x])
        given, expected = gradients(program.module(), x), gradients(torchs, x)
        torch.testing.assert_close(given, expected)

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    @pytest.mark.parametrize("name", TORCHS)
    def test_a_program_does_not_depend_on_the_size(self, name, strict, device):
        # A branch on the size would bound the batch, which is an error.
        x = randn(SHAPE, torch.float32, device)
        ours, torchs = (
            torch.export.export(made, (x,), dynamic_shapes=dynamic_batch(name), strict=strict)
            for made in (module(name, device), TORCHS[name]().to(device))
        )
        assert targets(ours) == targets(torchs)
        ranges = [list(program.range_constraints.values()) for program in (ours, torchs)]
        assert ranges[0] == ranges[1]

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    @pytest.mark.parametrize("inside", [False, True], ids=["around export", "in the model"])
    def test_autocast_is_recorded_as_of_pytorchs(self, inside, strict, device):
        """A cast of our own would hold where the program runs without autocast, and fail there."""

        class Autocast(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x):
                with torch.autocast(device.type, torch.bfloat16):
                    return self.model(x)

        x = randn(SHAPE, torch.float32, device)
        runs = []
        for model in network(device):
            with torch.autocast(device.type, torch.bfloat16, enabled=not inside):
                program = torch.export.export(
                    Autocast(model) if inside else model, (x,), strict=strict
                ).module()
                runs.append([program(x).detach()])
            runs[-1].append(program(x).detach())
        for given, expected in zip(*runs, strict=True):
            assert_same(given, expected)

    def test_half_precision_inputs_keep_their_float32_slopes(self, device, launches):
        for name in ("per channel", "dim=-1", "shared axis 2"):
            ours = module(name, device)
            x = randn(SHAPE, torch.float16, device)
            program = torch.export.export(ours, (x,))
            assert_same(program.module()(x).detach(), ours(x).detach())

    def test_half_precision_without_data(self):
        """Some devices have no autocast to ask about."""
        for dim in (1, -1):
            x = torch.empty(SHAPE, dtype=torch.float16, device="meta")
            model = PReLU(SIZE, dim=dim, device="meta")
            (y,) = torch.export.export(model, (x,)).graph.output_node().args[0]
            assert y.meta["val"].dtype is torch.float16
            assert y.meta["val"].shape == SHAPE


def kinds(traced):
    return [node.kind() for node in traced.inlined_graph.nodes()]


class TestTrace:
    @pytest.mark.parametrize("name", MODULES)
    def test_a_trace_computes_the_same_after_saving(self, name, device, launches):
        ours = module(name, device)
        inputs = batches(name, device)
        traced = torch.jit.trace(ours, (inputs[0].clone(),), check_trace=False)
        assert {kind.split("::")[0] for kind in kinds(traced)} <= {"aten", "prim"}
        assert "prim::PythonOp" not in kinds(traced)
        loaded = torch.jit.load(saved(lambda *arguments: torch.jit.save(*arguments), traced))
        for x in inputs:
            expected = ours(x.clone())
            for run in (traced, loaded):
                assert_same(run(x.clone()).detach(), expected.detach())

    def test_an_accelerated_model_gives_the_graph_of_pytorchs_and_trains(self, device):
        x = randn(SHAPE, torch.float32, device)
        models = network(device)
        ours, torchs = (torch.jit.trace(model, (x,)) for model in models)
        assert kinds(ours) == kinds(torchs)
        x = torch.cat([x, -x])
        torch.testing.assert_close(gradients(ours, x), gradients(models[1], x))

    @pytest.mark.usefixtures("small")
    @pytest.mark.parametrize("name", TORCHS)
    def test_a_trace_does_not_depend_on_the_size(self, name, device):
        # A branch on the size would warn, which is an error.
        x = randn(SHAPE, torch.float32, device)
        ours, torchs = (
            torch.jit.trace(made, (x,))
            for made in (module(name, device), TORCHS[name]().to(device))
        )
        assert kinds(ours) == kinds(torchs)


class TestFx:
    @pytest.mark.parametrize("name", MODULES)
    def test_a_graph_runs_our_kernels(self, name, device, launches):
        ours = module(name, device)
        graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(ours)))
        for x in batches(name, device):
            expected = ours(x.clone())
            launches.clear()
            assert_same(graph(x.clone()).detach(), expected.detach())
            assert launches

    def test_an_accelerated_models_graph_trains_by_our_kernels(self, device, launches):
        ours, torchs = network(device)
        graph = torch.fx.symbolic_trace(ours)
        x = randn((3, *SHAPE[1:]), torch.float32, device)
        torch.testing.assert_close(gradients(graph, x), gradients(torchs, x))
        for direction in ("forward", "backward"):
            assert sum(name.endswith(direction) for name in launches) == 2

    def test_modules_stay_modules_for_what_looks_for_them(self, device):
        ours, torchs = network(device)
        graphs = [torch.fx.symbolic_trace(model) for model in (ours, torchs)]
        nodes = [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in graphs]
        assert nodes[0] == nodes[1]
        counts = [
            [len(group["params"]) for group in prelu_gpu.parameter_groups(graph, weight_decay=1)]
            for graph in graphs
        ]
        assert counts[0] == counts[1]
        assert counts[0][1] == 2
        classes = {type(m) for m in prelu_gpu.restore(graphs[0]).modules()}
        assert nn.PReLU in classes
        assert prelu_gpu.PReLU not in classes

    @pytest.mark.parametrize("name", MODULES)
    def test_a_module_with_hooks_is_recorded_once(self, name, device):
        """What hooks do is in the graph already."""
        model = nn.Sequential(module(name, device))
        model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model[0].register_forward_hook(lambda module, args, y: y * 2)
        graph = torch.fx.symbolic_trace(model)
        x = batches(name, device)[0]
        assert_same(graph(x.clone()).detach(), model(x.clone()).detach())

    def test_a_graph_does_not_depend_on_the_size(self, device, threshold, launches):
        threshold(2**22)
        ours = module("per channel", device)
        graph = torch.fx.symbolic_trace(ours)
        x = randn(SHAPE, torch.float32, device)
        expected = graph(x).detach()
        assert not launches
        threshold(0)
        assert_same(graph(x).detach(), expected)
        assert launches


def test_what_is_saved_loads_where_prelu_gpu_is_not_installed(device, tmp_path):
    x = randn(SHAPE, torch.float32, device)
    ours = Family(module(name, device) for name in MODULES)
    torch.export.save(torch.export.export(ours, (x,)), tmp_path / "model.pt2")
    torch.jit.save(torch.jit.trace(ours, (x,)), tmp_path / "model.pt")
    torch.save((x, [y.detach() for y in ours(x)]), tmp_path / "expected.pt")
    program = """
import sys, torch
sys.modules["prelu_gpu"] = None
x, expected = torch.load("expected.pt")
for model in (torch.export.load("model.pt2").module(), torch.jit.load("model.pt")):
    assert all(map(torch.equal, model(x), expected))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)


def onnx_of(model, x, shapes, dynamo):
    """The model in ONNX."""
    import onnx

    if dynamo:
        return torch.onnx.export(model, (x,), dynamic_shapes=shapes, verbose=False).model_proto
    file = io.BytesIO()
    axes = None if shapes is None else {"x": {0: "batch"}}
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


def contents(model):
    """Kinds of nodes with their attributes, and the sizes of constants."""
    from onnx.helper import get_attribute_value

    nodes = [
        (node.op_type, [(a.name, get_attribute_value(a)) for a in node.attribute])
        for node in model.graph.node
    ]
    return nodes, [tuple(constant.dims) for constant in model.graph.initializer]


def slopes_of(model):
    """The shapes of PRelu's slopes, which the file holds."""
    constants = {constant.name: tuple(constant.dims) for constant in model.graph.initializer}
    return [constants[node.input[1]] for node in model.graph.node if node.op_type == "PRelu"]


def activations(kinds):
    return [kind for kind in kinds if kind.endswith("elu")]


def runs_of(model):
    """The model as functions, by onnx's reference and by onnxruntime."""
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    (name,) = (given.name for given in model.graph.input)

    def function(runtime):
        return lambda x: map(torch.from_numpy, runtime.run(None, {name: x.cpu().numpy()}))

    yield function(ReferenceEvaluator(model))
    session = onnxruntime.InferenceSession
    yield function(session(model.SerializeToString(), providers=["CPUExecutionProvider"]))


@needs_onnx
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
class TestOnnx:
    @pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation")
    @pytest.mark.parametrize("names", [DYNAMIC, STATIC], ids=["dynamic batch", "static"])
    def test_one_standard_node_for_each_computes_the_same(self, names, dynamo, device, launches):
        family = Family(module(name, device) for name in names).eval()
        inputs = batches(names[0], device)
        model = onnx_of(family, inputs[0], dynamic_batch(names[0]), dynamo)
        assert [node.op_type for node in model.graph.node] == [
            "LeakyRelu" if "leaky" in name else "PRelu" for name in names
        ]
        for x in inputs:
            for run in runs_of(model):
                for name, given, expected in zip(names, run(x), family(x), strict=True):
                    assert torch.equal(given, expected.detach().cpu()), name

    @pytest.mark.parametrize("along_the_batch", [False, True], ids=["dynamic batch", "static"])
    @pytest.mark.parametrize("rank", [2, 3, 4, 5])
    def test_slopes_along_all_dimensions_are_one_node(
        self, rank, along_the_batch, dynamo, device, launches
    ):
        """All of one size: a wrong dimension would do nothing but compute something else."""
        size = 3
        shapes, wanted = [], []
        for dim in range(rank):
            if (dim == 0) == along_the_batch:
                shapes.append(((size,), dim - rank))
                wanted.append((size,) + (1,) * (rank - 1 - dim))
        for shape in itertools.product((1, size), repeat=rank):
            if (shape[0] != 1) == along_the_batch:
                shapes.append((shape, 1))
                wanted.append(shape)
        family = Family(Slopes(*arguments) for arguments in shapes).to(device).eval()
        inputs = [
            randn((batch, *[size] * (rank - 1)), torch.float32, device, seed=batch)
            for batch in ((size,) if along_the_batch else (size, 7, 1))
        ]
        dynamic = dynamic_batch("every element" if along_the_batch else "all")
        model = onnx_of(family, inputs[0], dynamic, dynamo)
        assert {node.op_type for node in model.graph.node} == {"PRelu"}

        def trailing(shape):
            return tuple(itertools.dropwhile(lambda size: size == 1, shape))

        # Exporters differ in leading dimensions of size 1, which mean nothing.
        assert [*map(trailing, slopes_of(model))] == [*map(trailing, wanted)]
        for x in inputs:
            for run in runs_of(model):
                for shape, given, expected in zip(shapes, run(x), family(x), strict=True):
                    assert torch.equal(given, expected.detach().cpu()), shape

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
    def test_models_of_other_dtypes(self, dtype, dynamo, device, launches):
        names = ["per channel", "dim=-1", "shared axes 1, 2", "shared axis 2"]
        family = Family(module(name, device) for name in names).to(dtype).eval()
        x = randn(SHAPE, dtype, device)
        model = onnx_of(family, x, dynamic_batch("all"), dynamo)
        assert [node.op_type for node in model.graph.node] == ["PRelu"] * len(names)
        # onnxruntime has no PRelu of float64: the reference alone.
        for run in itertools.islice(runs_of(model), 1 if dtype is torch.float64 else 2):
            for name, given, expected in zip(names, run(x), family(x), strict=True):
                assert torch.equal(given, expected.detach().cpu()), name

    def test_what_follows_finds_the_shape_and_the_memory_layout(self, dynamo, device, launches):
        ours = ChannelsLast().to(device).eval()
        with torch.no_grad():
            for seed, weight in enumerate(ours.parameters()):
                weight.copy_(randn(weight.shape, torch.float32, device, seed=seed))
        inputs = batches("all", device)
        model = onnx_of(ours, inputs[0], dynamic_batch("all"), dynamo)
        kinds = [node.op_type for node in model.graph.node]
        assert activations(kinds) == ["PRelu"] * 3
        assert kinds[:3] == ["Transpose", "PRelu", "Transpose"], "the model's own permutations"
        assert kinds.count("Transpose") == 2
        for x in inputs:
            for run in runs_of(model):
                (given,) = run(x)
                assert torch.equal(given, ours(x).detach().cpu())

    def test_many_slopes(self, dynamo, device, launches):
        """The exporter folds no more than 8192: their shape is left to the runtime's loading."""
        many = 8192 + 1
        family = Family((Slopes((many,), -1), Slopes((1, 1, many)), SharedAxesPReLU((1, many))))
        family = family.to(device).eval()
        x = randn((2, 1, many), torch.float32, device)
        model = onnx_of(family, x, dynamic_batch("all"), dynamo)
        kinds = [node.op_type for node in model.graph.node]
        assert kinds == ["PRelu", "PRelu", *(["Unsqueeze"] if dynamo else []), "PRelu"]
        for run in runs_of(model):
            for given, expected in zip(run(x), family(x), strict=True):
                assert torch.equal(given, expected.detach().cpu())

    def test_an_accelerated_model_gives_the_graph_of_pytorchs(self, dynamo, device):
        x = randn(SHAPE, torch.float32, device)
        ours, torchs = (
            contents(onnx_of(model.eval(), x, dynamic_batch("network"), dynamo))
            for model in network(device)
        )
        assert ours == torchs
        assert activations(kind for kind, _ in ours[0]) == ["PRelu", "PRelu", "LeakyRelu"]

    @pytest.mark.parametrize("autocast", [False, True], ids=["half input", "autocast"])
    def test_float32_slopes_beside_half_precision(self, autocast, dynamo, device, launches):
        names = ["per channel", "dim=-1", "shared axis 2"]
        family = Family(module(name, device) for name in names).eval()
        x = randn(SHAPE, torch.float32 if autocast else torch.float16, device)
        with torch.autocast(device.type, torch.float16, enabled=autocast):
            model = onnx_of(family, x, dynamic_batch("all"), dynamo)
            if autocast:
                # Exporters take autocast's slopes, which are rounded, as PyTorch's are.
                family.half().float()
            expected = tuple(y.detach().cpu() for y in family(x))
        assert activations(node.op_type for node in model.graph.node) == ["PRelu"] * len(names)
        # onnxruntime rounds half precision otherwise than onnx's reference and PyTorch.
        runtimes = torch.finfo(torch.float16).eps if autocast else 0
        for run, rounded in zip(runs_of(model), (0, runtimes), strict=True):
            torch.testing.assert_close(tuple(run(x)), expected, rtol=rounded, atol=0)


@needs_onnx
class TestOnnxOfPrograms:
    """Programs that torch.export recorded before: they know nothing of ONNX."""

    @pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation")
    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    @pytest.mark.parametrize("names", [DYNAMIC, STATIC], ids=["dynamic batch", "static"])
    def test_a_program_computes_the_same_and_can_be_verified(self, names, strict, device, launches):
        from torch.onnx.verification import verify_onnx_program

        family = Family(module(name, device) for name in names).eval()
        inputs = batches(names[0], device)
        program = torch.export.export(
            family, (inputs[0],), dynamic_shapes=dynamic_batch(names[0]), strict=strict
        )
        exported = torch.onnx.export(program, verbose=False)
        for x in inputs:
            for run in runs_of(exported.model_proto):
                for name, given, expected in zip(names, run(x), family(x), strict=True):
                    assert torch.equal(given, expected.detach().cpu()), name
        compared = verify_onnx_program(exported)
        assert [difference.max_abs_diff for difference in compared] == [0] * len(names)

    def test_a_model_without_data_keeps_its_device(self):
        """Of what follows, parameters are elsewhere than PyTorch's stand-in for ONNX's operator."""
        model = nn.Sequential(PReLU(SIZE, dim=-1), nn.Linear(SIZE, SIZE)).to("meta").eval()
        x = torch.empty(SHAPE, device="meta")
        exported = torch.onnx.export(model, (x,), verbose=False, optimize=False)
        kinds = [node.op_type for node in exported.model.graph]
        assert activations(kinds) == ["PRelu"]
        assert "Transpose" not in kinds[: kinds.index("PRelu") + 1]


def scripted_prelu(x: torch.Tensor, weight: torch.Tensor):
    return prelu(x, weight)


def scripted_leaky_relu(x: torch.Tensor):
    return leaky_relu(x, 0.2)


def parts(model):
    """Everything that a model consists of."""
    attributes = [
        (name, type(part), {key: id(value) for key, value in vars(part).items()})
        for name, part in model.named_modules()
    ]
    return attributes, [*model.named_modules()], [*map(id, model.parameters())]


class TestScript:
    def test_a_model_is_told_to_be_restored_and_stays_as_it_is(self, device, launches):
        ours, torchs = network(device)
        x = randn(SHAPE, torch.float32, device)
        before = parts(ours)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"Call prelu_gpu\.restore\(model\) first"):
                torch.jit.script(ours)
        assert parts(ours) == before
        ours(x)
        assert launches
        scripted = torch.jit.script(prelu_gpu.restore(ours))
        torch.testing.assert_close(scripted(x), torchs(x))

    @pytest.mark.parametrize("name", [name for name in MODULES if name != "every element"])
    def test_every_module_says_so_alone_and_inside_others(self, name, device):
        ours = module(name, device)
        for model in (ours, nn.Sequential(nn.Identity(), nn.Sequential(ours))):
            with pytest.raises(RuntimeError, match=r"Call prelu_gpu\.restore\(model\) first"):
                torch.jit.script(model)

    @pytest.mark.parametrize(
        "function",
        [prelu, leaky_relu, scripted_prelu, scripted_leaky_relu],
        ids=lambda f: f.__name__,
    )
    def test_functions_say_what_to_call_instead(self, function):
        with pytest.raises(RuntimeError, match=r"torch\.nn\.functional's prelu and leaky_relu"):
            torch.jit.script(function)
