"""Runs that are interrupted in a rollout, or before what it gave is saved: the servers are asked for what is missing
alone, and nothing else shows. The server is the stand-in, all else is real."""

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdpo_megatron.run_dir.inflight import _read
from tests.e2e.running import Running, assert_complete, run, start, tiny_settings

PROBLEMS, RESPONSES = 4, 2
EVERY = PROBLEMS * RESPONSES


def settings_of(model: Path, stand_in: Path, directory: Path, *, repeatable: bool = True) -> dict[str, Any]:
    return tiny_settings(
        *(model, stand_in, directory),
        rollout={
            "problems_per_step": PROBLEMS,
            "group_size": RESPONSES,
            "max_tokens": 6,
            "max_concurrent_requests": 2,
        },
        server={
            "python": str(stand_in),
            "start_timeout_s": 120.0,
            "args": ["--repeatable"] if repeatable else [],
        },
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, stand_in, tmp_path_factory: pytest.TempPathFactory) -> Running:
    directory = tmp_path_factory.mktemp("uninterrupted")
    return run(settings_of(tiny_model(), stand_in, directory), directory)


def kept(running: Running, step: int) -> dict[tuple[int, int], list[int]]:
    """The tokens of the step's responses that are on the disk."""
    path = running.directory / "rollouts" / "inflight" / f"{step:06d}" / "responses.jsonl"
    found = _read(path, [[]] * PROBLEMS)
    return {place: list(response.response_ids_T) for place, response in found.items()}


def learned(running: Running, step: int) -> dict[tuple[int, int], list[int]]:
    tokens = [response.response_ids_T for response in running.responses(step)]
    return {divmod(i, RESPONSES): list(ids) for i, ids in enumerate(tokens) if ids is not None}


def asked_for(running: Running, version: int) -> list[int]:
    """How many responses of these weights each start of the server was asked for."""
    (log,) = (running.directory / "logs").glob("server*.log")
    starts = log.read_text().split("server_args=")[1:]
    return [
        sum(line.startswith("sampling for ") and line.endswith(f"-{version}") for line in start.splitlines())
        for start in starts
    ]


def numbers(running: Running) -> list[dict[str, float]]:
    """The rows without what is measured by a clock, or says that responses were used again."""
    clocks = ("time/", "memory/", "perf/", "rollout/reused_count")
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(clocks) and not name.endswith("_s")
        }
        for row in running.rows()
    ]


def interrupt_rollout(settings: dict[str, Any], directory: Path, number: int, victim: str) -> Running:
    """Some responses of step 1 are there and others not when the victim is sent a signal."""
    running = start(settings, directory)
    running.wait_for(lambda: running.phase()["phase"] not in ("", "start", "server_start"), "a server")
    # long before step 1: the machine may have other work
    fault = {"path": "/generate", "kind": "slow", "seconds": 0.2}
    httpx.post(f"{running.server_url()}/_test/fault", json=fault).raise_for_status()
    running.wait_for(lambda: len(kept(running, 1)) >= 2, "two responses of step 1")
    os.kill(running.process.pid if victim == "launcher" else running.rank_pid(0), number)
    running.end()
    assert "Traceback" not in running.output()
    return running


@pytest.mark.parametrize(
    ("number", "victim"),
    [(signal.SIGTERM, "launcher"), (signal.SIGKILL, "launcher"), (signal.SIGKILL, "rank 0")],
)
def test_after_an_interruption_in_a_rollout_only_what_is_missing_is_asked_for(
    tiny_model, stand_in, tmp_path, uninterrupted, number, victim
):
    settings = settings_of(tiny_model(), stand_in, tmp_path)
    before = kept(interrupt_rollout(settings, tmp_path, number, victim), 1)
    assert 2 <= len(before) < EVERY
    running = start(settings, tmp_path)
    assert running.end() == 0
    out = running.output()
    assert f"{len(before)} of {EVERY} responses of step 1 were sampled before the interruption" in out
    assert_complete(running, 3)
    assert asked_for(running, 1)[-1] == EVERY - len(before)
    assert [row.get("rollout/reused_count") for row in running.rows()] == [None, len(before), None, None]
    assert numbers(running) == numbers(uninterrupted)
    for step in range(3):
        assert learned(running, step) == learned(uninterrupted, step)
        for response in running.responses(step):
            assert {span.version for span in response.weight_spans} == {step}
    # they have done their work
    assert not (running.directory / "rollouts" / "inflight").exists()


