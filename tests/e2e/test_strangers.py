"""A whole run with the real server, as a stranger on the machine sees it, and what it leaves; also after a kill."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e import watching
from tests.e2e.running import REPOSITORY, Running, assert_complete, start, tiny_settings

LEAVES_S = 15.0
LOOKS_EVERY_S = 0.3
"""It has a core to share with the run."""


class Stranger:
    """Looks at a run again and again, and remembers."""

    def __init__(self, running: Running, temporary: Path) -> None:
        self.running, self.temporary = running, temporary
        self.key = b""
        self.listeners: set[str] = set()
        self.left: set[Path] = set()
        self.told: list[object] = []
        self.groups: set[int] = set()

    def look(self) -> None:
        processes = watching.descendants(self.running.process.pid)
        self.groups |= set(processes)
        self.listeners |= watching.listeners(processes)
        self.left |= watching.shared_memory(processes) | watching.bound_files(processes)
        if self.key:
            self.told += watching.processes_with(self.key, processes)
        else:
            self.key = watching.read(self.running.directory / "servers" / "0.key")

    def is_answered(self, port: int) -> list[int]:
        url = f"http://127.0.0.1:{port}"
        calls = {
            "/pause_generation": {"mode": "abort"},
            "/update_weights_from_disk": {"model_path": "/tmp"},
            "/generate": {"input_ids": [1]},
        }
        codes = [httpx.post(url + path, json=body, timeout=10).status_code for path, body in calls.items()]
        return [*codes, httpx.get(f"{url}/server_info", timeout=10).status_code]

    def watch(self, up_to: tuple[str, ...] = ()) -> None:
        """To its end, or to a phase."""
        while self.running.process.poll() is None and self.running.phase()["phase"] not in up_to:
            self.look()
            time.sleep(LOOKS_EVERY_S)

    def check(self) -> None:
        """Afterwards."""
        assert len(self.key) == 64 and self.told == []
        assert len(self.listeners) >= 2
        assert [address for address in self.listeners if not watching.is_loopback(address)] == []
        places = (self.running.directory, self.temporary)
        assert watching.files_with(self.key, *places) == []
        deadline = time.monotonic() + LEAVES_S
        while (left := self.traces()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == []

    def traces(self) -> list[Path]:
        return [*(path for path in self.left if path.exists()), *self.temporary.iterdir()]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # the names of sockets are short
    directory = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    shutil.rmtree(directory)


def test_a_run_is_closed_to_strangers_and_leaves_nothing_also_after_kill_9(tiny_model, temporary, tmp_path):
    python = REPOSITORY / ".venv-sglang/bin/python"
    assert python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    settings = tiny_settings(
        tiny_model(),
        python,
        tmp_path,
        run={"steps": 2},
        server={"start_timeout_s": 240.0},
        parallel={"dp": 2},
        eval={"problems": 0, "exact_problems": 0},
        checkpoint={"every": 2},
        log={"wandb": "offline"},
    )
    killed = Stranger(start(settings, tmp_path), temporary)
    killed.watch(up_to=("rollout", "teacher", "learn", "push"))
    assert killed.running.process.poll() is None, killed.running.output()
    port = int(killed.running.server_url().rpartition(":")[2])
    assert killed.is_answered(port) == [401] * 4
    killed.look()
    assert killed.running.process.poll() is None and len(killed.left) >= 4
    os.kill(killed.running.process.pid, signal.SIGKILL)
    killed.running.process.communicate()
    killed.check()

    again = Stranger(start(settings, tmp_path), temporary)
    again.watch()
    out, _ = again.running.process.communicate()
    assert again.running.process.returncode == 0, out
    again.check()
    assert again.key != killed.key and again.key.decode() not in out
    assert_complete(again.running, 2)
