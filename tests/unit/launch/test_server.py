"""Command lines, and the life and death of a server process (with scripts in the place of a server)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.launch import server
from sdpo_megatron.launch.kill_orphans import group_members
from sdpo_megatron.launch.processes import Redactor, wait_until
from sdpo_megatron.launch.server import (
    ServedModel,
    ServerProcess,
    free_port,
    server_command,
    server_environment,
)
from sdpo_megatron.preflight.memory import ServerMemory
from tests.small_server import MEMORY
from tests.unit.launch.launching import MODEL

REPOSITORY = Path(__file__).parents[3]
SETTINGS = Path("settings.yaml")
PRIVATE = Path("/private")


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(MODEL | shape))
    return ServedModel(
        path=tmp_path,
        dtype="float32",
        device="cpu",
        context_length=2048,
        max_responses=128,
        memory=MEMORY,
        seed=3,
    )


def script(path: Path, text: str) -> Path:
    """An executable in the place of the server's Python: it is called with the launcher and the server's
    flags."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def options(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in zip(command, command[1:], strict=False) if a.startswith("--")}


def test_command_on_a_cpu(model: ServedModel):
    command = server_command(
        ServerSettings(python="py", args=["--log-level", "warning"]), model, 4321, SETTINGS
    )
    assert command[0] == "py"
    assert command[1].endswith("launch/sglang_on_cpu.py")
    assert command[-4:] == ["--sleep-on-idle", "--skip-server-warmup", "--log-level", "warning"]
    expected = {
        "--model-path": str(model.path),
        "--device": "cpu",
        "--dtype": "float32",
        "--attention-backend": "batched_sdpa",
        "--context-length": "2056",
        "--max-running-requests": "128",
        "--mem-fraction-static": "0.95",
        "--max-total-tokens": "16384",
        "--random-seed": "3",
        "--weight-version": "0",
        "--host": "127.0.0.1",
        "--port": "4321",
    }
    assert expected.items() <= options(command).items()
    assert "--api-key" not in command


def test_command_on_a_gpu(model: ServedModel):
    settings = ServerSettings(python="py", tp=2)
    command = server_command(settings, replace(model, device="cuda", dtype="bfloat16"), 4321, SETTINGS)
    assert command[:3] == ["py", "-m", "sglang.launch_server"]
    assert {
        "--device": "cuda",
        "--dtype": "bfloat16",
        "--tp-size": "2",
        "--config": "settings.yaml",
    }.items() <= options(command).items()
    for other in ("--attention-backend", "--skip-server-warmup", "--enable-memory-saver"):
        assert other not in command
    released = replace(model, device="cuda")
    settings = ServerSettings(python="py", release_memory=True)
    assert "--enable-memory-saver" in server_command(settings, released, 4321, SETTINGS)


def test_a_fraction_of_ones_own_leaves_the_caches_size_to_sglang(model: ServedModel):
    own = replace(model, memory=ServerMemory(fraction=0.3, cache_tokens=None))
    command = server_command(ServerSettings(python="py"), own, 4321, SETTINGS)
    assert options(command)["--mem-fraction-static"] == "0.3"
    assert "--max-total-tokens" not in command


def test_environment_sets_switches_and_drops_the_trainers():
    base = {"PATH": "/bin", "PYTHONPATH": "/trainer", "RANK": "0"}
    cpu = server_environment(base, "cpu", "127.0.0.1", PRIVATE)
    assert cpu["PATH"] == "/bin"
    assert {"PYTHONPATH", "RANK"}.isdisjoint(cpu)
    assert (cpu["SGLANG_USE_CPU_ENGINE"], cpu["TORCHDYNAMO_DISABLE"], cpu["HF_HUB_OFFLINE"]) == (
        "1",
        "1",
        "1",
    )
    assert int(cpu["OMP_NUM_THREADS"]) >= 1
    assert {"SGLANG_USE_CPU_ENGINE", "OMP_NUM_THREADS"}.isdisjoint(
        server_environment(base, "cuda", "::", PRIVATE)
    )


