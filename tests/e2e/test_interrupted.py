"""Runs that are killed, stopped or lose their server, and go on. The server is the stand-in, all else is real."""

import json
import os
import shutil
import signal
import time

import httpx
import pytest

from tests.e2e.running import assert_complete, kill, run, start, tiny_settings


def test_killed_in_every_phase_the_same_command_completes(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(tiny_model(), stand_in, tmp_path, run={"steps": 6})
    for step, phase in enumerate(["rollout", "teacher", "learn", "push"], start=1):
        running = start(settings, tmp_path)
        running.wait_for_phase(phase, step)
        kill(running.rank_pid(0))
        assert running.end() == 1
        assert "rank 0 was ended by SIGKILL" in running.output()
    running = start(settings, tmp_path)
    running.wait_for_phase("checkpoint", 4)
    kill(running.process.pid)  # the launcher itself
    running.end()
    running = run(settings, tmp_path)
    assert_complete(running, 6)
    # no step behind a checkpoint lacks its record, and none that was killed left half of one
    for step in range(6):
        assert all(response.response_ids_T is not None for response in running.responses(step))
    assert not [file.name for file in (running.directory / "rollouts").rglob(".*")]
    again = start(settings, tmp_path)
    assert again.end() == 0
    assert "is complete: 6 steps" in again.output()


def fault(running, path: str, kind: str) -> None:
    url = json.loads((running.directory / "servers" / "0.json").read_text())["url"]
    httpx.post(f"{url}/_test/fault", json={"path": path, "kind": kind}).raise_for_status()


def test_a_server_that_dies_or_hangs_is_restarted_with_the_current_weights(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(
        tiny_model(), stand_in, tmp_path, run={"steps": 8}, rollout={"idle_timeout_s": 8.0}
    )
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 0)
    fault(running, "/generate", "hang")  # found in the rollout of step 1
    running.wait_for_phase("learn", 1)
    kill(running.server_pid())  # found in the push of step 1, or later
    running.wait_for_phase("learn", 2)
    fault(running, "/update_weights_from_distributed", "die")
    assert running.end() == 0, running.output()
    assert_complete(running, 8)
    assert json.loads((running.directory / "servers" / "0.json").read_text())["starts"] == 4
    for response in running.responses(7):
        assert {span.version for span in response.weight_spans} == {7}


@pytest.mark.parametrize("path", ["/update_weights_from_distributed", "/pause_generation"])
def test_asked_to_stop_while_a_server_hangs_in_a_push_it_saves_within_seconds(
    tiny_model, stand_in, tmp_path, path
):
    settings = tiny_settings(
        tiny_model(),
        stand_in,
        tmp_path,
        run={"steps": 12},
        checkpoint={"every": 100},
        weight_sync={"timeout_s": 300.0},
    )
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 0)
    fault(running, path, "hang")
    time.sleep(4.0)
    hung = running.phase()
    assert hung["phase"] == "push"
    asked = time.monotonic()
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.end() == 143
    # five of them are the server's to answer after all
    assert time.monotonic() - asked < 30.0
    out = running.output()
    assert f"after {hung['step'] + 1} of 12 steps, which are saved" in out and "Traceback" not in out
    settings["run"]["steps"] = hung["step"] + 2
    assert_complete(run(settings, tmp_path), hung["step"] + 2)


def test_a_push_that_cannot_be_made_ends_the_run_with_its_step_saved(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(
        tiny_model(),
        stand_in,
        tmp_path,
        run={"steps": 12},
        server={"max_restarts": 0},
        checkpoint={"every": 100},
    )
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 0)
    fault(running, "/update_weights_from_distributed", "die")
    assert running.end() == 1
    out = running.output()
    assert "A server was lost 1 times in a row" in out and "Traceback" not in out
    (saved,) = [int(p.name) for p in (running.directory / "checkpoints").iterdir()]
    assert [row["step"] for row in running.rows()] == list(range(saved)) and saved > 0
    settings["run"]["steps"] = saved + 1
    assert_complete(run(settings, tmp_path), saved + 1)


def test_a_server_lost_again_and_again_ends_the_run_clearly(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(tiny_model(), stand_in, tmp_path, server={"max_restarts": 0})
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 0)
    fault(running, "/generate", "die")
    assert running.end() == 1
    out = running.output()
    assert "A server was lost 1 times in a row" in out and "Traceback" not in out


def test_a_teacher_that_changed_meanwhile_is_refused(tiny_model, stand_in, tmp_path):
    """The frozen one, whose directory is model.path's."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    saved = run(tiny_settings(model, stand_in, tmp_path, run={"steps": 1}), tmp_path)
    settings = tiny_settings(model, stand_in, tmp_path, run={"steps": 2})
    shutil.copy(tiny_model(seed=1) / "model.safetensors", model)
    running = start(settings, tmp_path)
    assert running.end() == 2
    out = running.output()
    checkpoint = saved.directory / "checkpoints" / "000001"
    assert f"error: {checkpoint} was made with the teacher's weights in {model} (SHA-256 " in out
    assert f"...), but {model} holds others (SHA-256 " in out and "Traceback" not in out
    model.rename(tmp_path / "elsewhere")
    running = start(settings, tmp_path)
    assert running.end() == 2
    assert running.output().startswith(f"error: model.path: there is no directory {model}; ")
    (tmp_path / "elsewhere").rename(model)
    shutil.copy(tiny_model() / "model.safetensors", model)
    assert_complete(run(settings, tmp_path), 2)
