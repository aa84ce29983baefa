"""The process that builds an environment a second time and forks the processes that grade with it.

    python -m sdpo_megatron.envs.grading.host SOCKET PARENT_PID

It has one thread, so that it can fork at any time, and a fork shares with it what the environment has read and what
`warm_up` has imported: a grader that was killed is replaced within milliseconds. SOCKET is its end of a pair of Unix
sockets; it ends when the other end is closed or its parent dies, and its forks end with it.
"""

import contextlib
import ctypes
import json
import math
import os
import pickle
import signal
import socket
import sys
from dataclasses import replace

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs import Environment, build_environment
from sdpo_megatron.envs.grading.wire import Answer, receive, send
from sdpo_megatron.errors import GradingFault
from sdpo_megatron.records import Grade, Problem, Rollout

_PR_SET_PDEATHSIG = 1


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(int(sys.argv[2]))
    # a stop is the run's matter: what it asked for is still graded; a handler, unlike SIG_IGN, ends at an exec
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    start = json.loads(receive(control) or b"{}")
    sys.path[:] = start["path"]
    try:
        env = build_environment(TaskSettings.model_validate(start["task"]))
        env.warm_up()
    except BaseException as error:
        send(control, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise SystemExit(1) from None
    send(control, json.dumps({"error": ""}).encode())
    serve(control, env)


def serve(control: socket.socket, env: Environment) -> None:
    """Forks a grader for each socket that it is sent, and answers with its process id; kills those it is sent."""
    killed: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if message != b"fork":
            # its group: what it has started ends with it
            os.killpg(int(message), signal.SIGKILL)
            killed.add(int(message))
            control.send(b"killed")
        # only those: the id of any other that has ended stays its own until it is killed
        killed -= {pid for pid in killed if os.waitpid(pid, os.WNOHANG)[0]}
        if message != b"fork":
            continue
        host = os.getpid()
        pid = os.fork()
        if pid == 0:
            control.close()
            become_grader(socket.socket(fileno=descriptors[0]), env, host)
        # here and in the child: whoever comes first
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        os.close(descriptors[0])
        control.send(str(pid).encode())


def become_grader(requests: socket.socket, env: Environment, host: int) -> None:
    """Grades what it is sent until the other end is closed; does not return."""
    try:
        os.setpgid(0, 0)
        end_with_parent(host)
        while request := receive(requests):
            send(requests, pickle.dumps(graded(env, *pickle.loads(request))))
    finally:
        # whatever it is, nothing above this frame is the fork's
        os._exit(0)


def graded(env: Environment, problem: Problem, rollout: Rollout) -> Answer:
    """Returns the grade, or what is wrong with the grader."""
    try:
        grade = env.grade(problem, rollout)
        if not isinstance(grade, Grade):
            return Answer(raised=f"the environment returned {type(grade).__name__} and no Grade")
        reward = float(grade.reward)
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            return Answer(raised=f"the environment gave the reward {reward:g}; rewards are numbers in [0, 1]")
        grade = replace(grade, reward=reward, metrics={k: float(v) for k, v in grade.metrics.items()})
        pickle.dumps(grade)
        return Answer(grade=grade)
    except GradingFault as fault:
        return Answer(fault=str(fault) or "a GradingFault without a message")
    # a grader of somebody else's may raise anything
    except BaseException as error:
        return Answer(raised=f"the grader raised {type(error).__name__}: {error}")


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # it died before the signal was armed
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