def test_a_servers_processes_meet_where_nobody_else_comes():
    own = server_environment({"GLOO_SOCKET_IFNAME": "eth0"}, "cpu", "127.0.0.1", PRIVATE)
    assert own["TMPDIR"] == "/private"
    assert own["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "file:///private/store"
    assert own["GLOO_SOCKET_IFNAME"] == own["NCCL_SOCKET_IFNAME"] == "lo"
    others = server_environment({"GLOO_SOCKET_IFNAME": "eth0"}, "cpu", "10.0.0.7", PRIVATE)
    assert others["GLOO_SOCKET_IFNAME"] == "eth0" and "NCCL_SOCKET_IFNAME" not in others


def test_a_server_is_never_asked_through_a_proxy():
    base = {"HTTP_PROXY": "http://proxy:3128", "no_proxy": "example.org"}
    environment = server_environment(base, "cuda", "10.0.0.7", PRIVATE)
    assert environment["HTTP_PROXY"] == "http://proxy:3128"
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost,::1,10.0.0.7"
    assert environment["NO_PROXY"] == "127.0.0.1,localhost,::1,10.0.0.7"


def test_a_servers_key_is_in_a_file_of_its_owners_while_it_starts_and_never_in_its_log(
    model: ServedModel, tmp_path: Path
):
    """SGLang prints its arguments, with the key that it has read; here split over two writes."""
    seen = tmp_path / "seen"
    python = script(
        tmp_path / "python",
        'while [ "$1" != --config ]; do shift; done\n'
        'key=$(sed "s/api-key: .//; s/.$//" "$2"); cp -p "$2" "$(dirname "$2")"/../seen; '
        'stat -c %a "$2" "$(dirname "$2")"; printf "api_key=%.20s" "$key"; sleep 0.3; '
        'echo "${key#????????????????????}|end"; sleep 100\n'.replace('"$(dirname "$2")"/../seen', str(seen)),
    )
    server = ServerProcess(ServerSettings(python=str(python)), model, tmp_path / "log")
    server.start()
    assert wait_until(lambda: "|end" in (tmp_path / "log").read_text(), 10)
    assert (tmp_path / "log").read_text() == "600\n700\napi_key=(hidden)|end\n"
    assert seen.read_text() == f"api-key: '{server.api_key}'\n" and len(server.api_key) == 64
    assert server.pid is not None
    for name in ("cmdline", "environ"):
        assert server.api_key.encode() not in Path(f"/proc/{server.pid}/{name}").read_bytes()
    private = Path(os.environ.get("TMPDIR", "/tmp"))
    environ = Path(f"/proc/{server.pid}/environ").read_bytes().decode().split("\0")
    (own,) = [Path(pair.partition("=")[2]) for pair in environ if pair.startswith("TMPDIR=")]
    assert own.parent == private and own.is_dir()
    server.stop()
    assert not own.exists()


def test_each_server_has_another_key_which_stays_over_restarts(model: ServedModel, tmp_path: Path):
    python = str(script(tmp_path / "python", "sleep 100\n"))
    first, other = (ServerProcess(ServerSettings(python=python), model, tmp_path / "log") for _ in range(2))
    assert first.api_key != other.api_key
    before = first.api_key
    first.start()
    first.stop()
    first.start()
    assert first.api_key == before
    first.stop()


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_secret_is_taken_out_wherever_the_pieces_are_cut(cut: int):
    text = b"a secrets3cret b s3cret\ns3cre s3cs3cret s3"
    redact = Redactor("s3cret")
    said = redact(text[:cut]) + redact(text[cut : cut + 2]) + redact(text[cut + 2 :]) + redact.rest()
    assert said == text.replace(b"s3cret", b"(hidden)")
    assert Redactor("s3cret")(b"nothing of it") == b"nothing of it"  # nothing waits without need


def test_an_interpreter_at_home(model: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    python = script(tmp_path / "python", "echo found\nexit 1\n")
    server = ServerProcess(ServerSettings(python="~/python"), model, tmp_path / "log")
    server.start()
    with pytest.raises(UserError, match="(?s)exit code 1 .*found"):
        server.wait_healthy()
    server.stop()
    assert server_command(ServerSettings(python="~/python"), model, 1, SETTINGS)[0] == str(python)


def test_a_server_that_ends_while_starting_shows_the_end_of_its_log(model: ServedModel, tmp_path: Path):
    python = script(tmp_path / "python", "echo from an earlier start\nexit 1\n")
    server = ServerProcess(ServerSettings(python=str(python)), model, tmp_path / "logs" / "server.log")
    server.start()
    with pytest.raises(UserError, match="earlier"):
        server.wait_healthy()
    server.stop()
    script(python, "seq 100\necho out of memory >&2\nexit 7\n")
    server.start()
    with pytest.raises(UserError) as caught:
        server.wait_healthy()
    server.stop()
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "the SGLang server ended with exit code 7 while starting; "
        f"the end of its log {tmp_path / 'logs' / 'server.log'}:"
    )
    assert lines == [*map(str, range(82, 101)), "out of memory"]


def test_the_last_error_of_the_log_is_named_first(model: ServedModel, tmp_path: Path):
    """SGLang's own is followed by what its processes say of each other's end."""
    error = (
        "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.03."
    )
    log = f"Traceback\\n  File x\\n{error}\\nReceived sigquit from a child process."
    python = script(tmp_path / "python", f'printf "%b\\n" "{log}"\nexit 7\n')
    server = ServerProcess(ServerSettings(python=str(python)), model, tmp_path / "server.log")
    server.start()
    with pytest.raises(UserError) as caught:
        server.wait_healthy()
    server.stop()
    assert str(caught.value).splitlines()[0] == (
        f"the SGLang server ended with exit code 7 while starting: {error} (the setting is server.memory_fraction); "
        f"the end of its log {tmp_path / 'server.log'}:"
    )


def test_a_server_that_never_comes_up_is_given_up(model: ServedModel, tmp_path: Path):
    python = script(tmp_path / "python", "echo loading\nsleep 100\n")
    settings = ServerSettings(python=str(python), start_timeout_s=0.5)
    server = ServerProcess(settings, model, tmp_path / "log")
    server.start()
    with pytest.raises(UserError, match=r"(?s)not up after server.start_timeout_s=0.5 seconds; .*loading"):
        server.wait_healthy()
    assert server.alive()
    server.stop()


def test_stop_ends_children_that_ignore_sigterm(model: ServedModel, tmp_path: Path):
    python = script(tmp_path / "python", "trap '' TERM\nsleep 100 &\nsleep 100 &\nwait\nwait\n")
    server = ServerProcess(ServerSettings(python=str(python)), model, tmp_path / "log")
    server.start()
    pid = server.pid
    assert pid is not None
    assert wait_until(lambda: len(group_members(pid)) == 3, 10)
    server.stop()
    assert group_members(pid) == []
    assert server.pid is None and not server.alive()
    server.stop()  # harmless
    server.start()  # a stopped server can be started again
    assert server.alive()
    server.stop()


PARENT = """
import sys, time
from pathlib import Path
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from tests.small_server import MEMORY
directory, python = Path(sys.argv[1]), sys.argv[2]
model = ServedModel(
    path=directory, dtype="float32", device="cpu", context_length=64, max_responses=2, memory=MEMORY, seed=0
)
server = ServerProcess(ServerSettings(python=python), model, directory / "server.log")
server.start()
print(server.pid, flush=True)
time.sleep(100)
"""


def start_parent(directory: Path, python: Path) -> tuple[subprocess.Popen, int]:
    """A process that starts a server; the server's pid."""
    command = [sys.executable, "-c", PARENT, str(directory), str(python)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def test_the_server_dies_with_its_parent(model: ServedModel, tmp_path: Path):
    parent, server = start_parent(model.path, script(tmp_path / "python", "exec sleep 100\n"))
    assert wait_until(lambda: group_members(server) != [], 10)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: group_members(server) == [], 10)


def test_sglang_dies_with_its_parent_even_while_it_starts(tiny_model, tmp_path: Path):
    """Its children arm their own death signal only after long imports; sglang_on_cpu.py does it at once."""
    python = REPOSITORY / ".venv-sglang/bin/python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make .venv-sglang`")
    parent, server = start_parent(tiny_model(), python)
    try:
        assert wait_until(
            lambda: len(group_members(server)) >= 4, 120
        )  # main, tracker, scheduler, detokenizer
        time.sleep(0.5)  # the children are interpreters that have just begun to import
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    died = wait_until(lambda: group_members(server) == [], 10)
    if not died:
        os.killpg(server, signal.SIGKILL)
    assert died


def test_a_free_port_is_none_that_the_system_hands_out(monkeypatch: pytest.MonkeyPatch):
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert server._first_handed_out() == int(handed_out[0])
    monkeypatch.setattr(server, "_first_handed_out", lambda: 16_000)
    ports = {free_port("127.0.0.1") for _ in range(20)}
    assert len(ports) > 10 and all(15_000 <= port < 16_000 for port in ports)
    taken = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(server, "FIRST_PORT", taken.getsockname()[1])
    monkeypatch.setattr(server, "_first_handed_out", lambda: taken.getsockname()[1] + 1)
    assert free_port("127.0.0.1") != taken.getsockname()[1]  # where none of them is free, any other
    monkeypatch.setattr(server, "_first_handed_out", lambda: 1024)  # where the system hands out nearly all
    assert free_port("127.0.0.1") > 0
    taken.close()
