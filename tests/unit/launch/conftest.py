"""A project that the launcher accepts, whose processes a failed test does not leave behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.launch.launching import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path)
    yield project
    for process in project.launchers:  # of a test that failed
        process.kill()
        process.communicate()
