"""The canary notices weights that did not arrive, and weights that arrived under another's name."""

import subprocess
import sys

import pytest

from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.server import free_port, wait_until
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def server(tiny_model):
    port = free_port("127.0.0.1")
    command = [
        sys.executable,
        "tests/stand_in_server.py",
        "--model-path",
        str(tiny_model()),
        "--port",
        str(port),
    ]
    with subprocess.Popen(command) as process:
        client = Client(f"http://127.0.0.1:{port}")
        assert wait_until(client.healthy, 120.0)
        yield client
        process.kill()


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tp": 1}, {"pp": 2}, {"tp": 3}], ids=["one", "pp2", "tp3"])
def test_a_dropped_bucket_and_swapped_tensors_are_caught(server, tiny_model, layout):
    ranks = layout.get("tp", 1) * layout.get("pp", 1)
    said = run_ranks(ranks, "tests.e2e.pushing:push_right_and_wrong", str(tiny_model()), server.url, layout)[
        0
    ]
    right, dropped, mended, swapped, mended_again = said
    assert right == mended == mended_again == ""
    assert "push of weights version 1" in dropped
    assert "push of weights version 3" in swapped
