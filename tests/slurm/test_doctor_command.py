"""slurm/doctor.py by itself: arguments, exit codes, what stays; the job is a stand-in."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sdpo_megatron.doctor.findings import Finding, failure, ok
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.submission.examination import NODE, Examination
from slurm import doctor
from tests.unit.launch.launching import ROOT


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "cluster.yaml").write_text("hardware:\n  nodes: 4\n  gpus_per_node: 8\n  partition: gpu\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the nodes find, to be filled by the test."""
    findings: list[Finding] = []

    @contextlib.contextmanager
    def submitted(examination: Examination, subject: doctor.Subject) -> Iterator[str]:
        (examination.directory / "nodes").mkdir(parents=True)
        yield "4711"

    monkeypatch.setattr(Examination, "submitted", submitted)
    monkeypatch.setattr(Examination, "wait", lambda examination, limit_s, announce: [*findings])
    return findings


def on(host: str, *findings: Finding) -> list[Finding]:
    return [replace(finding, host=host) for finding in findings]


def test_a_table_and_no_file_but_the_report(
    job: list[Finding], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job += on("n1", ok("memory", "20 GiB")) + on("n2", ok("memory", "19 GiB"))
    assert doctor.main(["cluster.yaml", "hardware.nodes=2"]) == 0
    out = capsys.readouterr().out
    assert "n1: 20 GiB" in out and "n2: 19 GiB" in out
    assert list((tmp_path / "runs").iterdir()) == []
    (report,) = (tmp_path / "cache/sdpo_megatron/doctor").iterdir()
    assert report.name.endswith("_gpu.json")


def test_what_fails_is_exit_code_1_and_json_is_of_each_node(
    job: list[Finding], capsys: pytest.CaptureFixture[str]
):
    job += on("n1", ok("GPU", "8", gpus=8)) + on("n2", failure("GPU", "none", "mend it", gpus=0))
    assert doctor.main(["cluster.yaml", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [(finding["host"], finding["name"]) for finding in findings] == [
        ("n1", "GPU"),
        ("n2", "GPU"),
        ("n1, n2", "GPU: gpus"),
    ]


def test_the_logs_of_a_node_that_did_not_answer_stay(
    job: list[Finding], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job += on("n2", failure(NODE, "n2 has not answered", "see its log"))
    assert doctor.main(["cluster.yaml", "--dir", "shared"]) == 1
    (kept,) = (tmp_path / "shared").iterdir()
    assert kept.name.startswith("doctor-") and "what to do: see its log" in capsys.readouterr().out
    # no partition was examined
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunFailed("Slurm does not take the job: no."), 1, "error: Slurm does not take the job: no.\n"),
        (KeyboardInterrupt(), 130, "The job is cancelled.\n"),
    ],
)
def test_a_job_that_came_to_nothing_leaves_nothing(
    job: list[Finding],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
):
    def fail(*_: object) -> list[Finding]:
        raise error

    monkeypatch.setattr(Examination, "wait", fail)
    assert doctor.main(["cluster.yaml"]) == code
    assert capsys.readouterr().err.endswith(message) and list((tmp_path / "runs").iterdir()) == []


def test_a_terminal_that_is_gone_takes_the_job_with_it(
    job: list[Finding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def gone(*_: object) -> None:
        signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(Examination, "wait", gone)
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail("the command does not look at it"))
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["cluster.yaml"])
    assert stopped.value.code == 129 and list((tmp_path / "runs").iterdir()) == []


def test_what_is_looked_at(tmp_path: Path):
    demo = str(ROOT / "yaml/demo_cpu.yaml")
    request = doctor.parse([demo, "cluster.yaml", "hardware.nodes=2", "server.python=/p", "--wait", "5"])
    assert (request.hardware.nodes, request.hardware.partition, request.queue_limit_s) == (2, "gpu", 300)
    # where it runs there are GPUs, whatever the experiment asks for
    assert (request.subject.server.python, request.subject.device) == ("/p", "cuda")
    assert request.directory.parent == tmp_path / "runs"
    alone = doctor.parse([])
    assert (alone.hardware.nodes, alone.subject.device, alone.queue_limit_s) == (1, "cpu", 1800)
    assert doctor.parse(["--dir", "/shared"]).directory.parent == Path("/shared")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware.nodez=2"], "nodez"),
        (["run.name=x"], "run.name=x belongs to an experiment: give its YAML file too"),
        (["cluster.yaml", f"{ROOT}/yaml/demo_cpu.yaml", "b.yaml"], "b.yaml is a second experiment"),
        (["none.yaml"], "none.yaml"),
        (["--fast"], "--fast"),
        (["--wait", "long"], "--wait"),
        (["cluster.yaml", "--dir", "cluster.yaml"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert doctor.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", "/none")
    assert doctor.main([]) == 2
    assert "python -m sdpo_megatron.doctor says the same of one machine" in capsys.readouterr().err


def test_it_says_how_it_is_called(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--help"])
    assert ended.value.code == 0 and "slurm/doctor.py [EXPERIMENT.yaml]" in capsys.readouterr().out
