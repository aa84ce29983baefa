"""The sandbox without namespaces: sandlock, by Landlock and seccomp, for machines that forbid user namespaces."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from sdpo_megatron.envs.sandbox.base import Limits, Program, SandboxFault
from sdpo_megatron.envs.sandbox.bubblewrap import SYSTEM
from sdpo_megatron.envs.sandbox.kept import SYSTEM_PYTHON, Kept
from sdpo_megatron.envs.sandbox.seccomp import SIGNAL_OWNERS, SOCKETS, compiled

SIGNAL_SCOPE_ABI = 6
"""The Landlock version from which on the kernel itself keeps signals inside."""
OTHERS = [
    "prlimit64",
    "setpriority",
    "ioprio_set",
    "sched_setaffinity",
    "sched_setscheduler",
    "sched_setparam",
    "sched_setattr",
    "process_madvise",
    "migrate_pages",
    "move_pages",
    "pidfd_open",
    "kcmp",
    "pidfd_getfd",
]
"""Calls by which a program could slow or limit other processes of its user: Landlock knows nothing of them."""
SIGNALS = ["kill", "tkill", "tgkill", "pidfd_send_signal", "rt_sigqueueinfo", "rt_tgsigqueueinfo"]


class Sandlock(Kept):
    """Runs each program where Landlock and seccomp leave it the system's read-only files, a directory of its own, and
    no network. Which file it may read, it may also show; /usr should hold no secret."""

    name: ClassVar[str] = "sandlock"
    confined_by = "sandlock"

    def __init__(
        self, python: str = SYSTEM_PYTHON, shown: Sequence[str] = (), kernel_keeps_signals: bool | None = None
    ):
        """`python` and `shown` as of Kept. `kernel_keeps_signals` is whether Landlock keeps signals inside; by default
        the kernel is asked. Raises SandboxFault where sandlock is not installed or the kernel has no Landlock."""
        super().__init__(python, shown)
        if importlib.util.find_spec("sandlock") is None:
            raise SandboxFault("the Python package sandlock is not installed")
        import sandlock

        abi = sandlock.landlock_abi_version()
        if abi < 1:
            raise SandboxFault("this kernel has no Landlock, or it is switched off")
        if kernel_keeps_signals is None:
            kernel_keeps_signals = abi >= SIGNAL_SCOPE_ABI
        readable = [path for path in (*SYSTEM, *shown) if os.path.exists(path)]
        confinement: dict[str, Any] = {
            "fs_readable": [*readable, "/dev/zero", "/dev/urandom"],
            "extra_deny_syscalls": [*OTHERS, *([] if kernel_keeps_signals else SIGNALS)],
        }
        if not kernel_keeps_signals:
            scopes = sandlock.Protection.SIGNAL_SCOPE, sandlock.Protection.ABSTRACT_UNIX_SOCKET_SCOPE
            confinement["disable"] = [int(scope) for scope in scopes]
        refused = [*SOCKETS, *SIGNAL_OWNERS, "mq_open"]
        self.policy = {"sandlock": confinement, "filter": compiled(refused)}

    def _request(self, program: Program, limits: Limits) -> dict[str, Any]:
        return super()._request(program, limits) | {"policy": self.policy}
