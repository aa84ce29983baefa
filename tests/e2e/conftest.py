import subprocess
import sys
from collections.abc import Callable, Iterator
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
def running_server(tiny_model: Callable[..., Path]) -> Iterator[str]:
    """The URL of a stand-in that somebody else started, with the tiny llama."""
    port = free_port("127.0.0.1")
    flags = ["--model-path", str(tiny_model()), "--port", str(port)]
    with subprocess.Popen([sys.executable, "tests/stand_in_server.py", *flags]) as process:
        client = Client(f"http://127.0.0.1:{port}")
        assert wait_until(client.healthy, 120.0)
        yield client.url
        process.kill()
