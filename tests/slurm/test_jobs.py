"""Runs on a real Slurm that lose parts, and come back. Each must come to what a run comes to that nothing happens
to."""

import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpo_megatron.job.description import SILENT, JobDirectory, read_attempts
from sdpo_megatron.job.state import number_of, queued
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import read_phase
from slurm import status, stop
from tests.slurm.cluster import Cluster
from tests.slurm.plain import make_clone, sbatch
from tests.slurm.real_server import check_what_it_cost, kill_the_real_server, submit_with_real_server
from tests.slurm.running import Submitted, as_on_a_login_node, assert_complete, job_settings

STEPS = 10


Values = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(started_cluster: Cluster, engines: tuple[Path, Path]) -> Values:
    """A run that nothing happens to has begun; when asked for its values, it is waited for."""
    cluster, directory = started_cluster, started_cluster.shared / "undisturbed"
    with as_on_a_login_node(cluster):
        directory.mkdir()
        submitted = Submitted(cluster, directory, job_settings(engines, directory, steps=STEPS))

    def values() -> list[dict[str, Any]]:
        submitted.end()
        assert_complete(submitted, STEPS)
        assert [(attempt["why"], attempt["steps"]) for attempt in submitted.attempts()] == [
            ("finished", STEPS)
        ]
        # not what has changed since
        assert f"with the package in {submitted.run}/job/code. Logs: " in submitted.output()
        return submitted.values()

    return values


@dataclass(frozen=True)
class Blow:
    """What ends one attempt of a run."""

    phase: str
    step: int
    """Where it comes, or in the same phase of a later step. A hang behind it must be none in a phase that the attempt
    is in for the first time: those may take a quarter of an hour."""
    fall: Callable[[Submitted], None]
    reason: str
    """What the attempt then ends with, as a regular expression."""


def suspend_a_rank(submitted: Submitted) -> None:
    submitted.rank(1).suspend()


def kill_a_rank(submitted: Submitted) -> None:
    submitted.rank(1).kill()


def kill_a_server(submitted: Submitted) -> None:
    for process in submitted.server():
        process.kill()


def kill_the_attempt(submitted: Submitted) -> None:
    for process in submitted.processes("sdpo_megatron.job.run "):
        process.kill()


HANGS = r"rank 1 hangs in phase \w+ of step \d+"
DISTURBED = {
    "rollout-rank": [
        Blow("rollout", 1, suspend_a_rank, HANGS),
        Blow("teacher", 4, kill_a_rank, r"a rank on n[1-4] ended: Killed"),
    ],
    "learn-server": [
        Blow("learn", 2, suspend_a_rank, HANGS),
        Blow("learn", 5, kill_a_server, r"server0: The server ended; see its log\."),
    ],
    "push-attempt": [
        Blow("push", 2, suspend_a_rank, HANGS),
        Blow("learn", 5, kill_the_attempt, "the job's own process was ended by SIGKILL"),
    ],
    "checkpoint": [Blow("checkpoint", 3, suspend_a_rank, HANGS)],
    "eval": [Blow("eval", 2, suspend_a_rank, HANGS)],
}
"""What happens to which run, one after the other."""


def disturb(run: Submitted, blows: list[Blow]) -> None:
    for number, blow in enumerate(blows):
        run.wait_for_phase(blow.phase, blow.step)
        blow.fall(run)
        run.wait_for_attempt(number + 1)


def test_what_fails_or_hangs_comes_back_and_comes_to_the_same(
    undisturbed: Values,
    cluster: Cluster,
    shared_dir: Path,
    engines: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
):
    """At once, so that their waiting is. One has the real server, the others the stand-in."""
    real = submit_with_real_server(cluster, shared_dir)
    runs = {}
    for name in DISTURBED:
        settings = job_settings(engines, shared_dir, name=name, steps=STEPS)
        settings["run"]["hang_timeout_s"] = 1.0
        runs[name] = Submitted(cluster, shared_dir, settings)
    with ThreadPoolExecutor() as threads:
        disturbing = [threads.submit(disturb, run, DISTURBED[name]) for name, run in runs.items()]
        for ended in [*disturbing, threads.submit(kill_the_real_server, real)]:
            ended.result()
    check_what_it_cost(real)
    for name, run in runs.items():
        run.end()
        assert_complete(run, STEPS)
        blows, attempts = DISTURBED[name], run.attempts()
        for blow, attempt in zip(blows, attempts, strict=False):
            assert attempt["why"] == "failed" and re.fullmatch(blow.reason, attempt["reason"]), attempts
        assert attempts[-1]["why"] == "finished" and len(attempts) <= len(blows) + 1, attempts
        assert run.values() == undisturbed(), name
        diagnosis = (run.run / "logs" / "diagnosis.txt").read_text()
        assert re.search(r"^rank 1, on n[1-4]: in phase ", diagnosis, re.MULTILINE)
        assert "sdpo_megatron/train.py" in diagnosis and "It does not say what it is at." in diagnosis
        assert "(on n" in run.output() and "does not say what it is at" in run.output()
    capsys.readouterr()
    assert status.main([str(runs["rollout-rank"].run)]) == 0
    assert "    attempt 0: failed after " in capsys.readouterr().out


@pytest.fixture
def slow(started_cluster: Cluster, engines: tuple[Path, Path]) -> tuple[Path, Path]:
    """As `engines`, of which each response takes seconds."""
    path = started_cluster.shared / "slow_stand_in"
    path.write_text(engines[1].read_text().replace("--slow 0.05", "--slow 2"))
    path.chmod(0o755)
    return engines[0], path


