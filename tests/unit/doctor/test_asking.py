"""Programs that are asked something."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdpo_megatron.doctor.asking import ask
from tests.unit.doctor.test_examine import ROOT, gone


def test_what_it_says_and_how_it_ends():
    answer = ask(
        ["sh", "-c", "echo out $WORD; echo one >&2; printf 'two\\n \\n' >&2; exit 3"], 10, {"WORD": "w"}
    )
    assert (answer.exit_code, answer.output, answer.last_error) == (3, "out w\n", "two")
    assert ask(["sh", "-c", "kill -9 $$"], 10).exit_code == -9
    assert ask(["true"], 10).last_error == ""
    assert ask(["printf", "\\377"], 10).output == "\ufffd"
    assert ask(["cat"], 10).exit_code == 0


def test_one_that_takes_too_long_is_ended_with_its_children(tmp_path: Path):
    start = time.monotonic()
    answer = ask(["sh", "-c", f"echo begun; sleep 600 & echo $! > {tmp_path}/pid; wait"], 1.5)
    assert (answer.exit_code, answer.output) == (None, "begun\n")
    assert time.monotonic() - start < 30
    assert gone(int((tmp_path / "pid").read_text()))


def test_no_program():
    with pytest.raises(OSError):
        ask(["/no/such/program"], 1)


def test_it_has_a_session_of_its_own():
    answer = ask(["sh", "-c", "ps -o sid= -p $$ || cut -d' ' -f6 /proc/$$/stat"], 10, dict(os.environ))
    assert int(answer.output) != os.getsid(0)


def test_it_dies_with_whoever_asked(tmp_path: Path):
    code = "import sys; from sdpo_megatron.doctor.asking import ask; ask(sys.argv[1:], 600)"
    command = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"]
    asker = subprocess.Popen([sys.executable, "-c", code, *command], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    asker.kill()
    asker.wait()
    assert gone(int((tmp_path / "pid").read_text()))
