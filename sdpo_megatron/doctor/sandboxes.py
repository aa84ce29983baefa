"""Which sandbox programs of the model would run in, and what the kernel offers for one."""

import importlib.util
import sys

from sdpo_megatron.doctor.asking import ask
from sdpo_megatron.doctor.findings import Finding, ok, warning
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from sdpo_megatron.errors import UserError

NAME = "sandbox"
ASK_LIMIT_S = 5.0
MAKE_USER_NAMESPACE = """
import ctypes, os, sys
CLONE_NEWUSER = 0x10000000
libc = ctypes.CDLL(None, use_errno=True)
sys.exit(os.strerror(ctypes.get_errno()) if libc.unshare(CLONE_NEWUSER) else 0)
"""


def sandbox() -> list[Finding]:
    """Only tasks that run programs of the model need one, so that none is a warning."""
    namespaces, level = user_namespaces(), landlock_level()
    kernel = f"user namespaces: {namespaces}; Landlock: {level}"
    figures = {"user_namespaces": namespaces, "landlock": level}
    try:
        chosen, why = choose(SandboxSettings())
    except UserError as error:
        refused, _, install = str(error).partition(". To have one, ")
        todo = f"for tasks that run programs (python_tests), {install or 'see the README on sandboxes'}"
        return [warning(NAME, f"{refused}; {kernel}", todo, **figures)]
    said = why.removeprefix("Sandbox: ").removesuffix(".")
    return [ok(NAME, f"{said}; {kernel}", sandbox=chosen.name, **figures)]


def user_namespaces() -> str:
    """Returns whether a user may make one. Another process tries: there is no way back."""
    answer = ask([sys.executable, "-I", "-S", "-c", MAKE_USER_NAMESPACE], ASK_LIMIT_S)
    return "yes" if answer.exit_code == 0 else f"no ({answer.last_error or 'no answer'})"


def landlock_level() -> str:
    """Returns the version of the kernel's Landlock."""
    if importlib.util.find_spec("sandlock") is None:
        return "not known (sandlock is not installed)"
    import sandlock

    level = sandlock.landlock_abi_version()
    return f"version {level}" if level >= 1 else "none"
