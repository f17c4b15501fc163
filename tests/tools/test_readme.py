"""README.md: what its compatibility table names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_row_of_the_compatibility_table_names_tests_that_are_there():
    section = README.partition("\n## Works with\n")[2].partition("\n## ")[0]
    _, _, *rows = (line for line in section.splitlines() if line.startswith("|"))
    assert len(rows) > 20
    for row in rows:
        tested_by = row.strip("| ").rpartition("|")[2]
        names = re.findall(r"\((tests/\S+\.py)\)|`(test_\w+)`", tested_by)
        source = ""
        for path, name in names:
            if path:
                source = (ROOT / path).read_text()
            else:
                assert re.search(rf"def {name}\(", source), f"{name} of {row}"
        assert sum(bool(name) for _, name in names) >= 1, row
