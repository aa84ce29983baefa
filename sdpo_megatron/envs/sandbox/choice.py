"""Which sandbox this machine has: found out by running a real program under the whole policy."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sdpo_megatron.envs.sandbox.base import Limits, Program, Sandbox, SandboxFault
from sdpo_megatron.envs.sandbox.bubblewrap import Bubblewrap
from sdpo_megatron.envs.sandbox.kept import SYSTEM_PYTHON, Kept, UnsafeSubprocess
from sdpo_megatron.envs.sandbox.sandlock import Sandlock
from sdpo_megatron.envs.sandbox.service import Service
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import UserError

PROBE_LIMITS = Limits(cpu_s=10, wall_s=20, processes=4, output_bytes=4096)
PROBE_FILE, PROBE_INPUT, HELD = "probe/words.txt", b"given\n", "held"
# both say the first thing that is wrong: where the policy let something out, and where ordinary work fails
WORK_PROBE = """
import subprocess, sys, tempfile
if open("probe/words.txt").read() + sys.stdin.read() != "words given\\n": sys.exit(print("files do not arrive"))
tempfile.TemporaryFile().write(b"x")
subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
"""
POLICY_PROBE = """
import os, socket, time
def refused(what, attempt):
    try:
        attempt()
    except OSError:
        return
    sys.exit(print(what, "is not refused"))
refused("the network", lambda: socket.create_connection(("198.51.100.1", 9), 1))
refused("writing to the system", lambda: open("/usr/probe", "w"))
refused("a look at the machine's files", lambda: open(sys.argv[1]))
refused("a foreign process", lambda: os.kill(int(sys.argv[2]), 0))
if os.environ.keys() - {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE"}: sys.exit(print("the environment is not empty"))
children = 0
try:
    for _ in range(8):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        children += 1
except OSError:
    pass
print("held" if 0 < children < 4 else f"{children} children run where 3 may")
"""


@dataclass(frozen=True)
class Backend:
    """How a sandbox of one kind is made, and what a probe asks of it."""

    ways: Callable[[SandboxSettings], Iterator[Callable[[], Sandbox]]]
    """The ways to make one, the better first."""
    install: str
    """What makes it work here."""
    probe: str = WORK_PROBE + POLICY_PROBE
    proven: str = "a probe ran under its whole policy"
    """What it means that the probe passed."""
    by_itself: bool = True
    """Whether `auto` may take it."""


def _ways(kind: type[Kept]) -> Iterator[Callable[[], Sandbox]]:
    """Yields the ways to make one: with this process's Python if its files can be shown, else with the system's."""
    python, library = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    system = os.path.realpath(SYSTEM_PYTHON)
    if python != system and python.startswith(f"{library}/"):
        shown = () if f"{library}/".startswith("/usr/") else (library,)
        yield lambda: kind(python, shown)
    yield kind


def _service(settings: SandboxSettings) -> Iterator[Callable[[], Sandbox]]:
    url = settings.url
    if url is not None:
        yield lambda: Service(url)


BACKENDS: Mapping[str, Backend] = {
    "bubblewrap": Backend(
        lambda _: _ways(Bubblewrap),
        "install the system package bubblewrap (0.8 or newer) and let users make user namespaces",
    ),
    "sandlock": Backend(
        lambda _: _ways(Sandlock),
        "run on a kernel with Landlock (5.13 or newer, switched on) and pip install sandlock",
    ),
    "http": Backend(
        _service,
        "set sandbox.url to a service with SandboxFusion's interface that runs",
        f"{WORK_PROBE}print({HELD!r})",
        "a probe ran there; what it confines is the service's promise",
    ),
    "unsafe_subprocess": Backend(
        lambda _: _ways(UnsafeSubprocess),
        "install Python as /usr/bin/python3",
        f"{WORK_PROBE}print({HELD!r})",
        "it confines nothing; a probe ran",
        by_itself=False,
    ),
}
"""In the order in which `auto` tries them."""


def choose(settings: SandboxSettings, backends: Mapping[str, Backend] = BACKENDS) -> tuple[Sandbox, str]:
    """Returns the sandbox that the settings name, or of `auto` the first that works here, and a line that says which
    and why.

    Raises UserError that says why none works here and what to install.
    """
    auto = settings.backend == "auto"
    names = [name for name, backend in backends.items() if backend.by_itself] if auto else [settings.backend]
    refusals: list[str] = []
    for name in names:
        backend, why_not = backends[name], ""
        for make in backend.ways(settings):
            try:
                sandbox = make()
                why_not = probe(sandbox, backend.probe)
            except SandboxFault as fault:
                why_not = str(fault)
                continue
            if not why_not:
                why = "; ".join([*refusals, backend.proven])
                return sandbox, f"Sandbox: {name}, with {sandbox.python}; {why}."
        if why_not:
            refusals.append(f"{name} does not work here ({why_not})")
    raise UserError(
        f"No sandbox for programs that the model writes: {'; '.join(refusals)}. To have one, "
        f"{', or '.join(backends[name].install for name in names)}."
    )


def probe(sandbox: Sandbox, code: str) -> str:
    """Returns what is wrong with a sandbox on this machine, or nothing. Raises SandboxFault."""
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o644)
        command = ["python", "-I", "-S", "-c", code, file.name, str(os.getpid())]
        outcome = sandbox.run(Program(command, {PROBE_FILE: b"words "}, PROBE_INPUT), PROBE_LIMITS)
    said = outcome.stdout_bytes.decode(errors="replace").strip()
    if outcome.exit_code == 0 and said == HELD:
        return ""
    error = outcome.stderr_bytes.decode(errors="replace").strip().splitlines()
    ended = f"the probe ended with {outcome.limit or outcome.signal or outcome.exit_code}"
    return said or (error[-1] if error else ended)
