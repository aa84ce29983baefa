"""A job outlives the process that makes its attempt; programs take the place of that process."""

import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

KEEPS = """import sys; from sdpo_megatron.job import keeper, run
run.after_loss = lambda arguments, reason: print(f"{' '.join(arguments)}: {reason}") or 5
keeper.PYTHON = sys.argv[1]
sys.exit(keeper.keep(["--local", "runs/x"]))"""
HEARS = """import signal, sys
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
print(*sys.argv[1:], flush=True); signal.pause()
"""
DEAF = HEARS.replace("lambda *_: sys.exit(7)", "signal.SIG_DFL")


def executable(path: Path, program: str) -> Path:
    path.with_suffix(".py").write_text(program)
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$0.py" "$@"\n')
    path.chmod(stat.S_IRWXU)
    return path


@pytest.mark.parametrize(
    ("program", "number", "code", "said"),
    [
        (HEARS, signal.SIGUSR2, 7, ""),
        # it had no ear yet for what was to stop it
        (DEAF, signal.SIGUSR2, 128 + signal.SIGUSR2, ""),
        (HEARS, signal.SIGKILL, 5, "--local runs/x: the job's own process was ended by SIGKILL\n"),
    ],
)
def test_what_becomes_of_the_process_that_makes_an_attempt(
    tmp_path: Path, program: str, number: int, code: int, said: str
):
    path = executable(tmp_path / "python", program)
    with subprocess.Popen(
        [sys.executable, "-c", KEEPS, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "-m sdpo_megatron.job.run --local runs/x\n"
        if number == signal.SIGKILL:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (child,) = map(int, children)
            subprocess.run(["kill", "-KILL", str(child)], check=True)
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, said)


def test_a_signal_that_comes_before_there_is_anybody_to_hear_it_is_handed_on(tmp_path: Path):
    path = executable(tmp_path / "python", HEARS.replace("signal.pause()", "signal.sigtimedwait((), 30)"))
    # what starts a process takes a signal of its own first, and a moment until there is an ear for it
    early = """import os, signal, subprocess, time
class Popen(subprocess.Popen):
    def __init__(self, *arguments):
        os.kill(os.getpid(), signal.SIGUSR2)
        super().__init__(*arguments, stdout=subprocess.PIPE, text=True)
        self.stdout.readline()
"""
    program = KEEPS.replace("keeper.PYTHON =", "keeper.subprocess.Popen = Popen; keeper.PYTHON =")
    done = subprocess.run([sys.executable, "-c", early + program, str(path)], timeout=60)
    assert done.returncode == 7
