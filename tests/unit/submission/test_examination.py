"""The doctor's job with stand-ins for Slurm's commands: what is submitted, waited for, and said of silent nodes."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.doctor.checks import Subject, subject_of
from sdpo_megatron.doctor.findings import Finding, ok, to_json
from sdpo_megatron.doctor.node import read_subject
from sdpo_megatron.errors import RunFailed
from sdpo_megatron.submission import examination as module
from sdpo_megatron.submission.examination import Examination

SLURM = {
    # each line of `queue` is one answer; the last one stays
    "squeue": 'head -1 queue; [ "$(wc -l < queue)" -gt 1 ] && sed -i 1d queue; exit 0',
    "scontrol": 'for name in $(echo "$3" | tr , " "); do echo "$name"; done',
    "sbatch": '[ -e refusal ] && { cat refusal >&2; exit 1; }; cp "$2" script; echo Welcome; echo "4711;cluster"',
    "scancel": 'echo "$@" >> cancelled; [ -e no ] && { cat no >&2; exit 1; }; exit 0',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in SLURM.items():
        (programs / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "SEEN_S", 0.1)
    monkeypatch.setattr(module, "ENDS_WITHIN_S", 0.1)
    return tmp_path


@pytest.fixture
def subject() -> Subject:
    return subject_of(None, [])


def queue(slurm: Path, *lines: str) -> None:
    (slurm / "queue").write_text("".join(f"{line}\n" for line in lines))


def examine(
    slurm: Path,
    subject: Subject,
    answering: tuple[str, ...] = (),
    begun: tuple[str, ...] = (),
    limit_s: float = 60,
) -> tuple[list[Finding], list[str]]:
    """Returns the findings, and what was announced; the nodes in `answering` have answered, those in `begun` begun."""
    examination, said = Examination(HardwareSettings(nodes=4), slurm / "x"), list[str]()
    with examination.submitted(subject) as number:
        assert number == "4711"
        for host in answering:
            (slurm / f"x/nodes/{host}.json").write_text(to_json([ok("cores", host)]))
        for host in begun:
            (slurm / f"x/nodes/{host}.begun").write_text(to_json([ok("link", host)]))
        findings = examination.wait(limit_s, said.append)
    return findings, said


def test_it_waits_says_so_and_returns_what_the_nodes_found(slurm: Path, subject: Subject):
    queue(slurm, "PENDING|None|", "PENDING|Resources|", "PENDING|Resources|", "RUNNING|None|a,b")
    findings, said = examine(slurm, subject, ("a", "b"))
    assert [finding.found for finding in findings] == ["a", "b"]
    assert said[:2] == [
        "Job 4711 waits. Ctrl-C cancels it.",
        "Job 4711 waits (Resources). Ctrl-C cancels it.",
    ]
    assert said[2].startswith("Job 4711 examines a, b; it waited for ") and len(said) == 3
    assert (slurm / "cancelled").read_text() == "4711\n"
    assert (slurm / "x/code/sdpo_megatron/train.py").is_file() and read_subject(slurm / "x") == subject


def test_what_it_asks_slurm_for(slurm: Path):
    hardware = HardwareSettings(
        nodes=16,
        gpus_per_node=8,
        gpu_type="h100",
        cpus_per_node=96,
        partition="gpu",
        account="ours",
        exclusive=True,
        setup=["module load x"],
        srun_args=["--container-image=a b.sqsh"],
    )
    script = Examination(hardware, slurm / "my dir").script()
    for option in (
        "nodes=2",
        "time=00:05:00",
        "partition=gpu",
        "account=ours",
        "exclusive",
        "gpus-per-node=h100:8",
        "no-requeue",
        f"output='{slurm}/my dir/job.log'",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "--requeue" not in script and "--signal" not in script
    assert "\nmodule load x\n" in script and f"code='{slurm}/my dir/code'\n" in script
    last = script.splitlines()[-1]
    assert last.startswith("exec srun --nodes=2 --ntasks=2 --ntasks-per-node=1 ") and last.endswith(" $hosts")
    assert "--gpus-per-node=h100:8 '--container-image=a b.sqsh' " in last
    assert f"{shlex.quote(sys.executable)} -m sdpo_megatron.doctor.node '{slurm}/my dir' " in last
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    short = Examination(HardwareSettings(nodes=1, time_limit="00:02:00"), slurm).script()
    assert "#SBATCH --time=00:02:00\n" in short and "#SBATCH --nodes=1\n" in short


def test_what_slurm_refuses(slurm: Path, subject: Subject):
    (slurm / "refusal").write_text(
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job failed\n"
    )
    with pytest.raises(RunFailed) as raised:
        examine(slurm, subject)
    assert raised.value.message == (
        "Slurm does not take the job: sbatch: error: invalid partition specified: x sbatch: error: Batch job failed"
    )
    assert not (slurm / "cancelled").exists()


def test_a_job_that_does_not_start_is_cancelled(slurm: Path, subject: Subject):
    queue(slurm, "PENDING|ReqNodeNotAvail|")
    with pytest.raises(
        RunFailed, match=r"not started within 0.00\d+ minutes \(ReqNodeNotAvail\), and is cancelled"
    ):
        examine(slurm, subject, limit_s=0.2)
    assert (slurm / "cancelled").read_text() == "4711\n"


def test_ctrl_c_cancels_it(slurm: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch):
    queue(slurm, "PENDING|Priority|")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    # the module's own, as subprocess sleeps too while it waits for a command
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=interrupted, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        examine(slurm, subject)
    assert (slurm / "cancelled").read_text() == "4711\n"


def test_a_job_that_ends_before_it_has_a_node(slurm: Path, subject: Subject):
    queue(slurm, "CANCELLED|BadConstraints|(null)")
    with pytest.raises(RunFailed, match=r"ended as CANCELLED before it had a node \(BadConstraints\)"):
        examine(slurm, subject)
    queue(slurm, "")
    (slurm / "x").rename(slurm / "before")
    with pytest.raises(RunFailed, match="ended as UNKNOWN before it had a node"):
        examine(slurm, subject)


def test_nodes_that_do_not_answer_are_failures_by_name(slurm: Path, subject: Subject):
    queue(slurm, "RUNNING|None|a,b,c", "NODE_FAIL|None|a,b,c")
    findings, _ = examine(slurm, subject, ("a",), ("b",))
    assert [(finding.host, finding.name, finding.status) for finding in findings[1:]] == [
        (findings[1].host, "link", "ok"),
        ("b", "node", "failure"),
        ("c", "node", "failure"),
    ]
    assert findings[2].found == "b has begun, but not answered; the job ended as NODE_FAIL"
    assert "sinfo --nodes=b" in findings[2].todo
    assert (
        findings[3].found == "c has not answered; the job ended as NODE_FAIL" and "--dir" in findings[3].todo
    )


def test_the_last_words_of_a_node_or_of_the_job_are_shown(
    slurm: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    queue(slurm, "FAILED|NonZeroExitCode|a,b")
    put = Examination.wait

    def with_logs(examination: Examination, *arguments):
        (slurm / "x/job.log").write_text("srun: error: Task launch failed on node b: Communication\n\n")
        (slurm / "x/nodes/a.log").write_text("Traceback ...\nImportError: libcuda.so\n")
        return put(examination, *arguments)

    monkeypatch.setattr(Examination, "wait", with_logs)
    a, b = examine(slurm, subject)[0]
    assert a.found.endswith("FAILED (NonZeroExitCode); its log ends with: ImportError: libcuda.so")
    assert b.found.endswith("its log ends with: srun: error: Task launch failed on node b: Communication")
    assert b.todo == f"see {slurm}/x/nodes/b.log and {slurm}/x/job.log"


def test_a_job_that_hangs_is_not_waited_for_for_ever(
    slurm: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "JOB_S", 0)
    monkeypatch.setattr(module, "ENDING_S", 0.3)
    queue(slurm, "RUNNING|None|a")
    ((finding,), _) = examine(slurm, subject, begun=("b",))
    assert finding.found == "a has not answered; the job is RUNNING" and (slurm / "cancelled").exists()


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ("Kill job error on job id 4711: Invalid job id specified", False),
        ("Unable to contact controller", True),
    ],
)
def test_a_job_that_cannot_be_cancelled(
    slurm: Path, subject: Subject, capsys: pytest.CaptureFixture[str], said: str, warned: bool
):
    (slurm / "no").write_text(f"scancel: error: {said}\n")
    queue(slurm, "RUNNING|None|a", "COMPLETED|None|a")
    examine(slurm, subject, ("a",))
    errors = capsys.readouterr().err
    assert ("warning: job 4711 may go on for 300 s: scancel 4711 failed: " in errors) == warned
    assert bool(errors) == warned
