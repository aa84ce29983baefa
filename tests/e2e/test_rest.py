"""A whole run whose server releases its memory in every step, as on GPUs that both share. There are none here: the
check that refuses it on a CPU is taken out, and only the order of the calls is tested. The stand-in ends where SGLang
would; it is somebody else's, so that it can be killed and started again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import yaml
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.launch.server import free_port
from sdpo_megatron.rollout.client import Client
from tests.e2e.running import REPOSITORY, REST_AND_PUSH, Running, assert_complete, tiny_settings

RANK = """
import sys
from sdpo_megatron.preflight import settings
settings.check_released_memory = lambda *arguments, **options: None
from sdpo_megatron.train import main
sys.exit(main(sys.argv[1:]))
"""


class SomebodysServer:
    def __init__(self, model: Path, stack: ExitStack) -> None:
        self.model, self.stack, self.port = model, stack, free_port("127.0.0.1")
        self.client = Client(f"http://127.0.0.1:{self.port}")
        self.start()

    def start(self) -> None:
        flags = ["--model-path", str(self.model), "--port", str(self.port), "--dtype", "float32"]
        self.process = subprocess.Popen([sys.executable, "tests/stand_in_server.py", *flags], cwd=REPOSITORY)
        self.stack.callback(self.process.wait)
        self.stack.callback(self.process.kill)
        assert wait_until(self.client.healthy, 120.0)

    def calls(self) -> list[str]:
        """Without those that carry weights and make groups."""
        made = httpx.get(f"{self.client.url}/_test/calls").json()
        return [call for call in made if "weights_update" not in call and "weights_from" not in call]


@pytest.fixture
def server(tiny_model) -> Iterator[SomebodysServer]:
    with ExitStack() as stack:
        yield SomebodysServer(tiny_model(), stack)


def start_rank(server: SomebodysServer, stand_in: Path, directory: Path, steps: int) -> Running:
    settings = tiny_settings(
        *(server.model, stand_in, directory),
        run={"steps": steps},
        server={"urls": [server.client.url], "release_memory": True, "start_timeout_s": 120.0},
        eval={"every": 1},
    )
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(path)],
        cwd=REPOSITORY,
        env=os.environ | place | {"MASTER_PORT": str(free_port("127.0.0.1"))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Running(process, directory / "runs" / "tiny")


def test_in_every_step_the_server_rests_behind_the_rollout_and_is_awake_for_all_else(
    server: SomebodysServer, stand_in: Path, tmp_path: Path
):
    running = start_rank(server, stand_in, tmp_path, steps=3)
    assert running.end() == 0, running.output()
    assert_complete(running, 3)
    calls = server.calls()
    # the first push finds it awake
    first = [call for call in REST_AND_PUSH[3:] if "resume_memory" not in call]
    assert calls == first + 3 * REST_AND_PUSH
    for step in range(3):
        for response in running.responses(step):
            assert {span.version for span in response.weight_spans} == {step}


def test_a_server_that_is_lost_while_it_rests_is_met_at_the_push_with_all_of_its_memory(
    server: SomebodysServer, stand_in: Path, tmp_path: Path
):
    running = start_rank(server, stand_in, tmp_path, steps=3)
    running.wait_for_phase("learn", 1)
    server.process.kill()
    server.process.wait()
    server.start()
    assert running.end() == 0, running.output()
    out = running.output()
    assert_complete(running, 3)
    assert "was started anew, without the run's weights" in out or "cannot be reached" in out
    assert server.calls()[-len(REST_AND_PUSH) :] == REST_AND_PUSH
