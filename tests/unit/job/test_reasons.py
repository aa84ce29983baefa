"""Why an attempt failed, by the logs of its parts."""

from pathlib import Path

import pytest

from sdpo_megatron.job.reasons import Reason, log_of, reason_in, server_reason

TRACEBACK = """noise
Traceback (most recent call last):
  File "a.py", line 3, in f
    g()
  File "a.py", line 9, in g
    raise ValueError("the 1st\\n2nd")
ValueError: the 1st
2nd
"""
LOST = "stopped: another rank ended (gloo); its own last lines say why.\n"
SRUN = """srun: launch/slurm: _step_signal: Terminating StepId=7.1
srun: error: n3: task 2: Exited with exit code 3
srun: error: n1: tasks 0-1: Terminated
srun: error: n2: task 1: {}
"""


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        ({"rank0.log": LOST, "rank1.log": "x\nstopped: The loss is nan.\n"}, "The loss is nan."),
        ({"rank2.log": "error: b\n", "rank10.log": "error: a\n"}, "b"),
        ({"rank0.log": "error: lost. The same command goes on from the newest checkpoint.\n"}, "lost."),
        ({"rank0.log": LOST, "rank1.log": TRACEBACK}, "ValueError: the 1st"),
        ({"rank0.log": TRACEBACK, "rank1.log": "stopped: full.\n"}, "full."),
        # srun kills who is left
        ({"rank1.log": TRACEBACK, "srun_trainer.log": SRUN.format("Killed")}, "ValueError: the 1st"),
        ({"rank0.log": LOST, "srun_trainer.log": SRUN.format("Killed")}, "a rank on n2 ended: Killed"),
        (
            {"srun_trainer.log": SRUN.format("Segmentation fault (core dumped)")},
            "a rank on n2 ended: Segmentation fault",
        ),
        ({"srun_trainer.log": SRUN.format("Exited with exit code 1")}, ""),
        ({"srun_trainer.log": "srun: error: Node failure on n2\n"}, "node n2 failed"),
        ({"rank0.log": LOST}, ""),
        ({"rank0.log": "stopped: asked to after 2 of 3 steps, which are saved.\n"}, ""),
        ({}, ""),
    ],
)
def test_the_reason(tmp_path: Path, logs: dict[str, str], reason: str):
    for name, text in logs.items():
        (tmp_path / name).write_text(text)
    found = reason_in(tmp_path)
    assert (found.text if found else "") == reason


def test_a_mistake_of_the_users_is_told_from_what_may_go_well_the_next_time(tmp_path: Path):
    for sign, code in {"error": 2, "stopped": 1}.items():
        (tmp_path / "rank0.log").write_text(f"{sign}: x\n")
        assert reason_in(tmp_path) == Reason("x", code)


def test_the_log_that_says_it(tmp_path: Path):
    for name, text in {
        "rank0.log": LOST,
        "rank1.log": "stopped: full.\n",
        "server0.log": "no memory\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert log_of(tmp_path, "full.").name == "rank1.log"
    assert log_of(tmp_path, "no memory").name == "server0.log"
    assert log_of(tmp_path, "elsewhere").name == log_of(tmp_path, "").name == "rank0.log"


def test_why_a_server_ended(tmp_path: Path):
    assert server_reason(tmp_path, "server0", 9) == "server0 ended with exit code 9"
    said = "up\nerror: The server at http://n3:15001 did not come up; see server0.log.\nTraceback\n"
    (tmp_path / "server0.out").write_text(said)
    assert server_reason(tmp_path, "server0", 2) == "server0: The server did not come up; see server0.log."
    (tmp_path / "server0.out").write_text(f"error: no weights; the end of its log {tmp_path}/server0.log:\n")
    assert server_reason(tmp_path, "server0", 2) == "server0: no weights; the end of its log server0.log"


def test_what_differs_from_attempt_to_attempt_is_no_part_of_it(tmp_path: Path):
    (tmp_path / "rank1.log").write_text(
        f"stopped: the server at http://n3:15001 did not answer /x in time: it hangs; see {tmp_path}/server0.log\n"
    )
    found = reason_in(tmp_path)
    assert found == Reason("the server did not answer /x in time: it hangs; see server0.log", 1)
    assert found and log_of(tmp_path, found.text).name == "rank1.log"
