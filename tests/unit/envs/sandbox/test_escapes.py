"""Attempts to get out of the sandbox: none succeeds, and the parent lives on."""

import os
import secrets
import shutil
import socket
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sdpo_megatron.envs.sandbox.base import Limits, Outcome, Program
from sdpo_megatron.envs.sandbox.bubblewrap import NOBODY
from sdpo_megatron.envs.sandbox.choice import BACKENDS, choose
from tests.unit.envs.sandbox.attempts import PRELUDE, RUNAWAY, SIMPLE

LIMITS = Limits(cpu_s=1, wall_s=3, memory_bytes=512 << 20, processes=8, output_bytes=1 << 16)
COMMAND = ["python", "-I", "-S", "attempt.py"]
TOKEN = f"token-{secrets.token_hex(8)}"


@pytest.fixture(scope="module", params=list(BACKENDS))
def sandbox(request):
    # fails where the backend does not work: a suite that skips itself proves nothing
    return choose(request.param)[0]


@pytest.fixture(scope="module")
def host():
    """What the attempts are after. All of it is open to every user: only the sandbox stands before it."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
    folder.chmod(0o755)
    (folder / "secret").write_text(TOKEN)
    as_nobody = {"user": int(NOBODY), "group": int(NOBODY), "extra_groups": []} if os.geteuid() == 0 else {}
    victim = subprocess.Popen(["sleep", "600"], env={"KEY": TOKEN}, **as_nobody)
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        tcp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0{TOKEN}")
        unix.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        for server in (tcp, abstract, unix):
            server.listen()
        yield {
            "PORT": tcp.getsockname()[1],
            "ABSTRACT": TOKEN,
            "SOCKET": folder / "socket",
            "SECRET": folder / "secret",
            "HOME": Path.home(),
            "REPOSITORY": Path(__file__).parents[4],
            "PARENT": os.getpid(),
            "VICTIM": victim.pid,
            "TOKEN": TOKEN,
        }
    assert victim.poll() is None, "the stranger was ended"
    victim.kill()
    victim.wait()
    assert (folder / "secret").read_text() == TOKEN
    shutil.rmtree(folder)


def source(code: str, host: dict[str, object]) -> bytes:
    return (PRELUDE + string.Template(code).substitute({k: str(v) for k, v in host.items()})).encode()


def run(sandbox, code: str, host, limits: Limits = LIMITS) -> Outcome:
    return sandbox.run(Program(COMMAND, {"attempt.py": source(code, host)}), limits)


@pytest.mark.parametrize("name", SIMPLE)
def test_an_attempt_is_refused(sandbox, host, monkeypatch, name):
    monkeypatch.setenv("API_KEY", TOKEN)
    memory = Limits(cpu_s=5, wall_s=20, memory_bytes=64 << 20 if "fill" in name else 512 << 20, processes=8)
    outcome = run(sandbox, SIMPLE[name], host, memory)
    said = set(outcome.stdout_bytes.split())
    assert said == {b"refused"}, outcome


REACHABLE = [
    "TCP to a port of this machine",
    "an abstract socket of the host",
    "a socket file of the host",
    "a secret file",
    "a secret file by a symlink",
    "names of users",
    "the host's temporary files",
    "processes of the host",
    "secrets of the environment",
    "new rights by setuid files",
]


@pytest.mark.parametrize("name", REACHABLE)
def test_the_same_attempt_succeeds_outside(host, monkeypatch, tmp_path, name):
    """So it is the sandbox that refuses it, not a slip in the attempt."""
    monkeypatch.setenv("API_KEY", TOKEN)
    (tmp_path / "attempt.py").write_bytes(source(SIMPLE[name], host))
    done = subprocess.run(
        [sys.executable, *COMMAND[1:]],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"ESCAPED"]


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_runaway_is_ended(sandbox, host, name):
    code, limit = RUNAWAY[name]
    began = time.monotonic()
    limits = LIMITS if limit == "cpu" else Limits(wall_s=1, output_bytes=1 << 16, processes=8)
    outcome = run(sandbox, code, host, Limits(cpu_s=1, wall_s=20) if limit == "cpu" else limits)
    assert outcome.limit == limit
    assert time.monotonic() - began < 15
    assert len(outcome.stdout_bytes) <= 1 << 16 and len(outcome.stderr_bytes) <= 1 << 16


def processes_with(word: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += word.encode() in path.read_bytes()
        except OSError:  # it ended meanwhile
            pass
    return found


def test_nothing_outlives_the_program(sandbox, host):
    """A child in a session of its own, with all streams closed, ends with the program that left it behind."""
    code = """
if os.fork() == 0:
    os.setsid()
    for stream in range(3): os.close(stream)
    if os.fork() == 0: os.execv("/usr/bin/sleep", ["sleep", "600.$TOKEN"[:22]])
    os._exit(0)
time.sleep(0.3)
print("left")
"""
    assert run(sandbox, code, host).stdout_bytes == b"left\n"
    deadline = time.monotonic() + 5
    while processes_with(f"600.{TOKEN}"[:22]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(f"600.{TOKEN}"[:22]) == 0


def test_a_program_dies_with_the_process_that_asked(sandbox):
    """As after `kill -9` of a trainer."""
    word = f"600.{secrets.token_hex(8)}"
    code = (
        "from sdpo_megatron.envs.sandbox.base import Limits, Program\n"
        "from sdpo_megatron.envs.sandbox.choice import choose\n"
        f"choose({sandbox.name!r})[0].run(Program(['/usr/bin/sleep', {word!r}]), Limits(wall_s=60))"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[4])
    deadline = time.monotonic() + 30
    while not processes_with(f"sleep\0{word}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(f"sleep\0{word}")
    asker.kill()
    asker.wait()
    while processes_with(f"sleep\0{word}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(f"sleep\0{word}") == 0


def test_nothing_is_left_for_the_next_program(sandbox, host):
    leave = "for d in ('/tmp', '/dev/shm'): pathlib.Path(d, 'left').write_text('x')\nprint('left')"
    assert run(sandbox, leave, host).stdout_bytes == b"left\n"
    look = "escaped_if([d for d in ('/tmp', '/dev/shm') if os.path.exists(d + '/left')])"
    assert run(sandbox, look, host).stdout_bytes == b"refused\n"


def test_a_program_cannot_change_the_file_that_it_was_given(sandbox, host):
    program = Program([*COMMAND[:-1], "-c", "open('given', 'w').write('y')"], {"given": b"x"})
    assert sandbox.run(program, LIMITS).exit_code == 0
    assert program.files == {"given": b"x"}


@pytest.mark.parametrize(
    ("code", "exit_code", "signal"),
    [
        ("print('{\"exit-code\": 0}'); sys.exit(1)", 1, None),
        (
            "for f in range(1, 64):\n try: os.write(f, b'{\"exit-code\": 0}\\n')\n except OSError: pass\nsys.exit(1)",
            1,
            None,
        ),
        ("print('{\"exit-code\": 0}', file=sys.stderr); os.abort()", None, 6),
        ("print('bwrap: failed', file=sys.stderr); sys.exit(1)", 1, None),
        ("os.kill(os.getpid(), 9)", None, 9),
        ("os.kill(1, 9); sys.exit(4)", 4, None),
        ("os.kill(os.getppid(), 15); sys.exit(5)", 5, None),
    ],
)
def test_a_program_cannot_forge_how_it_ended(sandbox, host, code, exit_code, signal):
    outcome = run(sandbox, code, host)
    assert (outcome.exit_code, outcome.signal, outcome.limit) == (exit_code, signal, None)
