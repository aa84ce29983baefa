"""Attempts to get out of the sandbox: none succeeds, and the parent lives on."""

import functools
import os
import secrets
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from sdpo_megatron.envs.sandbox import kept
from sdpo_megatron.envs.sandbox.base import Limits, Outcome, Program, Sandbox
from sdpo_megatron.envs.sandbox.bubblewrap import NOBODY
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.sandlock import Sandlock
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from tests.unit.envs.sandbox.attempts import PRELUDE, RUNAWAY, SIMPLE

LIMITS = Limits(cpu_s=1, wall_s=3, memory_bytes=512 << 20, processes=8, output_bytes=1 << 16)
COMMAND = ["python", "-I", "-S", "attempt.py"]
TOKEN = f"token-{secrets.token_hex(8)}"


REPOSITORY = Path(__file__).parents[4]
OLD = "sandlock on an older kernel"
"""One whose Landlock does not keep signals inside."""
BOXES = ["bubblewrap", "sandlock", OLD]
AT_ONCE = 4
MAY_BECOME_ANOTHER = kept.another_user() != 0


def made(box: str) -> Sandbox:
    # fails where the backend does not work: a suite that skips itself proves nothing
    return (
        Sandlock(kernel_keeps_signals=False)
        if box == OLD
        else choose(SandboxSettings.model_validate({"backend": box}))[0]
    )


@pytest.fixture(scope="module", params=BOXES)
def box(request):
    return request.param


@pytest.fixture(scope="module")
def sandbox(box):
    return made(box)


@pytest.fixture(scope="module")
def host():
    """What the attempts are after. All of it is open to every user: only the sandbox stands before it."""
    folder = Path(tempfile.mkdtemp(prefix="host-"))
    folder.chmod(0o755)
    (folder / "secret").write_text(TOKEN)
    as_nobody = {"user": int(NOBODY), "group": int(NOBODY), "extra_groups": []} if MAY_BECOME_ANOTHER else {}
    victim = subprocess.Popen(["sleep", "600"], env={"KEY": TOKEN}, **as_nobody)
    seen = as_seen(victim.pid)
    with (
        socket.socket() as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as unix,
        pytest.MonkeyPatch.context() as patch,
    ):
        tcp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0{TOKEN}")
        datagrams.bind(f"\0{TOKEN}-datagrams")
        unix.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        for server in (tcp, abstract, unix):
            server.listen()
        patch.setenv("API_KEY", TOKEN)
        yield {
            "PORT": tcp.getsockname()[1],
            "ABSTRACT": TOKEN,
            "SOCKET": folder / "socket",
            "SECRET": folder / "secret",
            "HOME": Path.home(),
            "REPOSITORY": REPOSITORY,
            "PARENT": os.getpid(),
            "VICTIM": victim.pid,
            "TOKEN": TOKEN,
        }
    assert victim.poll() is None, "the stranger was ended"
    assert as_seen(victim.pid) == seen
    victim.kill()
    victim.wait()
    assert (folder / "secret").read_text() == TOKEN
    shutil.rmtree(folder)


def as_seen(victim: int) -> list[object]:
    """What an attempt could have changed without a word."""
    process = psutil.Process(victim)
    left = [
        line for kind in ("shm", "msg") for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
    ]
    return [
        process.nice(),
        process.ionice(),
        process.cpu_affinity(),
        os.sched_getscheduler(victim),
        psutil.Process().nice(),
        Path(f"/proc/{victim}/limits").read_text(),
        [line for line in left if line.split()[0] == "77"],
    ]


@pytest.fixture(scope="module")
def outcomes(box, sandbox, host):
    """All attempts, by name, some at one time: alone they would take minutes."""
    by_name = {}
    with pytest.MonkeyPatch.context() as patch:
        # root's programs get a user of their own; what is after a stranger is to be of the stranger's
        if MAY_BECOME_ANOTHER:
            patch.setattr(kept, "another_user", lambda: int(NOBODY))
        kin = made(box)
        for name, code in SIMPLE.items():
            if "VICTIM" in code or "all" in name:
                by_name[name] = functools.partial(lambda outcome: outcome, run(kin, code, host))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, code in SIMPLE.items():
            if name not in by_name:
                by_name[name] = pool.submit(run, sandbox, code, host, simple_limits(name)).result
        for name, (code, limit) in RUNAWAY.items():
            by_name[name] = pool.submit(run, sandbox, code, host, runaway_limits(limit)).result
        yield by_name


