"""The process that builds an environment a second time and forks the processes that grade with it.

    python -m sdpo_megatron.envs.grading.host SOCKET PARENT_PID

It has one thread, so that it can fork at any time, and a fork shares with it what the environment has read and what
`warm_up` has imported: a grader that was killed is replaced within milliseconds. SOCKET is its end of a pair of Unix
sockets; it ends when the other end is closed or its parent dies, and its forks end with it.
"""

import contextlib
import ctypes
import math
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from types import NoneType
from typing import Any, NoReturn, SupportsFloat

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs import Environment, build_environment
from sdpo_megatron.errors import GradingFault, quoted
from sdpo_megatron.records import Grade, Problem, Rollout

_PR_SET_PDEATHSIG = 1
_forked: set[int] = set()
"""The graders of this host that were not killed; those that have ended stay here, and their ids their own."""


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    # the graders would die with this process, but not what they have started
    signal.signal(signal.SIGUSR1, lambda *_: end_with_all())
    end_with_parent(int(sys.argv[2]), signal.SIGUSR1)
    # a stop is the run's matter: what it asked for is still graded; a handler, unlike SIG_IGN, ends at an exec
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    start = receive(control)
    if start is None:
        return
    sys.path[:] = start["path"]
    try:
        env = build_environment(TaskSettings.model_validate(start["task"]))
        env.warm_up()
    except BaseException as error:
        control.sendall(pickle.dumps(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    # the run may have ended meanwhile
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.sendall(pickle.dumps(""))
        serve(control, env)
    end_with_all()


def serve(control: socket.socket, env: Environment) -> None:
    """Forks a grader for each socket that it is sent, and answers with its process id; kills those it is sent."""
    killed: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            end_with_all()
        if message != b"fork":
            # its group: what it has started ends with it
            os.killpg(int(message), signal.SIGKILL)
            _forked.discard(int(message))
            killed.add(int(message))
            control.send(b"killed")
        # only those: the id of any other that has ended stays its own until it is killed
        killed -= {pid for pid in killed if os.waitpid(pid, os.WNOHANG)[0]}
        if message != b"fork":
            continue
        host = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            control.close()
            become_grader(socket.socket(fileno=descriptors[0]), env, host)
        # here and in the child: whoever comes first
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _forked.add(pid)
        os.close(descriptors[0])
        control.send(str(pid).encode())


def become_grader(requests: socket.socket, env: Environment, host: int) -> None:
    """Grades what it is sent until the other end is closed; does not return."""
    try:
        os.setpgid(0, 0)
        end_with_parent(host, signal.SIGKILL)
        while request := receive(requests):
            requests.sendall(pickle.dumps(graded(env, *request)))
    finally:
        # whatever it is, nothing above this frame is the fork's
        os._exit(0)


def receive(source: socket.socket) -> Any:
    """Returns what the other end sent, a pickle; None where that end was closed. Raises TimeoutError where the socket
    has a timeout in which nothing comes. One waits for an answer before it sends more, so that nothing is read ahead.
    """
    with source.makefile("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
        return pickle.load(file)


def graded(env: Environment, problem: Problem, rollout: Rollout) -> Grade | GradingFault | str:
    """Returns the grade, a fault of the infrastructure, after which it is tried again, or what is wrong with the
    environment itself."""
    try:
        grade = env.grade(problem, rollout)
        if wrong := what_is_wrong(grade):
            return wrong
        clean = replace(
            grade,
            reward=float(grade.reward),
            feedback=encodable(grade.feedback),
            answer=None if grade.answer is None else encodable(grade.answer),
            metrics={encodable(key): float(value) for key, value in grade.metrics.items()},
        )
        pickle.dumps(clean)
        return clean
    except GradingFault as fault:
        return GradingFault(encodable(str(fault)) or "a GradingFault without a message")
    # a grader of somebody else's may raise anything
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        return encodable(f"the grader raised {type(error).__name__}: {error}{where}")


def what_is_wrong(grade: Any) -> str:
    """Returns in a line why this is no grade; empty for one."""
    if not isinstance(grade, Grade):
        return f"the environment returned {type(grade).__name__} and no Grade"
    kinds = {
        "reward": (int, float),
        "feedback": str,
        "correct_format": bool,
        "answer": (str, NoneType),
        "metrics": Mapping,
    }
    for name, kind in kinds.items():
        value = getattr(grade, name)
        # numbers of numpy and torch are numbers too
        if not isinstance(value, kind) and not (name == "reward" and isinstance(value, SupportsFloat)):
            return f"the environment gave a Grade whose {name} is {quoted(value)} ({type(value).__name__})"
    reward = float(grade.reward)
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        return f"the environment gave the reward {reward:g}; rewards are numbers in [0, 1]"
    return ""


def encodable(text: str) -> str:
    """Returns the text with escapes in place of halves of characters (surrogates), which neither a tokenizer nor a file
    takes; programs of the model may print them."""
    return text.encode("utf-8", "backslashreplace").decode()


def end_with_all() -> NoReturn:
    """Ends this process, its graders and whatever those have started and left in their groups."""
    for pid in _forked:
        # it may have ended before it made its group
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Has the kernel send this process a signal when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, by) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # it died before the signal was armed
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
