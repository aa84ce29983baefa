import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo_megatron.config import LogSettings
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Grade, Group, Problem, Rollout
from sdpo_megatron.run_dir.directory import RunDirectory, open_run
from sdpo_megatron.run_dir.log import Log, RunLog
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.run_dir.phases import PhaseFile
from sdpo_megatron.run_dir.records_file import StepRecord, read_record


@pytest.fixture
def directory(tmp_path: Path):
    directory = open_run(tmp_path / "x", {}, {})
    yield directory
    directory.close()


def make_log(
    directory: RunDirectory, first_step: int = 0, report: Callable[[], object] | None = None, **settings
) -> RunLog:
    phases = PhaseFile(directory.phase(0), 0, every_s=0)
    return RunLog(
        directory,
        LogSettings(**settings),
        phases,
        name="x",
        steps=4,
        first_step=first_step,
        memory_root=os.getpid(),
        report=report,
    )


def phase_of(directory: RunDirectory, rank: int) -> list:
    now = json.loads(directory.phase(rank).read_text())
    return [now["rank"], now["step"], now["phase"]]


def test_a_row_holds_what_was_added_and_where_the_time_went(directory: RunDirectory):
    log = make_log(directory)
    with log.step(0):
        with log.timed("rollout"):
            time.sleep(0.1)
        with log.timed("learn"):
            time.sleep(0.02)
        with log.timed("rollout"):
            time.sleep(0.1)
        time.sleep(0.05)
        log.add({"env/all/correct": 0.5, "perf/trained_tokens": 100})
        log.add({"optim/lr": 1e-5})
    log.close()
    (row,) = read_rows(directory.metrics)
    assert (row["step"], row["env/all/correct"], row["optim/lr"]) == (0, 0.5, 1e-5)
    assert row["progress/done_frac"] == 0
    assert 0.2 <= row["time/rollout"] < 0.3 and 0.02 <= row["time/learn"] < 0.1
    assert row["time/rest"] >= 0.05
    assert row["time/total"] == pytest.approx(row["time/rollout"] + row["time/learn"] + row["time/rest"])
    assert row["perf/trained_tokens_per_s"] == pytest.approx(100 / row["time/total"])
    assert "perf/teacher_time_share" not in row
    assert 0.01 < row["memory/all_processes_gib"] < 100


def test_time_between_two_steps_belongs_to_the_later_row(directory: RunDirectory):
    log = make_log(directory)
    with log.step(0):
        log.add({"a": 1})
        with log.timed("rollout"):
            time.sleep(0.01)
    with log.timed("checkpoint"):
        time.sleep(0.05)
    with log.step(1):
        log.add({"a": 2})
        with log.timed("teacher"):
            time.sleep(0.01)
    log.close()
    first, second = read_rows(directory.metrics)
    assert second["perf/teacher_time_share"] == pytest.approx(second["time/teacher"] / second["time/total"])
    assert "time/checkpoint" not in first and "time/rollout" not in second
    assert second["time/checkpoint"] >= 0.05 and second["time/total"] >= second["time/checkpoint"]
    assert (first["a"], second["a"]) == (1, 2)
    assert second["progress/done_frac"] == 0.25


def test_a_step_that_failed_has_no_row(directory: RunDirectory):
    log = make_log(directory)
    with pytest.raises(RuntimeError), log.step(0):
        raise RuntimeError("server lost")
    log.close()
    assert read_rows(directory.metrics) == []


def test_a_metric_is_added_once(directory: RunDirectory):
    log = make_log(directory)
    log.add({"a": 1, "b": 1})
    with pytest.raises(ValueError, match="added twice in step 0: b"):
        log.add({"b": 2})
    log.close()


def test_after_a_resume_every_step_is_there_once(directory: RunDirectory):
    for first_step in (0, 2):
        log = make_log(directory, first_step)
        for step in range(first_step, 4):
            with log.step(step):
                log.add({"from": first_step})
        log.close()
    assert [(row["step"], row["from"]) for row in read_rows(directory.metrics)] == [
        (0, 0),
        (1, 0),
        (2, 2),
        (3, 2),
    ]


