"""Interpreters that lack a package, cannot import one, hang, crash, or are none."""

import sys
from pathlib import Path

import pytest

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.doctor import environments
from sdpo_megatron.doctor.asking import Answer
from sdpo_megatron.doctor.environments import interpreter, server_environment, trainer_environment

LINES = """\
{"python": "3.11.7"}
{"package": "torch", "version": "2.13.0"}
{"begins": "torch"}
{"package": "torch", "seconds": 1.5}
{"package": "sglang", "version": "0.5.23"}
"""


def said(output: str, exit_code: int | None = 0, errors: str = ""):
    return interpreter(
        Answer(exit_code=exit_code, output=output, errors=errors), ["torch=torch", "sglang"], 60
    )


def test_versions_are_read():
    whole = said(LINES)
    assert str(whole) == "Python 3.11.7, torch 2.13.0, sglang 0.5.23" and whole.wrong == []


@pytest.mark.parametrize(
    ("output", "exit_code", "wrong"),
    [
        (
            LINES.replace('"0.5.23"', "null"),
            0,
            ["sglang is not installed"],
        ),
        (
            LINES.replace('"seconds": 1.5', '"error": "ImportError: libcudart"'),
            0,
            ["torch cannot be imported (ImportError: libcudart)"],
        ),
        (
            LINES.replace('"2.13.0"', "null").replace('"seconds": 1.5', '"error": "ModuleNotFoundError"'),
            0,
            ["torch is not installed"],
        ),
        ("\n".join(LINES.splitlines()[:3]), None, ["the import of torch does not end within 60 s"]),
        ("\n".join(LINES.splitlines()[:3]), -11, ["the import of torch ends with code -11: last words"]),
        (LINES[:60], 0, ["it ends with code 0: last words"]),
        ("", 1, ["it ends with code 1: last words"]),
        ("not JSON\n", 1, ["it ends with code 1: last words"]),
    ],
    ids=["absent", "broken", "absent and asked", "hangs", "crashes", "cut", "nothing", "no JSON"],
)
def test_what_is_wrong_is_named(output, exit_code, wrong):
    assert said(output, exit_code, "first\nlast words\n\n").wrong == wrong


def test_an_interpreter_says_what_it_has(monkeypatch: pytest.MonkeyPatch):
    asked = ("psutil=psutil", "no-such-package=no_such_module", "pytest=__hello__", "rich=clock")
    monkeypatch.setattr(environments, "TRAINS", asked)
    (finding,) = trainer_environment(30)
    # `__hello__` prints nothing and is there; `clock` is a module of ours that nobody else may see
    assert finding.status == "failure"
    assert finding.found == (
        f"{sys.executable}: no-such-package is not installed; "
        "rich cannot be imported (ModuleNotFoundError: No module named 'clock')"
    )
    assert finding.todo.endswith("-m pip install -e .")
    assert finding.figures["python"] == ".".join(map(str, sys.version_info[:3]))
    monkeypatch.setattr(environments, "TRAINS", asked[:1])
    (finding,) = trainer_environment(30)
    assert finding.status == "ok" and "psutil 7" in finding.found


def test_a_servers_interpreter_that_is_not_there():
    (finding,) = server_environment(ServerSettings(python="/no/such/python"), "cpu", 10)
    assert (finding.status, finding.found) == (
        "failure",
        "server.python: there is no program /no/such/python",
    )
    assert "make .venv-sglang" in finding.todo


def test_one_that_hangs(python):
    (finding,) = server_environment(ServerSettings(python=python("sleep 600")), "cpu", 0.5)
    assert finding.status == "failure" and finding.found.endswith("python: it does not end within 0.5 s")


def test_one_that_is_no_program(tmp_path: Path):
    path = tmp_path / "python"
    path.write_text("neither a script nor a program")
    path.chmod(0o755)
    (finding,) = server_environment(ServerSettings(python=str(path)), "cpu", 1)
    assert finding.status == "failure" and "cannot be run: Exec format error" in finding.found


def test_one_without_sglang():
    """This one, for example."""
    (finding,) = server_environment(ServerSettings(python=sys.executable), "cpu", 60)
    assert (finding.status, finding.found) == ("failure", f"{sys.executable}: sglang is not installed")


SERVES = """
case "$*" in
  *ask_python.py*)
    echo '{"python": "3.12.1"}'
    for name in sglang torch triton transformers; do echo "{\\"package\\": \\"$name\\", \\"version\\": \\"1\\"}"; done;;
"""


@pytest.mark.parametrize(
    ("device", "program"), [("cpu", "sglang_on_cpu.py --help"), ("cuda", "-m sglang.launch_server --help")]
)
def test_the_servers_program_has_to_start(device, program, python, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/trainer")
    python = python(f'{SERVES}  *"{program}") [ -z "$PYTHONPATH" ];;\n  *) exit 9;;\nesac')
    (finding,) = server_environment(ServerSettings(python=python), device, 20)
    assert finding.status == "ok"
    assert finding.found == f"{python}: Python 3.12.1, sglang 1, torch 1, triton 1, transformers 1"


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo no kernels >&2; exit 4", "SGLang's program ends with code 4: no kernels"),
        ("sleep 600", "SGLang's program has not shown its --help within 3 s"),
    ],
)
def test_a_servers_program_that_does_not(script, found, python):
    python = python(f"{SERVES}  *) {script};;\nesac")
    (finding,) = server_environment(ServerSettings(python=python), "cpu", 3)
    assert (finding.status, finding.found) == ("failure", f"{python}: {found}")


def test_servers_that_run_already_need_no_interpreter():
    settings = ServerSettings(urls=["http://127.0.0.1:1"], python="/no/such/python")
    assert server_environment(settings, "cpu", 1)[0].status == "ok"
