"""Ranks that hang are named, and the run is ended after a while; ranks are fakes, processes and signals are real."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.launch import hangs
from sdpo_megatron.launch.hangs import (
    HangWatch,
    Seen,
    Watched,
    folded,
    last_answer,
    make_no_progress,
    stopped_ranks,
    waits_in,
)
from sdpo_megatron.launch.launcher import launch
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import Phase
from tests.unit.launch.launching import Project, running, until

URL = "server.urls=['http://127.0.0.1:9']"
CLOCK = r"\d\d:\d\d:\d\d"


def seen(rank: int = 0, *, quiet_s: float = 0.0, longest_s: float | None = 1.0, **others: Any) -> Seen:
    """At the moment 1000."""
    moment = 1000 - quiet_s
    phase = Phase(rank=rank, step=3, phase="learn", since=moment, progress=moment, longest_s=longest_s)
    return Seen(
        **(
            {
                "rank": rank,
                "watched": Watched("process 7", 7),
                "phase": phase,
                "has_written": True,
                "stopped_since": None,
            }
            | others
        )
    )


@pytest.mark.parametrize(
    ("ranks", "hangs"),
    [
        # at least a minute
        ([seen(quiet_s=59)], False),
        ([seen(quiet_s=61)], True),
        # or five times the longest so far
        ([seen(quiet_s=499, longest_s=100)], False),
        ([seen(quiet_s=501, longest_s=100)], True),
        # and more the first time
        ([seen(quiet_s=899, longest_s=None)], False),
        ([seen(quiet_s=901, longest_s=None)], True),
        # while one gets on, the others may wait for it
        ([seen(0, quiet_s=5), seen(1, quiet_s=3000)], False),
        # what one may take, all may that wait for it
        ([seen(0, quiet_s=400, longest_s=100), seen(1, quiet_s=400)], False),
        ([seen(0, quiet_s=501, longest_s=100), seen(1, quiet_s=600)], True),
        ([], False),
    ],
)
def test_when_no_rank_makes_progress(ranks: list[Seen], hangs: bool):
    assert make_no_progress(ranks, 1000) == hangs


def test_who_looks_into_a_process_for_a_moment_has_not_stopped_it():
    ranks = [seen(0, stopped_since=996.0), seen(1, stopped_since=994.0), seen(2)]
    assert [one.rank for one in stopped_ranks(ranks, 1000)] == [1]


def test_before_a_phase_is_written_it_is_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    impatient(monkeypatch, LOOK_S=0.0)
    (tmp_path / "logs").mkdir()
    watch = HangWatch(RunDirectory(tmp_path), 1.0, ask=lambda seen: None)
    assert watch.look({0: Watched("on n1")}) is None
    monkeypatch.setattr(hangs, "FIRST_TIME_S", 0.0)
    assert re.search(
        rf"no rank has made progress for 0 s: rank 0 is in phase start since {CLOCK}\.",
        watch.look({0: Watched("on n1")}) or "",
    )


ALL_REDUCE = """Current thread 0x00007f (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/x/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/y/sdpo_megatron/trainer/parallel.py", line 200 in any
"""
PIPELINE = """Thread 0x00007f (most recent call first):
  File "/x/megatron/core/pipeline_parallel/p2p_communication.py", line 33 in recv_forward
"""
OWN = """Thread 0x00007e (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/y/sdpo_megatron/run_dir/phases.py", line 80 in _keep_writing

Current thread 0x00007f (most recent call first):
  File "/y/sdpo_megatron/trainer/optimizer.py", line 12 in step
  File "/y/a.py", line 1 in b
  File "/y/a.py", line 1 in c
  File "/y/a.py", line 1 in d
  File "/x/torch/distributed/run.py", line 7 in main
"""


@pytest.mark.parametrize(
    ("stacks", "call"),
    [
        (ALL_REDUCE, "all_reduce"),
        (PIPELINE, "recv_forward"),
        (OWN, None),
        (OWN + ALL_REDUCE, "all_reduce"),
        ("", None),
    ],
)
def test_by_which_call_a_rank_waits_for_others(stacks: str, call: str | None):
    assert waits_in(stacks) == call


def test_the_main_thread_comes_first_and_what_is_alike_once():
    assert (
        folded(OWN + OWN.split("\n\n")[0] + "\n" + ALL_REDUCE).splitlines()[1:3]
        == ALL_REDUCE.splitlines()[1:3]
    )
    idle, main = OWN.split("\n\n")
    shown = folded(f"{idle}\n\n{idle}\n\n{main}")
    assert shown.startswith("thread:\n" + main.splitlines()[1]) and shown.count("in _keep_writing") == 1
    assert "2 threads alike:\n" + idle.splitlines()[1] in shown
    assert folded("") == ""


def test_of_two_answers_the_last_one_counts():
    assert last_answer(OWN + "\n" + ALL_REDUCE) == ALL_REDUCE
    assert last_answer(PIPELINE + "\n" + ALL_REDUCE) == PIPELINE + "\n" + ALL_REDUCE
    assert last_answer("") == ""


def impatient(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    for name, value in {"LOOK_S": 0.1, "STOPPED_S": 0.4, "SLOW_S": 1.0, "STACKS_S": 10.0, **limits}.items():
        monkeypatch.setattr(hangs, name, value)


def test_a_rank_that_is_stopped_is_named_and_the_run_ended_saved(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch, SLOW_S=3600.0)
    assert launch(*project.arguments("wait", "stopped", overrides=(URL, "run.hang_timeout_s=0.5"))) == 1
    assert project.note(1) == "saved"
    named, ended, last = capfd.readouterr().err.splitlines()[-3:]
    pid = project.facts(1)["pid"]
    hang = rf"rank 1 \(process {pid}\) is stopped, by SIGSTOP or a debugger, since {CLOCK}, in phase learn of step 3"
    assert re.fullmatch(
        rf"warning: {hang}\. kill -CONT {pid} lets it go on\. What each rank does: \S+/logs/diagnosis\.txt\. "
        r"Unless that changes, the run is ended in run\.hang_timeout_s=0\.5 s\.",
        named,
    )
    assert re.fullmatch(
        rf"Stopping \(run\.hang_timeout_s=0\.5 s are over: {hang}\): the ranks save and leave\. Ctrl-C .*",
        ended,
    )
    assert last.startswith("error: the run was ended because ranks hung. The same command goes on")
    diagnosis = (project.run / "logs" / "diagnosis.txt").read_text()
    assert re.search(r"rank 1, process .*\nIt is stopped, and cannot say what it is at\.", diagnosis)


def test_a_rank_that_goes_on_is_forgiven(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    process = project.popen("stopped_for_a_moment", overrides=(URL,))
    until(lambda: project.note(0) == "ready")
    assert process.stderr is not None
    line = ""
    while "is stopped" not in line:
        line = process.stderr.readline()
        assert line, "it ended"
    os.kill(project.facts(0)["pid"], signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "error" not in errors


def test_who_waits_for_nobody_is_to_blame(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch)
    settings = (URL, "run.hang_timeout_s=0.5", "run.stop_grace_s=0.5")
    assert launch(*project.arguments("waiting", "silent", overrides=settings)) == 1
    errors = capfd.readouterr().err
    assert re.search(
        rf"warning: no rank has made progress for [12] s: rank 1 is in phase learn of step 3 since {CLOCK} "
        r"\(rank 0 waits for others in all_reduce\)\. ",
        errors,
    ), errors
    assert "Traceback" not in errors and errors.count("no rank has made progress") == 2
    diagnosis = (project.run / "logs" / "diagnosis.txt").read_text().partition("\n")[2]
    # who is to blame comes first
    assert 0 < diagnosis.index("in silent") < diagnosis.index("in all_reduce")
    assert not any(running(project.facts(rank)["pid"]) for rank in (0, 1))


def test_a_disk_that_takes_nothing_keeps_nobody_from_being_named(
    project: Project, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    impatient(monkeypatch, SLOW_S=3600.0)

    def full(*arguments: object, **others: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hangs, "write_atomically", full)
    assert launch(*project.arguments("stopped", overrides=(URL, "run.hang_timeout_s=0.5"))) == 1
    errors = capfd.readouterr().err
    assert "lets it go on. Unless that changes" in errors and "Traceback" not in errors


def test_a_wish_to_stop_reaches_a_rank_that_is_stopped(project: Project):
    process = project.popen("wait", "stopped", overrides=(URL,))
    until(lambda: project.note(0) == project.note(1) == "ready")
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and project.note(1) == "saved"


def test_what_a_rank_did_in_an_earlier_start_is_forgotten(project: Project):
    assert launch(*project.arguments("finish", overrides=(URL,))) == 0
    left = [project.run / "phases" / name for name in ("rank_0.json", "rank_0.stacks")]
    for path in left:
        path.write_text("{}")
    assert launch(*project.arguments("finish", overrides=(URL,))) == 0
    assert not any(path.exists() for path in left)