def test_phases_of_rank_0_and_of_others(directory: RunDirectory):
    logs = {0: make_log(directory), 1: Log(PhaseFile(directory.phase(1), 1, every_s=0), 0)}
    for rank, log in logs.items():
        with log.step(0):
            with log.timed("learn"):
                assert phase_of(directory, rank) == [rank, 0, "learn"]
            assert phase_of(directory, rank) == [rank, 0, "rest"]
        log.add({"a": 1})
        log.record("train", responses())
        log.settle()
        log.message("")
        log.close()


def responses(*texts: str) -> StepRecord:
    rollouts_G = [
        Rollout(
            prompt_ids=[],
            response_ids_T=[],
            rollout_logprobs_T=[],
            loss_mask_T=[],
            weight_spans=[],
            finish_reason="stop",
            text=text,
        )
        for text in texts
    ]
    grades_G = [Grade(reward=0.0)] * len(texts)
    return StepRecord(
        groups_P=[Group(problem=Problem(id="", messages=[]), rollouts_G=rollouts_G, grades_G=grades_G)]
    )


@pytest.mark.parametrize("waiting", ["settle", "finish", "close"])
def test_records_are_there_once_they_were_waited_for(directory: RunDirectory, waiting: str):
    log = make_log(directory)
    with log.step(0):
        log.record("train", responses("né", "b"))
        log.record("eval", responses("c"))
    getattr(log, waiting)()
    assert [r.response for r in read_record(directory.rollouts("train", 0))] == ["né", "b"]
    assert [r.response for r in read_record(directory.rollouts("eval", 0))] == ["c"]
    log.close()


