"""What the documents promise is there: tests, links, and Python that runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import prelu_gpu

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TESTS = ROOT / "tests" / "README.md"
DOCUMENTS = README, TESTS, ROOT / ".github" / "CONTRIBUTING.md"


def test_every_row_of_the_compatibility_table_names_tests_that_are_there():
    section = TESTS.read_text().partition("\n## Compatibility\n")[2].partition("\n## ")[0]
    _, _, *rows = (line for line in section.splitlines() if line.startswith("|"))
    assert len(rows) > 20
    for row in rows:
        tested_by = row.strip("| ").rpartition("|")[2]
        names = re.findall(r"\((\S+\.py)\)|`(test_\w+)`", tested_by)
        source = ""
        for path, name in names:
            if path:
                source = (TESTS.parent / path).read_text()
            else:
                assert re.search(rf"def {name}\(", source), f"{name} of {row}"
        assert sum(bool(name) for _, name in names) >= 1, row


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text())
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if heading:
            assert heading in anchors(file), target


def anchors(document):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


# tests/stacks runs the block that needs other packages.
BLOCKS = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    if "monai" not in block
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_of_the_readme_runs_on_the_kernels(block, device, launches):
    with device:
        names = {
            "prelu_gpu": prelu_gpu,
            "model": nn.Sequential(nn.Linear(8, 64), nn.PReLU(64)),
            "x": torch.randn(4, 8),
            "weight": torch.rand(8),
            "images": torch.randn(4, 8, 6, 6),
            "running_mean": torch.zeros(8),
            "running_var": torch.ones(8),
        }
        try:
            exec(block, names)
        finally:
            prelu_gpu.disable()
