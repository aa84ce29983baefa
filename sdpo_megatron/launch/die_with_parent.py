"""Runs a command that the kernel kills as soon as the process that started it is gone.

    python die_with_parent.py PARENT_PID COMMAND [ARGUMENT ...]

A script of its own (standard library only; sglang_on_cpu.py imports it too) and not a `preexec_fn`, which is
unsafe once the starting process has threads. The process keeps its id through the exec, and the death signal
survives it. Linux sends the signal when the *thread* that started this script ends: start it from one that lives as
long as the command should.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Has the kernel kill this process as soon as `parent`, which started it, is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # it died before the signal was armed
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
