"""Which sandbox this machine has: found out by running a real program under the whole policy."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping

from sdpo_megatron.envs.base import look_up
from sdpo_megatron.envs.sandbox.base import Limits, Program, Sandbox, SandboxFault
from sdpo_megatron.envs.sandbox.bubblewrap import SYSTEM_PYTHON, Bubblewrap
from sdpo_megatron.envs.sandbox.sandlock import Sandlock
from sdpo_megatron.errors import UserError

AUTO = "auto"
PROBE_LIMITS = Limits(cpu_s=10, wall_s=20, processes=4, output_bytes=4096)
PROBE_FILE, PROBE_INPUT, HELD = "probe/words.txt", b"given\n", "held"
# it says the first thing that is wrong, whether the policy let something out or ordinary work fails
PROBE = """
import os, socket, subprocess, sys, tempfile, time
def refused(what, attempt):
    try:
        attempt()
    except OSError:
        return
    sys.exit(print(what, "is not refused"))
refused("the network", lambda: socket.create_connection(("198.51.100.1", 9), 1))
refused("writing to the system", lambda: open("/usr/probe", "w"))
refused("a look at home", lambda: os.listdir(sys.argv[1]))
refused("a foreign process", lambda: os.kill(int(sys.argv[2]), 0))
if os.environ.keys() - {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE"}: sys.exit(print("the environment is not empty"))
if open("probe/words.txt").read() + sys.stdin.read() != "words given\\n": sys.exit(print("files do not arrive"))
tempfile.TemporaryFile().write(b"x")
subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
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
INSTALL = {
    "bubblewrap": "install the system package bubblewrap (0.8 or newer) and let users make user namespaces",
    "sandlock": "run on a kernel with Landlock (5.13 or newer, switched on) and pip install sandlock",
}
"""By backend: what makes it work."""


def _ways(kind: type[Bubblewrap] | type[Sandlock]) -> Iterator[Callable[[], Sandbox]]:
    """Yields the ways to make one: with this process's Python if its files can be shown, else with the system's."""
    python, library = os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix)
    system = os.path.realpath(SYSTEM_PYTHON)
    if python != system and python.startswith(f"{library}/"):
        shown = () if f"{library}/".startswith("/usr/") else (library,)
        yield lambda: kind(python, shown)
    yield kind


BACKENDS: Mapping[str, Callable[[], Iterator[Callable[[], Sandbox]]]] = {
    "bubblewrap": lambda: _ways(Bubblewrap),
    "sandlock": lambda: _ways(Sandlock),
}
"""In the order in which `auto` tries them: the ways to make each, the better first."""


def choose(
    backend: str, backends: Mapping[str, Callable[[], Iterator[Callable[[], Sandbox]]]] = BACKENDS
) -> tuple[Sandbox, str]:
    """Returns the sandbox of that name, or of `auto` the first that works here, and a line that says which and why.

    Raises UserError that says why none works here and what to install, and ConfigError for an unknown name.
    """
    names = list(backends)
    if backend != AUTO:
        look_up("sandbox (sandbox.backend)", backend, {AUTO: None, **backends})
        names = [backend]
    refusals: list[str] = []
    for name in names:
        sandbox, why_not = _first_that_works(backends[name]())
        if sandbox is not None:
            why = "; ".join([*refusals, "a probe ran under its whole policy"])
            return sandbox, f"Sandbox: {name}, with {sandbox.python}; {why}."
        refusals.append(f"{name} does not work here ({why_not})")
    advice = " or ".join(INSTALL[name] for name in names if name in INSTALL)
    raise UserError(
        f"No sandbox for programs that the model writes: {'; '.join(refusals)}. To have one, {advice}."
    )


def _first_that_works(ways: Iterator[Callable[[], Sandbox]]) -> tuple[Sandbox | None, str]:
    """Returns the first sandbox that stands the probe, or why the last one did not."""
    why_not = "there is no way to make one"
    for make in ways:
        try:
            sandbox = make()
            why_not = probe(sandbox)
        except SandboxFault as fault:
            why_not = str(fault)
        else:
            if not why_not:
                return sandbox, ""
    return None, why_not


def probe(sandbox: Sandbox) -> str:
    """Returns what is wrong with a sandbox on this machine, or nothing. Raises SandboxFault."""
    command = ["python", "-I", "-S", "-c", PROBE, os.path.expanduser("~"), str(os.getpid())]
    outcome = sandbox.run(Program(command, {PROBE_FILE: b"words "}, PROBE_INPUT), PROBE_LIMITS)
    said = outcome.stdout_bytes.decode(errors="replace").strip()
    if outcome.exit_code == 0 and said == HELD:
        return ""
    error = outcome.stderr_bytes.decode(errors="replace").strip().splitlines()
    ended = f"the probe ended with {outcome.limit or outcome.signal or outcome.exit_code}"
    return said or (error[-1] if error else ended)
