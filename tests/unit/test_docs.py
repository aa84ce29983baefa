"""What the documents name exists."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_test_in_the_table_of_promises_exists():
    text = (REPOSITORY / "tests/README.md").read_text().partition("## Promises")[2]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    for row in rows:
        path = None
        for name in re.findall(r"`([^`]+)`", row):
            file, _, test = name.partition("::")
            path = REPOSITORY / "tests" / file if file else path
            if path is None or not (name.endswith(".py") or test):
                continue
            assert path.is_file(), f"{row}: no file {path}"
            assert not test or f"def {test}(" in path.read_text(), f"{row}: no test {test}"


def test_the_packages_files_in_the_readme_exist_and_none_is_left_out():
    table = (REPOSITORY / "README.md").read_text().partition("## The package")[2]
    named = set(re.findall(r"`(\w+\.py|\w+/)`", table))
    package = REPOSITORY / "sdpo_megatron"
    found = {
        path.name
        for path in package.glob("*.py")
        if path.name not in ("__init__.py", "errors.py", "files.py")
    }
    found |= {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert named - {"CONTRIBUTING.md"} == found
