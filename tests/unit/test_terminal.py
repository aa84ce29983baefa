"""A reader that leaves, or a full disk behind standard output, ends no run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo_megatron.errors import ConfigError, RunFailed, ServerLost, UserError, quoted
from sdpo_megatron.terminal import reported

SAY = """
import sys
from sdpo_megatron.run_dir.display import RunDisplay
from sdpo_megatron.terminal import tell

tell("first")
display = RunDisplay("demo", 20, 0)
for step in range(3):
    display.row({"step": step, "time/total": 1.0})
    display.message("text " * 10_000)
display.close()
tell("last")
tell("went on", sys.stderr)
"""


def run(redirect: str) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; \"{sys.executable}\" -c '{SAY}' {redirect}"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("redirect", ["| head -n 1 > /dev/null", "> /dev/full", ">&-"])
def test_nobody_reads(redirect: str):
    assert run(redirect) == (0, "went on\n")


@pytest.mark.parametrize("kind", [UserError, ConfigError, RunFailed])
def test_a_message_is_one_line_whatever_it_quotes(kind: type[UserError]):
    error = kind("key \n\r\t\x1b[31m \u2028 \ud800 ü", ["log\n", "end\t"])
    first, *below = str(error).split("\n")
    assert first == "key \\n\\r\\t\\x1b[31m \\u2028 \\ud800 ü"
    assert below == ["log\\n", "end\\t"]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("so"), 2), (RunFailed("so"), 1), (ServerLost("so"), 1)]
)
def test_the_exit_code_says_whose_it_is_to_mend(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
):
    def work() -> int:
        raise error

    assert reported(work) == code and capsys.readouterr().err == "error: so\n"


def test_long_values_are_cut():
    assert quoted("x" * 78) == repr("x" * 78)
    assert quoted("x" * 79) == f"'{'x' * 76}..."
    assert quoted([1]) == "[1]"


def test_what_the_locale_cannot_show_is_escaped():
    code = (
        "import sys; from sdpo_megatron.terminal import Screen, escape_what_cannot_be_shown, tell\n"
        "escape_what_cannot_be_shown(); tell('runs/日本'); Screen().print('日'); tell('本', sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == rb"runs/\u65e5\u672c" + b"\n" + rb"\u65e5" + b"\n"
    assert done.stderr == rb"\u672c" + b"\n"
