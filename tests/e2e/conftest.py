from pathlib import Path

import pytest

from tests.stand_in_server import stand_in_python


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `server.python`: starts tests/stand_in_server.py in the place of SGLang."""
    return stand_in_python(tmp_path_factory.mktemp("stand-in") / "python")
