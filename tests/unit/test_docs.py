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


def test_the_readmes_tree_is_the_package():
    """Every file stands there once, in its folder, with a phrase of its own."""
    text = (REPOSITORY / "README.md").read_text().partition("## The package")[2]
    folders: list[str] = []
    named, phrases = [], []
    for line in text.splitlines():
        if found := re.fullmatch(r" {4}([│ ]*)[├└]── (\S+?)(/?) +(.+)", line):
            folders[len(found[1]) // 4 :] = [found[2]]
            phrases.append(found[4])
            if not found[3]:
                named.append("/".join(folders))
    package = REPOSITORY / "sdpo_megatron"
    found_files = [
        str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"
    ]
    assert sorted(named) == sorted(found_files)
    assert all(len(phrase) > 4 for phrase in phrases)


def test_the_loops_table_of_contents_names_files_that_exist():
    text = (REPOSITORY / "sdpo_megatron/train.py").read_text().partition("the file of each part:")[2]
    named = re.findall(r"((?:\w+/)+(?:\w+\.py)?)(?:,|\n| )", text.partition('"""')[0])
    assert len(named) >= 6
    for name in named:
        assert (REPOSITORY / "sdpo_megatron" / name).exists(), name
