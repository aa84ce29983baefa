"""Runs whose graders fail, or are killed. The server is the stand-in, all else is real."""

from pathlib import Path

import pytest

from tests.e2e.running import assert_complete, kill, run, start, tiny_settings

UNLUCKY = "tests.graded_tasks:Unlucky"


@pytest.mark.parametrize("lost", [1.0, 0.4])
def test_failed_grading_stops_no_run_and_is_named(tiny_model, stand_in, tmp_path, lost: float):
    options = {"feedback": "mistake", "lost": lost}
    settings = tiny_settings(
        *(tiny_model(), stand_in, tmp_path),
        task={"env": UNLUCKY, "options": options},
        rollout={"group_size": 4},
        grading={"num_workers": 16},
    )
    running = run(settings, tmp_path)
    assert_complete(running, 3)
    responses = [response for step in range(3) for response in running.responses(step)]
    left = [response for response in responses if response.ungraded]
    assert (len(left) == len(responses)) == (lost == 1.0)
    for response in left:
        assert (response.ungraded, response.reward) == ("the service is not there", None)
        assert response.loss_mask_T is not None and not response.loss_mask_T.any()
        assert response.teacher_prompt is None and response.group_advantage == 0
    rows = running.rows()
    share = sum(row["env/all/ungraded_fraction"] for row in rows[:3]) / 3
    assert share == pytest.approx(len(left) / len(responses))
    if lost == 1.0:
        assert "warning: grading_failed: 8 of this step's 8 responses could not be graded" in running.output()


def graders(host: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{host}/task/{host}/children").read_text().split()]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def host_of(running) -> int:
    """The process that forks graders, a child of rank 0."""
    for pid in children(running.rank_pid(0)):
        if b"envs.grading.host" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("rank 0 has no host of graders")


def test_graders_their_host_and_the_launcher_are_killed_in_mid_grade(tiny_model, stand_in, tmp_path):
    """Killed graders cost a second try; after the launcher the same command goes on. No step is lost or done twice."""
    options = {"feedback": "mistake", "seconds": 2.0}
    settings = tiny_settings(
        *(tiny_model(), stand_in, tmp_path),
        run={"steps": 4},
        task={"env": UNLUCKY, "options": options},
        eval={"every": 100, "problems": 0, "exact_problems": 0},
    )
    running = start(settings, tmp_path)
    running.wait_for_phase("grade", 0)
    for pid in graders(host_of(running))[:2]:
        kill(pid)
    running.wait_for_phase("grade", 1)
    kill(host_of(running))
    running.wait_for_phase("grade", 2)
    orphans = [host_of(running), *graders(host_of(running))]
    kill(running.process.pid)
    running.end()
    assert len(orphans) > 1
    again = run(settings, tmp_path)
    assert_complete(again, 4)
    assert not [pid for pid in orphans if Path(f"/proc/{pid}/cmdline").exists()]
    rows = again.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["env/all/ungraded_fraction"] == 0 for row in rows[:4])
