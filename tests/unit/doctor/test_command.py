"""The command's arguments, exit codes and output; what it looks at. The real one runs in e2e/test_doctor.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo_megatron.doctor import __main__ as command
from sdpo_megatron.doctor.checks import checks_of, subject_of
from sdpo_megatron.doctor.examine import TOTAL_S, Check
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning

ROOT = Path(__file__).parents[3]


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch):
    def make(*findings: Finding) -> None:
        monkeypatch.setattr(command, "checks_of", lambda subject: [Check(name="x", look=lambda: [*findings])])

    return make


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([ok("a", "well")], 0),
        ([ok("a", "well"), warning("b", "slow", "wait")], 0),
        ([failure("a", "broken", "mend it"), ok("b", "well")], 1),
    ],
)
def test_the_exit_code_says_whether_something_fails(
    findings, code, finds, capsys: pytest.CaptureFixture[str]
):
    finds(*findings)
    assert command.main([]) == code
    printed = capsys.readouterr()
    assert all(
        word in printed.out for finding in findings for word in (finding.name, finding.found, finding.todo)
    )
    assert printed.err == "Looking at this machine; that takes up to two minutes.\n"


def test_json_is_the_list_alone(finds, capsys: pytest.CaptureFixture[str]):
    finds(warning("b", "slow", "wait", seconds=2.0))
    assert command.main(["--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding.pop("host")
    assert finding == {
        "name": "b",
        "status": "warning",
        "found": "slow",
        "todo": "wait",
        "figures": {"seconds": 2.0},
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--frob"], "unrecognized arguments: --frob; see --help."),
        (["none.yaml"], "There is no file none.yaml."),
        (["run.dir=x"], "There is no file run.dir=x;"),
        ([str(ROOT / "yaml/demo_cpu.yaml"), "run.device=tpu"], "run.device is 'tpu'"),
        (
            [str(ROOT / "yaml/demo_cpu.yaml"), "run.dir=~nobody-here/x"],
            "run.dir: there is no user nobody-here",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, line, finds, capsys: pytest.CaptureFixture[str]):
    finds()
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {line}") and printed.err.count("\n") == 1 and printed.out == ""


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0 and "usage: python -m sdpo_megatron.doctor [EXPER" in capsys.readouterr().out


def test_an_experiments_settings_are_looked_at(tmp_path: Path):
    subject = subject_of(
        str(ROOT / "yaml/demo_cpu.yaml"),
        [
            f"run.dir={tmp_path}",
            "run.device=cuda",
            "server.python=other",
            "rollout.max_concurrent_requests=7",
        ],
    )
    assert (subject.run_directory, subject.device) == (tmp_path, "cuda")
    assert (subject.server.python, subject.rollout.max_concurrent_requests) == ("other", 7)
    default = subject_of(None, [])
    assert (default.run_directory, default.device) == (Path("runs"), "auto")
    assert default.server.python == ".venv-sglang/bin/python"


def test_every_check_has_a_name_and_a_limit_of_its_own():
    checks = checks_of(subject_of(None, []))
    assert len({check.name for check in checks}) == len(checks) == 18
    assert all(0 < check.limit_s <= 60 for check in checks) and TOTAL_S < 120


def test_each_looks_at_what_its_name_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The quick ones, really."""
    subject = subject_of(str(ROOT / "yaml/demo_cpu.yaml"), [f"run.dir={tmp_path}"])
    slow = {"gloo ring", "nccl ring", "trainer environment", "server environment"}
    for check in checks_of(subject):
        if check.name not in slow:
            findings = check.look()
            assert findings and all(finding.name.startswith(check.name[:5]) for finding in findings)
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_is_broken_is_a_finding(tmp_path: Path):
    """In the real command, whose other checks have their lines all the same."""
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    )
    settings = [f"run.dir={tmp_path}", "server.urls=[http://127.0.0.1:1]", "server.python=none"]
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.doctor", "yaml/demo_cpu.yaml", *settings, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1 and "Traceback" not in done.stderr
    failed = {name for name, finding in findings.items() if finding["status"] == "failure"}
    assert failed >= {"gloo ring", "trainer environment"}
    assert "torch cannot be imported (ImportError: libcudart" in findings["trainer environment"]["found"]
    assert "libcudart.so.13: cannot open" in findings["gloo ring"]["found"]
    assert len(findings) > 18


def test_nothing_heavy_is_imported():
    """A torch that is broken is a finding, and not the command's end."""
    code = (
        "import sys, sdpo_megatron.doctor.__main__; from sdpo_megatron.doctor.checks import *;"
        "checks_of(subject_of(None, [])); heavy = {'torch', 'transformers', 'numpy', 'megatron'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
