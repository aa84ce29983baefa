"""Runs on a real Slurm that lose parts, and come back. Each must come to what a run comes to that nothing happens
to."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdpo_megatron.job.description import SILENT
from slurm import status, stop
from tests.slurm.cluster import Cluster
from tests.slurm.running import Submitted, as_on_a_login_node, assert_complete, job_settings

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed(started_cluster: Cluster, engines: tuple[Path, Path]) -> list[dict[str, Any]]:
    """The values of a run that nothing happens to."""
    cluster, directory = started_cluster, started_cluster.shared / "undisturbed"
    with as_on_a_login_node(cluster):
        directory.mkdir()
        submitted = Submitted(cluster, directory, job_settings(engines, directory, steps=STEPS))
        submitted.end()
    assert_complete(submitted, STEPS)
    assert [(attempt["why"], attempt["steps"]) for attempt in submitted.attempts()] == [("finished", STEPS)]
    # not what has changed since
    assert f"with the package in {submitted.run}/job/code. Logs: " in submitted.output()
    return submitted.values()


def stopped_in(phase: str, step: int) -> Callable[[Submitted], str]:
    def stop_a_rank(submitted: Submitted) -> str:
        submitted.wait_for_phase(phase, step)
        submitted.rank(1).suspend()
        return r"rank 1 hangs in phase \w+ of step \d+"

    return stop_a_rank


def kill_a_rank(submitted: Submitted) -> str:
    submitted.wait_for_phase("teacher", 3)
    submitted.rank(1).kill()
    return "a rank on n[1-4] ended: Killed"


def kill_a_server(submitted: Submitted) -> str:
    submitted.wait_for_phase("learn", 1)
    for process in submitted.server():
        process.kill()
    return r"server0: The server ended; see its log\."


def kill_the_attempt(submitted: Submitted) -> str:
    submitted.wait_for_phase("learn", 2)
    for process in submitted.processes("sdpo_megatron.job.run "):
        process.kill()
    return "the job's own process was ended by SIGKILL"


DISTURBED: dict[str, Callable[[Submitted], str]] = {
    "stopped-rollout": stopped_in("rollout", 2),
    "stopped-learn": stopped_in("learn", 3),
    "stopped-push": stopped_in("push", 4),
    "stopped-checkpoint": stopped_in("checkpoint", 5),
    "stopped-eval": stopped_in("eval", 6),
    "killed-rank": kill_a_rank,
    "killed-server": kill_a_server,
    "killed-attempt": kill_the_attempt,
}


def test_what_fails_or_hangs_comes_back_and_comes_to_the_same(
    cluster: Cluster,
    shared_dir: Path,
    engines: tuple[Path, Path],
    undisturbed: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
):
    """At once, so that their waiting is."""
    runs = {}
    for name in DISTURBED:
        settings = job_settings(engines, shared_dir, name=name, steps=STEPS)
        settings["run"]["hang_timeout_s"] = 1.0
        runs[name] = Submitted(cluster, shared_dir, settings)
    with ThreadPoolExecutor() as threads:
        disturbing = {name: threads.submit(DISTURBED[name], run) for name, run in runs.items()}
        reasons = {name: reason.result() for name, reason in disturbing.items()}
    for name, run in runs.items():
        run.end()
        assert_complete(run, STEPS)
        first, *others = run.attempts()
        assert first["why"] == "failed" and re.fullmatch(reasons[name], first["reason"]), run.attempts()
        assert others[-1]["why"] == "finished" and len(others) <= 2, run.attempts()
        assert run.values() == undisturbed, name
        if name.startswith("stopped"):
            diagnosis = (run.run / "logs" / "diagnosis.txt").read_text()
            assert re.search(r"^rank 1, on n[1-4]: in phase ", diagnosis, re.MULTILINE)
            assert "sdpo_megatron/train.py" in diagnosis and "It does not say what it is at." in diagnosis
            assert "(on n" in run.output() and "does not say what it is at" in run.output()
    capsys.readouterr()
    assert status.main([str(runs["killed-rank"].run)]) == 0
    assert "    attempt 0: failed after " in capsys.readouterr().out


@pytest.fixture
def slow(started_cluster: Cluster, engines: tuple[Path, Path]) -> tuple[Path, Path]:
    """As `engines`, of which each response takes seconds."""
    path = started_cluster.shared / "slow_stand_in"
    path.write_text(engines[1].read_text().replace("--slow 0.05", "--slow 0.5"))
    path.chmod(0o755)
    return engines[0], path


def test_a_preempted_run_and_one_whose_time_ends_save_and_come_back(
    cluster: Cluster,
    shared_dir: Path,
    slow: tuple[Path, Path],
    undisturbed: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
):
    runs: dict[str, Submitted] = {}
    for name in ("preempted", "out-of-time"):
        settings = job_settings(slow, shared_dir, name=name, steps=STEPS)
        settings["checkpoint"]["every"] = 100
        runs[name] = Submitted(cluster, shared_dir, settings, grace_s=80.0)
    for run in runs.values():
        run.wait_for_phase("rollout", 2)
    cluster.set_time_left(runs["out-of-time"].job, 100)
    runs["out-of-time"].wait_for(runs["out-of-time"].attempts, "its first attempt is over", 120)
    runs["preempted"].wait_for_phase("rollout", 3)
    other = cluster.submit("sleep 1", "--partition=high", "--nodes=4", "--exclusive")
    cluster.wait_for_state(other, "COMPLETED", seconds=240)
    for name, run in runs.items():
        run.end()
        assert_complete(run, STEPS)
        first, *others = run.attempts()
        assert first["why"] == "preempted" and first["steps"] >= 2, run.attempts()
        assert {attempt["why"] for attempt in others[:-1]} <= {"preempted"} and others[-1][
            "why"
        ] == "finished"
        assert run.values() == undisturbed, name
    assert "warning: a stop of this run takes up to" not in runs["preempted"].output()


def test_a_run_that_somebody_stops_saves_and_stays_away(
    cluster: Cluster, shared_dir: Path, engines: tuple[Path, Path], undisturbed: list[dict[str, Any]]
):
    runs: dict[str, Submitted] = {}
    for name in ("stopped", "cancelled"):
        settings = job_settings(engines, shared_dir, name=name, steps=STEPS)
        settings["checkpoint"]["every"] = 100
        runs[name] = Submitted(cluster, shared_dir, settings)
    for run in runs.values():
        run.wait_for_phase("learn", 1)
    assert stop.main([str(runs["stopped"].run)]) == 0
    cluster.cancel(runs["cancelled"].job)
    runs["stopped"].end("FAILED")
    runs["cancelled"].end("CANCELLED")
    (attempt,) = runs["stopped"].attempts()
    assert (attempt["why"], attempt["exit_code"]) == ("asked", 143) and attempt["steps"] >= 2
    assert "Traceback" not in runs["stopped"].output()
    assert len(runs["stopped"].rows()) == attempt["steps"]
    for name, run in runs.items():
        run.submit()
        run.end()
        assert_complete(run, STEPS)
        assert run.values() == undisturbed, name
    # within the time between TERM and KILL it could save
    assert runs["cancelled"].attempts()[0]["steps"] >= 2


@pytest.mark.parametrize("loss", ["dies", "is cut off"])
def test_a_node_that_is_lost_costs_an_attempt(
    cluster: Cluster,
    shared_dir: Path,
    engines: tuple[Path, Path],
    undisturbed: list[dict[str, Any]],
    loss: str,
):
    submitted = Submitted(cluster, shared_dir, job_settings(engines, shared_dir, steps=STEPS))
    submitted.wait_for_phase("learn", 2)
    # that of the job's own process and of rank 0
    first = submitted.node_of(submitted.rank(0))
    if loss == "dies":
        cluster.kill_node(first)
    else:
        left = [process.pid for process in cluster.processes(first) if "sdpo" in " ".join(process.cmdline())]
        cluster.cut(first)
        submitted.wait_for_attempt(1)
        # what was cut off works on nothing any more
        cluster.wait_for(lambda: not any(map(is_running, left)), "the first attempt's processes end", 60)
        assert cluster.processes(first)
    submitted.end()
    assert_complete(submitted, STEPS)
    lost, *others = submitted.attempts()
    assert (lost["why"], others[-1]["why"]) == ("failed", "finished") and len(others) == 1, (
        submitted.attempts()
    )
    assert lost["reason"] == SILENT
    assert submitted.values() == undisturbed


def is_running(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
