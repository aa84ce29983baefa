import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.launch.server import free_port
from sdpo_megatron.rollout.client import Client
from tests.stand_in_server import stand_in_python


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `server.python`: starts tests/stand_in_server.py in the place of SGLang."""
    return stand_in_python(tmp_path_factory.mktemp("stand-in") / "python")


@pytest.fixture(scope="module")
def a_server() -> Iterator[Callable[[Path, str], str]]:
    """Gives the URL of a stand-in that somebody else started, with a model and a type; one of each a module."""
    running: dict[tuple[Path, str], str] = {}
    with ExitStack() as stack:

        def url(model: Path, dtype: str) -> str:
            if (model, dtype) not in running:
                port = free_port("127.0.0.1")
                flags = ["--model-path", str(model), "--port", str(port), "--dtype", dtype]
                process = subprocess.Popen([sys.executable, "tests/stand_in_server.py", *flags])
                stack.callback(process.wait)
                stack.callback(process.kill)
                client = Client(f"http://127.0.0.1:{port}")
                assert wait_until(client.healthy, 120.0)
                running[model, dtype] = client.url
            return running[model, dtype]

        yield url
