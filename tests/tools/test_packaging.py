import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prelu_gpu

ROOT = Path(__file__).parents[2]


def test_kernels_is_no_top_level_module():
    """A top-level `kernels` would overwrite the files of the well-known package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "prelu_gpu" / "kernels").is_symlink()
    program = "import prelu_gpu.kernels.plane, sys; assert 'kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_kernels_import_triton_and_each_other_only():
    for path in (ROOT / "kernels").glob("*.py"):
        imports = [
            line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))
        ]
        assert all(line.startswith(("import triton", "from .")) for line in imports), path


def test_a_built_wheel_carries_the_kernels_and_the_types(tmp_path):
    pytest.importorskip("build", reason="the wheel is built where `make` installed the tools")
    source = tmp_path / "source"
    leave = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"prelu_gpu-{prelu_gpu.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"prelu_gpu-{prelu_gpu.__version__}.dist-info/METADATA").decode()
    files = {name for name in names if ".dist-info" not in name}
    assert files == {
        *(f"prelu_gpu/{path.name}" for path in (ROOT / "prelu_gpu").glob("*.py")),
        *(f"prelu_gpu/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")),
        "prelu_gpu/py.typed",
    }
    assert 'Requires-Dist: triton>=3.6; sys_platform == "linux"' in metadata
    assert "Requires-Dist: torch>=2.11" in metadata

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    program = "import prelu_gpu, prelu_gpu.kernels.plane as plane; print(plane.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=installed, check=True, capture_output=True, text=True
    )
    assert run.stdout.startswith(str(installed))


def test_kernels_import_triton_and_each_other_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} == {"triton"}, path
            elif isinstance(node, ast.ImportFrom):
                own = node.level == 1 and (ROOT / "kernels" / f"{node.module}.py").is_file()
                assert own or (node.level == 0 and node.module.split(".")[0] == "triton"), path
