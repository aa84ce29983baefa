"""Where the published files lie: `shared/data` beside the repository."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the published files are not part of the repository: there is no ../shared/data")
    return folder