def simple_limits(name: str) -> Limits:
    return Limits(cpu_s=5, wall_s=20, memory_bytes=64 << 20 if "fill" in name else 512 << 20, processes=8)


def runaway_limits(limit: str) -> Limits:
    if limit == "cpu":
        return Limits(cpu_s=1, wall_s=20)
    if limit == "disk":
        return Limits(wall_s=20, memory_bytes=64 << 20)
    return Limits(wall_s=1.5 if limit == "wall" else 20, output_bytes=1 << 16, processes=8)


def source(code: str, host: dict[str, object]) -> bytes:
    return (PRELUDE + string.Template(code).substitute({k: str(v) for k, v in host.items()})).encode()


def run(sandbox, code: str, host, limits: Limits = LIMITS) -> Outcome:
    return sandbox.run(Program(COMMAND, {"attempt.py": source(code, host)}), limits)


@pytest.mark.parametrize("name", SIMPLE)
def test_an_attempt_is_refused(outcomes, name):
    outcome = outcomes[name]()
    if outcome.signal != signal.SIGSYS:  # the kernel's answer to a call that a filter does not even refuse
        assert set(outcome.stdout_bytes.split()) == {b"refused"}, outcome


REACHABLE = [
    "TCP to a port of this machine",
    "an abstract socket of the host",
    "a datagram to an abstract socket",
    "a message to an abstract socket",
    "a socket file of the host",
    "a secret file",
    "a secret file by a symlink",
    "names of users",
    "the host's temporary files",
    "processes of the host",
    "secrets of the environment",
    "new rights by setuid files",
    "files of what started it",
]


@pytest.mark.parametrize("name", REACHABLE)
def test_the_same_attempt_succeeds_outside(host, tmp_path, name):
    """So it is the sandbox that refuses it, not a slip in the attempt."""
    (tmp_path / "attempt.py").write_bytes(source(SIMPLE[name], host))
    done = subprocess.run(
        [sys.executable, *COMMAND[1:]],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"ESCAPED"]


REFUSED_AT_ONCE = {("bubblewrap", "filling the disk"), (OLD, "stopping itself")}
"""What needs no limit there: the call fails, and with it the program."""


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_runaway_is_ended(outcomes, box, name):
    outcome = outcomes[name]()
    if (box, name) in REFUSED_AT_ONCE:
        assert (outcome.exit_code, outcome.limit) == (1, None) and b"OSError" in outcome.stderr_bytes.replace(
            b"PermissionError", b"OSError"
        )
    else:
        assert outcome.limit == RUNAWAY[name][1]
    assert outcome.wall_s < 15
    assert len(outcome.stdout_bytes) <= 1 << 20 and len(outcome.stderr_bytes) <= 1 << 20


def a_long_time() -> str:
    """For `sleep`: seconds by which its process is found."""
    return f"600.{secrets.randbelow(10**9):09}"


def processes_with(word: str, program: str = "") -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            found += word in words and words[0].startswith(program)
        except OSError:  # it ended meanwhile
            pass
    return found


