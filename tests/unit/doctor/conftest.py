"""What a check must not leave behind."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def started_here() -> Callable[[], list[psutil.Process]]:
    """Gives the processes that this test has started and that are still there; others belong to other tests."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """Makes an interpreter of a shell script, which has the arguments as $1, $2 and so on."""

    def make(script: str) -> str:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make
