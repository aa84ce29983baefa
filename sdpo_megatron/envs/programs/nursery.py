"""Where a program runs inside the sandbox: in a fork of its own for each test, with that test's input alone."""

import builtins
import json
import os
import signal
import sys
import traceback
from types import CodeType
from typing import Any, NoReturn

from sdpo_megatron.envs.programs.messages import Ended, Pipe, decoded, encoded, write_all

SOLUTION, GIVEN = "solution.py", "given.py"
FRAMES = 3
LONGEST_LINE = 1000
KEPT_CHARACTERS = 4096
"""Of what a function prints besides."""
RESULT_FD, CALLS_FD, ANSWERS_FD = 60, 61, 62
"""What a program has open besides its streams."""
STOPPED: dict[int, str] = {signal.SIGXCPU: "time", signal.SIGKILL: "time", signal.SIGXFSZ: "output"}


class Nursery:
    """Forked before the tests are read, so that no fork of it holds them."""

    def __init__(self, orders: Pipe, reports: Pipe, calls: Pipe, answers: Pipe):
        self.orders, self.reports, self.calls, self.answers = orders, reports, calls, answers

    def run(self) -> None:
        """Compiles the program, then runs it once for each order, until there is no more."""
        for fd in range(3):  # the tests, and where the verdict goes
            os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        for fd in (self.orders.write_fd, self.calls.write_fd, self.reports.read_fd, self.answers.read_fd):
            os.close(fd)
        self.work = self.orders.receive()
        program = self.work["program"]
        try:
            code = compile(program, SOLUTION, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            lines, number = program.splitlines(), getattr(error, "lineno", None)
            shown = lines[number - 1].strip() if number and number <= len(lines) else ""
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            where = f" (line {number})" if number else ""
            self.reports.send({"syntax": f"{type(error).__name__}: {message}{where}", "shown": shown})
            return
        self.reports.send({})
        while True:
            try:
                order = self.orders.receive()
            except Ended:
                return
            self.reports.send(self._one_run(order, code))

    def _one_run(self, order: dict[str, Any], code: CodeType) -> dict[str, Any]:
        most_bytes = self.work["output_bytes"]
        stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
        write_all(stdin, order.get("stdin", "").encode(errors="replace"))
        os.lseek(stdin, 0, os.SEEK_SET)
        result_read, result_write = os.pipe()
        child = os.fork()
        if child == 0:
            self._become_program(order, code, {0: stdin, 1: stdout, 2: stdout, RESULT_FD: result_write})
        os.close(result_write)
        result = bytearray()
        while chunk := os.read(result_read, 1 << 16):
            result += chunk[: most_bytes + 1 - len(result)]
        _, status = os.waitpid(child, 0)
        printed_bytes = os.fstat(stdout).st_size
        printed = os.pread(stdout, min(printed_bytes, most_bytes), 0).decode(errors="replace")
        for fd in (stdin, stdout, result_read):
            os.close(fd)
        try:
            report = json.loads(result) if result else {}
        except (ValueError, RecursionError):
            report = {}
        if not isinstance(report, dict):  # the program wrote there too
            report = {}
        report["printed"] = printed[: order.get("keep", KEPT_CHARACTERS)]
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            report["stopped"] = STOPPED.get(
                number, signal.Signals(number).name if number < 32 else str(number)
            )
        if max(printed_bytes, len(result)) > most_bytes:
            report["stopped"] = "output"
        return report

    def _become_program(self, order: dict[str, Any], code: CodeType, fds: dict[int, int]) -> NoReturn:
        kind, result = order["kind"], {}
        try:
            if kind == "serve":
                fds = {**fds, CALLS_FD: self.calls.read_fd, ANSWERS_FD: self.answers.write_fd}
            for target, fd in fds.items():
                os.dup2(fd, target)
            for fd in range(3, max(fds.values()) + 1):
                if fd not in fds:
                    try:
                        os.close(fd)
                    except OSError:  # it was not open
                        continue
            self.calls.read_fd, self.answers.write_fd = CALLS_FD, ANSWERS_FD
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            names: dict[str, Any] = {"__name__": "__main__" if kind == "stdin" else "solution"}
            names["__builtins__"] = builtins
            exec(compile(self.work["preamble"], GIVEN, "exec", dont_inherit=True), names)
            exec(code, names)
            if kind == "call":
                result["value"] = encoded(self._function(names)(*order["arguments"]), [])
            elif kind == "serve":
                self._serve(names)
        except BaseException as error:
            if kind != "stdin" or not isinstance(error, SystemExit):
                result["error"] = self._explained(error)
        try:
            sys.stdout.flush()
        except BaseException as error:
            result.setdefault("error", self._explained(error))
        write_all(RESULT_FD, json.dumps(result).encode())
        os._exit(0)

    def _serve(self, names: dict[str, Any]) -> None:
        """Answers the calls of a test that is code, until it has no more."""
        kept: list[Any] = []
        while (call := self.calls.receive()) is not None:
            try:
                if call["name"] not in names:
                    raise NameError(f"name {call['name']!r} is not defined")
                arguments, named = decoded(call["arguments"], lambda place, _: kept[place])
                self.answers.send({"value": encoded(names[call["name"]](*arguments, **named), kept)})
            except (Exception, SystemExit) as error:
                self.answers.send({"error": self._explained(error)})

    def _function(self, names: dict[str, Any]) -> Any:
        name = self.work["function"]
        if name not in names and hasattr(names.get("Solution"), name):
            return getattr(names["Solution"](), name)
        if name not in names:
            raise NameError(f"name {name!r} is not defined")
        return names[name]

    def _explained(self, error: BaseException) -> dict[str, Any]:
        """The exception in a line, and the program's own last frames: number, function, source."""
        lines = self.work["program"].splitlines()
        frames = [
            [number, frame.name, lines[number - 1].strip() if 0 < number <= len(lines) else ""]
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == SOLUTION and (number := frame.lineno or 0)
        ]
        kind = type(error).__name__
        return {"type": kind, "line": f"{kind}: {error}"[:LONGEST_LINE], "frames": frames[-FRAMES:]}