def test_what_is_told_to_end_saves_and_comes_back_unless_somebody_asked_for_it(
    undisturbed: Values,
    cluster: Cluster,
    shared_dir: Path,
    engines: tuple[Path, Path],
    slow: tuple[Path, Path],
):
    """The time of one ends, all are preempted, a plain job of slurm/train.sbatch too; then one is stopped, and another
    cancelled while it already ends. What begins early is slow enough to be far from its end when Slurm, within a
    minute, sees the time."""
    expected = undisturbed()

    def submitted(name: str) -> Submitted:
        settings = job_settings(slow, shared_dir, name=name, steps=STEPS)
        settings["checkpoint"]["every"] = 100
        return Submitted(cluster, shared_dir, settings, grace_s=80.0)

    cancelled = submitted("cancelled")
    cancelled.wait_for_phase("rollout", 1)
    cluster.set_time_left(cancelled.job, 100)
    clone = make_clone(shared_dir)
    plain = sbatch(cluster, clone, nodes=2)
    stopped = submitted("stopped")
    runs = {"stopped": stopped, "cancelled": cancelled}
    cancelled.wait_for(cancelled.attempts, "its first attempt is over")
    # that of its next attempts is as short otherwise
    cluster.run("scontrol", "update", f"JobId={cancelled.job}", "TimeLimit=02:00:00")
    stopped.wait_for_phase("rollout", 1)
    cluster.wait_for(lambda: has_begun(shared_dir / "runs" / "tiny", 2), "the plain job learns", 240)
    # what is changed now is not its own
    (clone / "tiny.yaml").unlink()
    other = cluster.submit("sleep 1", "--partition=high", "--nodes=4", "--exclusive")
    cluster.wait_for_state(other, "COMPLETED", seconds=240)
    for run in runs.values():
        run.wait_for(run.attempts, "it was preempted")
        run.wait_for_attempt(len(run.attempts()))
        run.wait_for_phase("learn", 3)
    assert stop.main([str(stopped.run)]) == 0
    # it is told that its time is over, and would come back
    for process in cancelled.processes("sdpo_megatron.job.run "):
        process.send_signal(signal.SIGUSR2)
    cluster.cancel(cancelled.job)
    stopped.end("FAILED")
    cancelled.end("CANCELLED")
    for run in runs.values():
        run.wait_for(lambda run=run: queued(str(run.job)) is None, "its nodes are free")
        experiment = Path(run.arguments[0])
        # nothing is waited for any more
        experiment.write_text(experiment.read_text().replace(str(slow[1]), str(engines[1])))
        run.submit()
    for name, run in runs.items():
        run.end()
        assert_complete(run, STEPS)
        *told, ended, last = run.attempts()
        assert {attempt["why"] for attempt in told} == {"preempted"} and told[0]["steps"] >= 1, told
        # Slurm kills what is cancelled a few seconds after it has asked: on a busy machine nothing is saved by then
        assert ended["why"] == "asked" or (run is cancelled and ended["reason"] == SILENT), run.attempts()
        assert last["why"] == "finished" and told[-1]["steps"] <= ended["steps"] < STEPS, run.attempts()
        assert run.values() == expected, name
        assert "Traceback" not in run.output()
    assert stopped.attempts()[-2]["exit_code"] == 143
    assert "warning: a stop of this run takes up to" not in stopped.output()
    check_plain(cluster, plain, clone, shared_dir / "runs" / "tiny")


def has_begun(run: Path, step: int) -> bool:
    now = read_phase(run / "phases" / "rank_0.json")
    return now is not None and now.step is not None and now.step >= step


def check_plain(cluster: Cluster, job: int, clone: Path, run: Path) -> None:
    """It came back as what it was, and completes."""
    cluster.wait_for_state(job, "COMPLETED", seconds=400)
    assert number_of(run) == str(job) and (clone / f"slurm-{job}.run").read_text() == f"{run}\n"
    attempts = read_attempts(JobDirectory(run / "job"))
    assert [attempt.why for attempt in attempts] == ["preempted", "finished"], cluster.output(job)
    assert [int(row["step"]) for row in read_rows(run / "metrics.jsonl")] == list(range(9))
    assert f"with the package in {run}/job/code. Logs: " in cluster.output(job)


def test_nodes_that_are_lost_cost_an_attempt_each(
    undisturbed: Values, cluster: Cluster, shared_dir: Path, engines: tuple[Path, Path]
):
    """One dies, then another is cut off: the nodes of the job's own process and of rank 0."""
    expected = undisturbed()
    submitted = Submitted(cluster, shared_dir, job_settings(engines, shared_dir, steps=STEPS))
    submitted.wait_for_phase("learn", 2)
    dead = submitted.node_of(submitted.rank(0))
    cluster.kill_node(dead)
    submitted.wait_for_attempt(1)
    cluster.start_node(dead)
    submitted.wait_for_phase("learn", 5)
    first = submitted.node_of(submitted.rank(0))
    working = [
        process.pid for process in submitted.processes("sdpo_megatron.job.rank") if process.name() != "srun"
    ]
    assert working
    cluster.cut(first)
    submitted.wait_for_attempt(2)
    # what was cut off works on nothing any more; the job's own process there may wait for Slurm for minutes
    cluster.wait_for(lambda: not any(map(is_running, working)), "the second attempt's ranks end", 60)
    assert cluster.processes(first)
    submitted.end()
    assert_complete(submitted, STEPS)
    assert [(attempt["why"], attempt["reason"]) for attempt in submitted.attempts()] == [
        *[("failed", SILENT)] * 2,
        ("finished", ""),
    ]
    assert submitted.values() == expected


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