def test_nothing_outlives_the_program(sandbox, host):
    """A child in a session of its own, with all streams closed, ends with the program that left it behind."""
    word = a_long_time()
    code = f"""
if os.fork() == 0:
    host_looks(os.setsid)
    for stream in range(3): os.close(stream)
    if os.fork() == 0: os.execv("/usr/bin/sleep", ["sleep", "{word}"])
    os._exit(0)
time.sleep(0.3)
print("left")
"""
    assert run(sandbox, code, host).stdout_bytes == b"left\n"
    deadline = time.monotonic() + 5
    while processes_with(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(word) == 0


def test_a_program_dies_with_the_process_that_asked(sandbox):
    """As after `kill -9` of a trainer."""
    word = a_long_time()
    code = (
        "from sdpo_megatron.envs.sandbox.base import Limits, Program\n"
        "from sdpo_megatron.envs.sandbox.choice import choose\n"
        "from sdpo_megatron.envs.sandbox.settings import SandboxSettings\n"
        f"sandbox = choose(SandboxSettings(backend={sandbox.name!r}))[0]\n"
        f"sandbox.run(Program(['/usr/bin/sleep', {word!r}]), Limits(wall_s=60))"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    began = False
    while not began and time.monotonic() < deadline:
        time.sleep(0.05)
        began = processes_with(word, "/usr/bin/sleep") > 0
    assert began
    asker.kill()
    asker.wait()
    while processes_with(word) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(word) == 0


def test_nothing_is_left_for_the_next_program(sandbox, host):
    leave = """
pathlib.Path('deep/er').mkdir(parents=True)
pathlib.Path('deep/er/left').write_text('x')
for d in ('.', '/tmp', '/dev/shm'):
    host_looks(lambda: pathlib.Path(d, 'left').write_text('x'))
os.chmod('deep', 0)
"""
    assert run(sandbox, leave, host).exit_code == 0
    look = "escaped_if(lambda: [d for d in ('.', '/tmp', '/dev/shm') if os.path.exists(d + '/left')])"
    assert run(sandbox, look, host).stdout_bytes == b"refused\n"


def test_a_program_cannot_change_the_file_that_it_was_given(sandbox, host):
    program = Program([*COMMAND[:-1], "-c", "open('given', 'w').write('y')"], {"given": b"x"})
    assert sandbox.run(program, LIMITS).exit_code == 0
    assert program.files == {"given": b"x"}


@pytest.mark.parametrize(
    ("code", "exit_code", "ended_by"),
    [
        ("print('{\"exit-code\": 0}'); sys.exit(1)", 1, None),
        (
            "for f in range(1, 64):\n try: os.write(f, b'{\"exit-code\": 0}\\n')\n except OSError: pass\nsys.exit(1)",
            1,
            None,
        ),
        ('print(\'{"exit-code": 0, "status": 0}\', file=sys.stderr); sys.exit(1)', 1, None),
        ("print('bwrap: failed', file=sys.stderr); sys.exit(1)", 1, None),
        ("libc.abort()", None, {6, 11}),
        ("ctypes.string_at(1)", None, 11),
        ("host_looks(lambda: os.kill(1, 9)); sys.exit(4)", 4, None),
        ("host_looks(lambda: os.kill(os.getppid(), 15)); sys.exit(5)", 5, None),
    ],
)
def test_a_program_cannot_forge_how_it_ended(sandbox, host, code, exit_code, ended_by):
    outcome = run(sandbox, code, host)
    assert (outcome.exit_code, outcome.limit) == (exit_code, None)
    # without the right to send itself a signal a program that aborts crashes
    assert outcome.signal in ended_by if isinstance(ended_by, set) else outcome.signal == ended_by


def test_where_user_namespaces_are_forbidden_sandlock_holds():
    """As on a node that forbids them: bubblewrap is refused, and sandlock taken and attacked in the same way."""
    forbidden = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        "echo 0 > /proc/sys/user/max_user_namespaces; "
        'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"',
        "sh",
    ]
    code = (
        "from sdpo_megatron.envs.sandbox.choice import choose\n"
        "from sdpo_megatron.envs.sandbox.settings import SandboxSettings\n"
        "print(choose(SandboxSettings())[1])"
    )
    said = subprocess.run(
        [*forbidden, sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert said.stdout.startswith("Sandbox: sandlock, with "), said
    assert "bubblewrap does not work here" in said.stdout and "namespace" in said.stdout
    # the kernel counts no threads of the machine's root, whom the other rights are taken from there
    chosen = "sandlock and not older and not forbidden" + (" and not small" if os.geteuid() == 0 else "")
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(
        [*forbidden, sys.executable, *suite], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 90
