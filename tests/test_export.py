"""Models as others get them: exported programs, traces, fx graphs and ONNX, without `restore`."""

import copy
import importlib.util
import io
import pickle
import subprocess
import sys

import pytest
import torch
from reference import assert_same, randn
from torch import nn

import prelu_gpu
from prelu_gpu import PReLU, SharedAxesPReLU, functional, leaky_relu, plan, prelu

pytestmark = pytest.mark.filterwarnings(
    # PyTorch's exporters of their own affairs.
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
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
def small(monkeypatch):
    """PyTorch's operator serves small inputs, as it does on a user's GPU."""
    monkeypatch.setattr(functional, "EAGER_BELOW", plan.SMALL)


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

    def test_a_graph_does_not_depend_on_the_size(self, device, monkeypatch, launches):
        monkeypatch.setattr(functional, "EAGER_BELOW", plan.SMALL)
        ours = module("per channel", device)
        graph = torch.fx.symbolic_trace(ours)
        x = randn(SHAPE, torch.float32, device)
        expected = graph(x).detach()
        assert not launches
        monkeypatch.setattr(functional, "EAGER_BELOW", 0)
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


def activations(kinds):
    return [kind for kind in kinds if kind.endswith("elu")]


def runs_of(model):
    """The model as functions, by onnx's reference and by onnxruntime."""
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (name,) = (given.name for given in model.graph.input)
    for run in (ReferenceEvaluator(model).run, session.run):
        yield lambda x, run=run: map(torch.from_numpy, run(None, {name: x.cpu().numpy()}))


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="onnx, onnxruntime or onnxscript is not installed",
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
class TestOnnx:
    @pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation")
    @pytest.mark.parametrize("names", [DYNAMIC, STATIC], ids=["dynamic batch", "static"])
    def test_one_standard_node_for_each_computes_the_same(self, names, dynamo, device, launches):
        family = Family(module(name, device) for name in names).eval()
        inputs = batches(names[0], device)
        model = onnx_of(family, inputs[0], dynamic_batch(names[0]), dynamo)
        assert activations(node.op_type for node in model.graph.node) == [
            "LeakyRelu" if "leaky" in name else "PRelu" for name in names
        ]
        for x in inputs:
            for run in runs_of(model):
                for name, given, expected in zip(names, run(x), family(x), strict=True):
                    assert torch.equal(given, expected.detach().cpu()), name

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
