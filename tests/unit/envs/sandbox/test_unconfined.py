"""What holds without a sandbox of ours: the limits of plain processes, and the contract with a service's stand-in."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdpo_megatron.envs.sandbox.base import Limits, Program, SandboxFault
from sdpo_megatron.envs.sandbox.kept import UnsafeSubprocess
from sdpo_megatron.envs.sandbox.service import Service
from tests.unit.envs.sandbox.attempts import PRELUDE, RUNAWAY, SIMPLE
from tests.unit.envs.sandbox.fusion import service
from tests.unit.envs.sandbox.test_escapes import COMMAND, a_long_time, processes_with, runaway_limits

LIMITED = ["more memory", "a file that is too large", "many open files", "a fork bomb", "a bomb of threads"]
SMALL = Limits(cpu_s=5, wall_s=20, memory_bytes=512 << 20, processes=8)


def program(code: str) -> Program:
    return Program(COMMAND, {"attempt.py": (PRELUDE + code).encode()})


def test_limits_hold_for_plain_processes():
    sandbox = UnsafeSubprocess()
    with ThreadPoolExecutor(4) as pool:
        ended = {
            name: (limit, pool.submit(sandbox.run, program(code), runaway_limits(limit)))
            for name, (code, limit) in RUNAWAY.items()
        }
        refused = {name: pool.submit(sandbox.run, program(SIMPLE[name]), SMALL) for name in LIMITED}
    assert {name: future.result().limit for name, (_, future) in ended.items()} == {
        name: limit for name, (limit, _) in ended.items()
    }
    assert {name: future.result().stdout_bytes.split() for name, future in refused.items()} == {
        name: [b"refused"] for name in LIMITED
    }


def test_a_plain_process_leaves_nothing_behind_and_gets_no_secrets(monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    word = a_long_time()
    code = f"""
if os.fork() == 0:
    os.setsid()
    os.execv("/usr/bin/sleep", ["sleep", "{word}"])
print(os.environ.get("API_KEY"), os.listdir())
"""
    outcome = UnsafeSubprocess().run(program(code), SMALL)
    assert outcome.stdout_bytes == b"None ['attempt.py']\n"
    assert processes_with(word) == 0


def test_a_service_runs_programs_with_files_input_and_limits():
    with service() as url:
        sandbox = Service(url + "/")
        outcome = sandbox.run(
            Program(
                ["python", "a/x.py"], {"a/x.py": b"print(input(), open('a/y').read())", "a/y": b"2"}, b"1\n"
            ),
            SMALL,
        )
        assert (outcome.exit_code, outcome.stdout_bytes, outcome.limit) == (0, b"1 2\n", None)
        outcome = sandbox.run(Program(["python", "-c", "import sys; sys.exit('told')"]), SMALL)
        assert (outcome.exit_code, outcome.stderr_bytes) == (1, b"told\n")
        outcome = sandbox.run(Program(["python", "-c", "import os; os.abort()"]), SMALL)
        assert (outcome.exit_code, outcome.signal) == (None, 6)
        assert b"MemoryError" in sandbox.run(program("bytearray(2 << 30)"), SMALL).stderr_bytes
        assert sandbox.run(program("time.sleep(9)"), Limits(wall_s=0.5)).limit == "wall"
        assert sandbox.run(program("while True: pass"), Limits(cpu_s=1, wall_s=9)).limit == "cpu"
        outcome = sandbox.run(program("print('x' * 999)"), Limits(output_bytes=10))
        assert (outcome.limit, len(outcome.stdout_bytes)) == ("output", 10)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"", "500 Internal Server Error"),
        (200, b"<html>", "Expecting value"),
        (200, b"{}", "answered without 'run_result'"),
        (
            200,
            json.dumps(
                {"status": "SandboxError", "message": "no pod", "run_result": {"status": "Error"}}
            ).encode(),
            "ran no program: no pod",
        ),
        (200, json.dumps({"status": "Failed", "run_result": None}).encode(), "answered without"),
    ],
)
def test_a_service_that_ran_nothing_is_a_fault(status, body, message):
    with service(lambda request: (status, body)) as url:
        with pytest.raises(SandboxFault, match=message):
            Service(url).run(program(""), SMALL)


def test_a_service_that_is_not_there_or_answers_late_is_a_fault(monkeypatch):
    with pytest.raises(SandboxFault, match="http://127.0.0.1:9/run_code: .*refused"):
        Service("http://127.0.0.1:9").run(program(""), SMALL)
    with pytest.raises(SandboxFault, match="Invalid port"):
        Service("http://x:y").run(program(""), SMALL)
    monkeypatch.setattr("sdpo_megatron.envs.sandbox.service.ANSWER_WITHIN_S", 0.0)
    monkeypatch.setitem(os.environ, "http_proxy", "http://127.0.0.1:9")
    with service(lambda request: (time.sleep(1), (200, b""))[1]) as url:
        with pytest.raises(SandboxFault, match="timed out"):
            Service(url).run(program(""), Limits(wall_s=0.3))
