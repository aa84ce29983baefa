"""A bounded number of graders, each a process, and the run's end of them."""

import contextlib
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

from sdpo_megatron.config import GradingSettings, TaskSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.grading.host import receive
from sdpo_megatron.envs.grading.thread import BackgroundThread
from sdpo_megatron.errors import GradingFault
from sdpo_megatron.records import Grade, Problem, Rollout, Ungraded

ATTEMPTS = 3
"""How often a response is given to a grader whose infrastructure fails, or whose process ends."""
PAUSE_S = 0.5
"""Before the second attempt; twice as long before the third."""


class GradingPool:
    """Grades responses, at most so many at a time, each in a process of its own that can be killed."""

    def __init__(self, task: TaskSettings, env: Environment, settings: GradingSettings):
        """`env` is what `task` names."""
        self._slow_grade = env.slow_grade
        self._limit_s = env.grade_limit_s if settings.limit_s is None else settings.limit_s
        size = min(settings.num_workers, env.most_at_once or settings.num_workers)
        self._host = _Host(task)
        self._threads = BackgroundThread("grading", size)
        self._idle: queue.LifoQueue[_Grader] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(_Grader(self._host))

    def start(self) -> None:
        """Starts the process that builds the environment again, so that it is ready when the first response comes;
        unless it is started."""
        self._host.start()

    def submit(self, problem: Problem, rollout: Rollout) -> "Future[Grade | Ungraded]":
        """Returns the grade to come, at once."""
        future: Future[Grade | Ungraded] = Future()
        self._threads.run(lambda: self._graded(problem, rollout), future)
        return future

    def _graded(self, problem: Problem, rollout: Rollout) -> Grade | Ungraded:
        try:
            request = pickle.dumps((problem, rollout))
        # what somebody else's problem holds decides what this raises
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return Ungraded(rollout=rollout, cause=f"the problem cannot be handed to a grader, {said}")
        grader = self._idle.get()
        try:
            answer = self._answer(grader, request)
        finally:
            self._idle.put(grader)
        return answer if isinstance(answer, Grade) else Ungraded(rollout=rollout, cause=answer)

    def _answer(self, grader: "_Grader", request: bytes) -> Grade | str:
        """Returns the grade, or why there is none."""
        cause = ""
        for attempt in range(ATTEMPTS):
            time.sleep(attempt * PAUSE_S)
            try:
                return grader.ask(request, self._limit_s)
            except TimeoutError:
                if self._slow_grade is not None:
                    return self._slow_grade
                return f"the grader was not done within {self._limit_s:g} s (grading.limit_s)"
            except (OSError, GradingFault) as error:
                cause = str(error)
        return cause


@dataclass(frozen=True)
class _Process:
    pid: int
    requests: socket.socket
    control: socket.socket
    """Of the host that it is a child of."""


class _Grader:
    """One grader after another: a new one is forked where the last was killed or has ended."""

    def __init__(self, host: "_Host"):
        self._host = host
        self._process: _Process | None = None

    def ask(self, request: bytes, limit_s: float) -> Grade | str:
        """Returns the grade, or what is wrong with the environment itself. Raises GradingFault where the environment
        does; TimeoutError where it takes longer than that, and OSError where the grader cannot be started or ends: then
        it and what it has started are gone."""
        if self._process is None:
            self._process = self._host.fork()
        process = self._process
        done = False
        try:
            process.requests.settimeout(limit_s)
            process.requests.sendall(request)
            answer = receive(process.requests)
            if answer is None:
                raise OSError("the grader's process ended, or was killed")
            done = True
            if isinstance(answer, GradingFault):
                raise answer
            return answer
        finally:
            if not done:
                self._process = None
                process.requests.close()
                self._host.kill(process)


class _Host:
    """The process that forks graders; a new one is started where it is gone."""

    def __init__(self, task: TaskSettings):
        self._task = task
        self._lock = threading.Lock()
        self._is_ready = False
        self._control: socket.socket | None = None

    def start(self) -> None:
        with self._lock:
            if self._control is None:
                self._start()

    def fork(self) -> _Process:
        """Raises OSError where the host cannot build the environment, or is gone."""
        with self._lock:
            if self._control is None:
                self._start()
            assert self._control is not None
            with self._gone_if_it_fails():
                if not self._is_ready:
                    self._await_ready(self._control)
                ours, theirs = socket.socketpair()
                with theirs:
                    socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
                pid = self._control.recv(64)
                if not pid:
                    raise OSError("the process that starts graders ended, or was killed")
                return _Process(int(pid), ours, self._control)

    def kill(self, process: _Process) -> None:
        """Kills a grader and its group. Where its host is gone it is too, and its id may be a stranger's."""
        with self._lock, contextlib.suppress(OSError), self._gone_if_it_fails():
            if self._control is process.control:
                process.control.send(str(process.pid).encode())
                if not process.control.recv(64):
                    raise OSError

    @contextlib.contextmanager
    def _gone_if_it_fails(self):
        try:
            yield
        except OSError:
            if self._control is not None:
                self._control.close()
            self._control = None
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        module = "sdpo_megatron.envs.grading.host"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        start = {"path": sys.path, "task": self._task.model_dump(mode="json")}
        ours.sendall(pickle.dumps(start))
        self._control, self._is_ready = ours, False

    def _await_ready(self, control: socket.socket) -> None:
        error = receive(control)
        if error is None:
            error = "it ended, or was killed"
        if error:
            raise OSError(f"the process that starts graders could not build the environment: {error}")
        self._is_ready = True