def test_responses_that_would_not_come_again_are_learned_from_as_they_were(tiny_model, stand_in, tmp_path):
    """By chance the others would be sampled otherwise. Killed between a rollout and its checkpoint, all are there."""
    settings = settings_of(tiny_model(), stand_in, tmp_path, repeatable=False)
    before = kept(interrupt_rollout(settings, tmp_path, signal.SIGTERM, "launcher"), 1)
    running = start(settings, tmp_path)
    running.wait_for(lambda: len(kept(running, 1)) == EVERY, "all responses of step 1")
    os.kill(running.process.pid, signal.SIGKILL)
    running.end()
    after = kept(running, 1)
    assert len(after) == EVERY and before.items() <= after.items()
    running = run(settings, tmp_path)
    assert_complete(running, 3)
    assert learned(running, 1) == after
    first, second, third = asked_for(running, 1)
    assert first >= len(before) and (second, third) == (EVERY - len(before), 0)
    assert running.rows()[1]["rollout/reused_count"] == EVERY


def test_steps_that_were_not_saved_are_sampled_anew_from_the_first_on(
    tiny_model, stand_in, tmp_path, uninterrupted
):
    """Killed in step 2 with no checkpoint since the beginning: step 0's responses are there, those of step 2 are of
    weights that are no more."""
    settings = settings_of(tiny_model(), stand_in, tmp_path) | {"checkpoint": {"every": 100}}
    running = start(settings, tmp_path)
    running.wait_for_phase("learn", 2)
    os.kill(running.rank_pid(0), signal.SIGKILL)
    running.end()
    assert (len(kept(running, 0)), len(kept(running, 1)), len(kept(running, 2))) == (EVERY, 0, EVERY)
    running = start(settings, tmp_path)
    assert running.end() == 0
    out = running.output()
    assert (
        f"step 2's responses of before the interruption ({EVERY}) are not used: the run goes on from step 0"
        in out
    )
    assert f"{EVERY} of {EVERY} responses of step 0 were sampled before" in out
    assert asked_for(running, 1)[-1] == asked_for(running, 2)[-1] - 2 == EVERY
    assert numbers(running) == numbers(uninterrupted)


def test_a_changed_request_takes_nothing_of_before(tiny_model, stand_in, tmp_path):
    settings = settings_of(tiny_model(), stand_in, tmp_path)
    before = kept(interrupt_rollout(settings, tmp_path, signal.SIGTERM, "launcher"), 1)
    settings["rollout"]["temperature"] = 0.9
    running = start(settings, tmp_path)
    assert running.end() == 0
    out = running.output()
    assert f"({len(before)}) are not used: what is asked is not the same now" in out
    assert asked_for(running, 1)[-1] == EVERY
    assert_complete(running, 3)


def test_in_bfloat16_another_layout_goes_on_with_the_responses(tiny_model, stand_in, tmp_path):
    """Weights that were rounded, saved, and loaded by two stages are the same to the last bit."""
    settings = settings_of(tiny_model(), stand_in, tmp_path)
    settings["model"]["dtype"] = "bfloat16"
    before = kept(interrupt_rollout(settings, tmp_path, signal.SIGTERM, "launcher"), 1)
    settings["parallel"]["pp"] = 2
    running = run(settings, tmp_path)
    assert_complete(running, 3)
    assert running.rows()[1]["rollout/reused_count"] == len(before)
    assert before.items() <= learned(running, 1).items()
    assert asked_for(running, 1)[-1] == EVERY - len(before)
