import ast
import multiprocessing
import sys
import textwrap
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the mutation check forks processes", allow_module_level=True)

pytest.importorskip("hypothesis")
pytest.importorskip("rich")

from mutants import Mutant, mutants_of
from mutations import EQUIVALENT, Stage, reasons, run

KERNELS = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))

SAMPLE = '''
@triton.jit
def kernel(x_ptr, y_ptr, n, mask, BLOCK: tl.constexpr):
    """At least 1 line."""
    total = tl.zeros((BLOCK,), tl.float32) + tl.full((BLOCK,), n, tl.float32)
    for first in range(tl.program_id(2), n, BLOCK):
        x = tl.load(x_ptr + first // 2, mask=mask, other=0.0)
        total += tl.sum(x, axis=0).to(tl.float32)
    if y_ptr is not None:
        total = tl.maximum(total, -n) * tl.where(mask & (n > 3), x, "ä")
        tl.debug_barrier()
        tl.store(y_ptr, helper(total, mask), total <= n)
    return not n and mask
'''


def changes(source):
    return {mutant.change for mutant in mutants_of("sample.py", source)}


@pytest.mark.parametrize(
    "change",
    [
        "tl.zeros((BLOCK,), tl.float32) -> tl.full((BLOCK,), 1, tl.float32)",
        "tl.full((BLOCK,), n, tl.float32) -> tl.zeros((BLOCK,), tl.float32)",
        "range(tl.program_id(2), n, BLOCK) -> range(0, n, BLOCK)",
        "range(tl.program_id(2), n, BLOCK) -> range(tl.program_id(2), n)",
        "tl.program_id(2) -> tl.program_id(0)",
        "tl.load(x_ptr + first // 2, mask=mask, other=0.0) -> tl.load(x_ptr + first // 2)",
        "x_ptr + first // 2 -> x_ptr - first // 2",
        "x_ptr + first // 2 -> first // 2",
        "first // 2 -> first % 2",
        "first // 2 -> first",
        "first // 2 -> first // 3",
        "other=0.0 -> other=1.0",
        "axis=0 -> axis=1",
        "total += tl.sum(x, axis=0).to(tl.float32) -> pass",
        "total += tl.sum(x, axis=0).to(tl.float32) -> total = tl.sum(x, axis=0).to(tl.float32)",
        "total += tl.sum(x, axis=0).to(tl.float32) -> total -= tl.sum(x, axis=0).to(tl.float32)",
        "tl.sum(x, axis=0).to(tl.float32) -> tl.sum(x, axis=0)",
        "y_ptr is not None -> not (y_ptr is not None)",
        "y_ptr is not None -> True",
        "y_ptr is not None -> False",
        "tl.maximum(total, -n) -> tl.minimum(total, -n)",
        "tl.maximum(total, -n) -> -n",
        "-n -> n",
        "mask & (n > 3) -> mask | (n > 3)",
        "mask & (n > 3) -> n > 3",
        "n > 3 -> n >= 3",
        "n > 3 -> n <= 3",
        "n > 3 -> (n > 3) | True",
        "n > 3 -> (n > 3) & False",
        "n > 3 -> n > 4",
        "tl.debug_barrier() -> pass",
        "helper(total, mask) -> helper(total, None)",
        "tl.store(y_ptr, helper(total, mask), total <= n) -> pass",
        "tl.store(y_ptr, helper(total, mask), total <= n) -> tl.store(y_ptr, helper(total, mask))",
        "not n and mask -> not n or mask",
        "not n -> n",
    ],
)
def test_the_sample_is_broken_in_this_way(change):
    assert change in changes(SAMPLE)


def test_nothing_but_code_is_changed():
    assert not changes("VECTOR = 16")
    assert not changes('def f(n: "16" = 4):\n    """At least 1 > 0."""\n    return n')


def test_a_mutant_says_where_it_is_and_leaves_the_rest():
    lines = SAMPLE.splitlines()
    for mutant in mutants_of("sample.py", SAMPLE):
        assert mutant.text == lines[mutant.line - 1].strip()
        assert mutant.source.splitlines()[: mutant.line - 1] == lines[: mutant.line - 1]
        assert mutant.source.splitlines()[mutant.line - 1] != lines[mutant.line - 1]
        assert mutant.key == f"sample.py:kernel: {mutant.text}: {mutant.change}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_mutant_of_the_kernels_is_another_program(path):
    source = path.read_text()
    mutants = list(mutants_of(path.name, source))
    trees = [ast.dump(ast.parse(text)) for text in (source, *(m.source for m in mutants))]
    assert len(set(trees)) == len(trees) > 1
    assert len({mutant.key for mutant in mutants}) == len(mutants)
    functions = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    assert {mutant.function for mutant in mutants} == functions


def test_every_reason_is_of_a_mutant():
    mutants = {
        mutant.key
        for path in KERNELS
        for mutant in mutants_of(f"kernels/{path.name}", path.read_text())
    }
    assert reasons(EQUIVALENT).keys() <= mutants


def test_outcomes_of_a_small_project(tmp_path):
    preload = ["pytest", "hypothesis", "rich.progress"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)

    def broken(source):
        return Mutant("sample.py", "f", 1, "", "", source)

    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    original = "def f(n):\n    return n + 1\n"
    (root / "sample.py").write_text(original)
    for name, expected in (("test_one.py", "f(0) == 1"), ("test_two.py", "f(2) == 3")):
        test = f"import sample\n\ndef test_f():\n    assert sample.{expected}\n"
        (root / "tests" / name).write_text(test)
    mutants = [
        broken(original),
        broken("def f(n):\n    return n + 2\n"),
        broken("def f(n):\n    return 2 * n + 1\n"),
        broken("def f(n):\n    while n == 0:\n        pass\n    return n + 1\n"),
        broken("def f(n):\n    raise SystemError\n"),
        broken("import os\ndef f(n):\n    os.abort()\n"),
        broken("1 / 0\n"),
    ]
    stages = [Stage(["tests/test_one.py"], 5, mixed=True), Stage(["tests/test_two.py"], 20)]
    results = list(run(root, [(mutant, stages) for mutant in mutants], jobs=2))
    assert [result[:2] for result in results] == [
        ("survived", ""),
        ("killed", "tests/test_one.py::test_f"),
        ("killed", "tests/test_two.py::test_f"),
        ("timeout", "tests/test_one.py::test_f"),
        ("killed", "tests/test_one.py::test_f"),
        ("killed", "tests/test_one.py::test_f"),
        ("killed", "import"),
    ]
    assert (root / "sample.py").read_text() == original
    with pytest.raises(RuntimeError, match=r"test_three\.py"):
        list(run(root, [(mutants[0], [Stage(["tests/test_three.py"], 20)])], jobs=2))


def test_reasons_stand_above_their_mutants(tmp_path):
    file = tmp_path / "reasons.txt"
    assert reasons(file) == {}
    file.write_text(
        textwrap.dedent("""\
            # a comment
            The first reason
                a: b: c -> d
                e: f: g -> h

            The second reason
                i: j: k -> l
        """)
    )
    assert reasons(file) == {
        "a: b: c -> d": "The first reason",
        "e: f: g -> h": "The first reason",
        "i: j: k -> l": "The second reason",
    }
