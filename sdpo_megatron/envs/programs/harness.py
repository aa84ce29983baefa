"""Tests a program from inside a sandbox: the tests on stdin, what came of each on stdout, both one JSON object.

Three kinds of process keep the program from the tests: this one, which reads them; a nursery, forked before they are
read; and a fork of the nursery for each test. What is expected of printed or returned values is not even here: they are
compared outside. Tests that are code run in this process and reach the program by messages.
"""

import ast
import builtins
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

from sdpo_megatron.envs.programs.messages import Ended, Kept, Pipe, TimeUp, decoded, encoded, write_all
from sdpo_megatron.envs.programs.nursery import Nursery

TEST = "test.py"


def main() -> None:
    orders, reports, calls, answers = (Pipe() for _ in range(4))
    if os.fork() == 0:
        try:
            Nursery(orders, reports, calls, answers).run()
        finally:
            os._exit(0)
    for fd in (orders.read_fd, calls.read_fd, reports.write_fd, answers.write_fd):
        os.close(fd)
    verdict_fd = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print
    work = json.loads(sys.stdin.buffer.read())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _time_is_up)
    verdict = Tester(work, orders, reports, calls, answers).verdict()
    write_all(verdict_fd, json.dumps(verdict).encode())
    os._exit(0)


def _time_is_up(*_: object) -> None:
    raise TimeUp


class Tester:
    """Orders runs of the program and notes what came of them."""

    def __init__(self, work: dict[str, Any], orders: Pipe, reports: Pipe, calls: Pipe, answers: Pipe):
        self.work, self.orders, self.reports, self.calls, self.answers = work, orders, reports, calls, answers
        # a report holds what the program printed, and its result
        self.most_bytes = 16 * work["output_bytes"] + (1 << 16)

    def verdict(self) -> dict[str, Any]:
        """Returns the results of the tests in order: fewer than there are tests where one used up its time, or ended
        the process of the program."""
        keys = ("program", "preamble", "function", "output_bytes")
        try:
            self.orders.send({key: self.work[key] for key in keys})
            told = self.reports.receive(self.most_bytes, time.monotonic() + self.work["wall_s"])
            if "syntax" in told:
                return told
        except TimeUp:
            return {"results": [{"stopped": "time"}]}
        except (Ended, BrokenPipeError):
            return {"results": [{"stopped": "crash"}]}
        results: list[dict[str, Any]] = []
        for case in self.work["cases"]:
            signal.setitimer(signal.ITIMER_REAL, self.work["wall_s"])
            try:
                results.append(self._checked(case) if case["kind"] == "check" else self._ran(case))
            except TimeUp:
                results.append({"stopped": "time"})
            except (Ended, BrokenPipeError):
                results.append({"stopped": "crash"})
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if "stopped" in results[-1] or results[-1].get("over"):
                break
        return {"results": results}

    def _ran(self, order: dict[str, Any]) -> dict[str, Any]:
        self.orders.send(order)
        return self.reports.receive(self.most_bytes)

    def _checked(self, case: dict[str, Any]) -> dict[str, Any]:
        """Runs a test that is code."""
        self.orders.send({"kind": "serve"})
        program = Program(self)
        tree = ast.parse(case["source"])
        names: dict[str, Any] = {"__name__": "test"}
        exec(compile(self.work["preamble"], "given.py", "exec"), names)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        # a set's own programs import what its tests use
        for name in (used - names.keys()) & sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
        for name in self.work["program_names"]:
            names[name] = Function(program, name)
        try:
            exec(compile(tree, TEST, "exec"), names)
        except ProgramEnded as ended:
            return {**ended.report, "over": True}
        except ProgramRaised as raised:
            result: dict[str, Any] = {"error": raised.error}
        except (Exception, SystemExit) as error:
            result = self._failed(error, case["source"], program)
        else:
            result = {"passed": True}
        self.calls.send(None)
        report = self.reports.receive(self.most_bytes)
        return {**report, **result}

    @staticmethod
    def _failed(error: BaseException, source: str, program: "Program") -> dict[str, Any]:
        """Names the statement of the test that failed, and the last answer of the program."""
        if isinstance(getattr(error, "raised", None), ProgramRaised):
            return {"error": error.raised.error}  # type: ignore[attr-defined]
        numbers = [
            frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TEST
        ]
        statement = source
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.stmt)
                and numbers
                and node.lineno <= numbers[-1] <= (node.end_lineno or 0)
            ):
                statement = ast.get_source_segment(source, node) or statement
        said = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return {"failed": statement, "answer": program.last_answer, "said": said}


class ProgramRaised(Exception):
    def __init__(self, error: dict[str, Any]):
        super().__init__(error["line"])
        self.error = error


class ProgramEnded(BaseException):
    """Its process is gone."""

    def __init__(self, report: dict[str, Any]):
        super().__init__()
        self.report = report


class Program:
    """The process of the program, as a test sees it."""

    def __init__(self, tester: Tester):
        self.tester, self.last_answer = tester, ""

    def call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tester = self.tester
        tester.calls.send({"name": name, "arguments": encoded((arguments, named), [])})
        ready = select.select([tester.answers.read_fd, tester.reports.read_fd], [], [])[0]
        if tester.answers.read_fd not in ready:
            raise ProgramEnded(tester.reports.receive(tester.most_bytes))
        answer = tester.answers.receive(tester.most_bytes)
        if "error" in answer:
            # a test may wait for it by its type
            kind = getattr(builtins, str(answer["error"]["type"]), None)
            raised = ProgramRaised(answer["error"])
            if isinstance(kind, type) and issubclass(kind, Exception) and kind is not AssertionError:
                try:
                    error = kind(raised.error["line"])
                    error.raised = raised  # type: ignore[attr-defined]
                except (TypeError, AttributeError):
                    raise raised from None
                raise error
            raise raised
        value = decoded(answer["value"], Kept)
        self.last_answer = repr(value)[:1000]
        return value


class Function:
    """A name of the program, to call."""

    def __init__(self, program: Program, name: str):
        self._program, self._name = program, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.call(self._name, arguments, named)