def test_a_record_that_cannot_be_written_is_one_warning_and_training_goes_on(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    log = make_log(directory)
    folder = directory.rollouts("train", 0).parent
    folder.parent.mkdir(exist_ok=True)
    folder.touch()
    for step in range(3):
        if step == 2:
            folder.unlink()
        with log.step(step):
            log.record("train", responses("a"))
        log.settle()
    log.close()
    assert [row["step"] for row in read_rows(directory.metrics)] == [0, 1, 2]
    assert [file.name for file in folder.iterdir()] == ["000002.jsonl"]
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("warning: writing ") == 1 and "000000.jsonl failed (" in output
    assert "training goes on, and later steps' records are tried again." in output


def test_responses_are_also_one_json_file_a_step(directory: RunDirectory):
    log = make_log(directory, rollout_json_export=True)
    with log.step(0):
        log.record("train", responses("a"))
        log.record("eval", responses("b"))
    with log.step(1):
        log.record("train", StepRecord(groups_P=[]))
    log.close()
    for split, said in (("train", "a"), ("eval", "b")):
        content = json.loads(directory.rollouts(split, 0).with_suffix(".json").read_text())
        assert (content["split"], content["responses"][0]["response"]) == (split, said)
    assert not directory.rollouts("train", 1).with_suffix(".json").exists()
    # without the setting nothing of an earlier try stays beside the record of a later one
    log = make_log(directory)
    log.record("train", responses("c"))
    log.close()
    assert not directory.rollouts("train", 0).with_suffix(".json").exists()


def test_the_report_is_made_beside_training_of_records_that_are_on_the_disk(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    seen: list[list[str]] = []
    page = directory.report / "index.html"

    def report() -> None:
        seen.append(sorted(path.name for path in (directory.path / "rollouts/train").glob("*.jsonl")))
        page.parent.mkdir(exist_ok=True)
        page.touch()

    log = make_log(directory, report=report, report_every=2)
    for step in range(3):
        with log.step(step):
            log.record("train", responses("a"))
        log._reporter.settle()
    log.finish()
    assert [len(names) for names in seen] == [2, 3]
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"Report: {page}  {page.resolve().as_uri()}"


def test_a_report_that_is_slow_does_not_hold_training_up(directory: RunDirectory):
    go_on, calls = threading.Event(), []

    def report() -> None:
        calls.append(1)
        go_on.wait(20)

    log = make_log(directory, report=report, report_every=1)
    began = time.monotonic()
    for step in range(4):
        with log.step(step):
            pass
    assert time.monotonic() - began < 5
    go_on.set()
    log.finish()
    # the one that was being made, one that waited, and the last
    assert len(calls) <= 3


def test_a_report_that_fails_is_a_warning_and_training_goes_on(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    def report() -> None:
        raise OSError(28, "No space left on device")

    log = make_log(directory, report=report, report_every=1)
    for step in range(3):
        with log.step(step):
            log._reporter.settle()
    log.finish()
    assert [row["step"] for row in read_rows(directory.metrics)] == [0, 1, 2]
    output = " ".join(capsys.readouterr().out.split())
    assert (
        output.count("warning: writing the report failed (OSError: [Errno 28] No space left on device)") == 1
    )
    assert "Report: " not in output


def test_without_the_setting_no_report_is_made(directory: RunDirectory):
    log = make_log(directory, report=lambda: pytest.fail("made"))
    with log.step(0):
        pass
    log.finish()


def test_rollouts_can_be_switched_off(directory: RunDirectory):
    log = make_log(directory, rollouts=False)
    log.record("train", responses("a"))
    log.close()
    assert not directory.rollouts("train", 0).exists()


def test_the_end_shows_the_table_and_the_path(directory: RunDirectory, capsys: pytest.CaptureFixture[str]):
    log = make_log(directory)
    with log.step(0):
        log.add({"test/exact_answer_prob": 0.25})
    log.finish()
    log.close()
    shown = capsys.readouterr().out
    assert "step 0/4" in shown and "Before and after" in shown and "0.250 (step 0)" in shown
    assert shown.rstrip().endswith(f"Run directory: {directory.path}")


def test_tensorboard(directory: RunDirectory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step in (0, 1):
        log = make_log(directory, first_step, tensorboard=True)
        for step in range(first_step, 2):
            with log.step(step):
                log.add({"a": float(step + 10 * first_step)})
        log.close()
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("a")] == [(0, 0.0), (1, 11.0)]


def test_wandb_offline(directory: RunDirectory):
    """In a process of its own: W&B leaves a service running until the process ends."""
    source = """
import os
import sys
from pathlib import Path
from sdpo_megatron.config import LogSettings
from sdpo_megatron.run_dir.phases import PhaseFile
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.log import RunLog
directory = RunDirectory(Path(sys.argv[1]))
phases = PhaseFile(directory.phase(0), 0, 1.0)
log = RunLog(
    directory, LogSettings(wandb="offline"), phases, name="x", steps=1, first_step=0, memory_root=os.getpid()
)
with log.step(0):
    log.add({"a": 1.0})
log.close()
"""
    command = [sys.executable, "-c", source, str(directory.path), "hunter2=hunter2"]
    subprocess.run(command, check=True, timeout=120)
    # it would record the command line
    recorded = [path.read_bytes() for path in (directory.path / "wandb").rglob("*") if path.is_file()]
    assert not any(b"hunter2" in content for content in recorded)
    assert len(list((directory.path / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert len((directory.path / "wandb_run_id").read_text()) == 16


@pytest.mark.parametrize(
    "package, settings", [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})]
)
def test_a_missing_package_is_named(directory, monkeypatch: pytest.MonkeyPatch, package: str, settings: dict):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=f"^log.{package} is on, but the package {package} is not installed; run: pip"
    ):
        make_log(directory, **settings)


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    """Its service died, or its disk is full."""

    class Dying:
        name = "W&B"
        rows: list[int] = []

        def write(self, row):
            self.rows.append(row["step"])
            if row["step"]:
                raise BrokenPipeError("the service\nis gone")

        def close(self):
            raise AssertionError("it is left alone")

    log = make_log(directory)
    log._trackers.append(Dying())
    for step in range(3):
        with log.step(step):
            log.add({"a": 1.0})
    log.close()
    assert [row["step"] for row in read_rows(directory.metrics)] == [0, 1, 2] and Dying.rows == [0, 1]
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("warning: W&B failed (BrokenPipeError: the service is gone)") == 1
