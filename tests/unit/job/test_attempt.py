"""One attempt of a job, with steps that are played."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.steps import TRAINER, Step
from sdpo_megatron.config import ParallelSettings, ServerSettings
from sdpo_megatron.job import attempt as module
from sdpo_megatron.job.attempt import Allocation, AttemptRun, Signals, plan_steps
from sdpo_megatron.job.description import Job, JobDirectory
from sdpo_megatron.job.fence import Superseded
from sdpo_megatron.launch import hangs
from sdpo_megatron.launch.hangs import Watched
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import Phase
from tests.unit.launch.test_hangs import ALL_REDUCE


@dataclass
class PlayedStep:
    """Ends with `code` after so many looks; `stopped_code` once it was asked to stop, or never."""

    name: str
    looks: int = 10**9
    code: int = 0
    stopped_code: int | None = 143
    deaf: int = 0
    """How many signals do not reach it."""
    signals: list[int] = field(default_factory=list)
    ended: int = 0
    on_look: Any = None

    @property
    def asked(self) -> int:
        return self.signals.count(signal.SIGTERM)

    def exit_code(self) -> int | None:
        self.looks -= 1
        if self.on_look is not None:
            self.on_look()
        if self.asked and self.stopped_code is not None:
            return self.stopped_code
        return self.code if self.looks < 0 else None

    def send(self, number: signal.Signals) -> bool:
        self.deaf -= 1
        if self.deaf >= 0:
            return False
        self.signals.append(number)
        return True

    def end(self) -> None:
        self.ended += 1


@dataclass
class Stage:
    directory: JobDirectory
    steps: dict[str, PlayedStep] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)

    left_s: float = math.inf
    preemption_s: float | None = None
    hang_timeout_s: float = 3600.0
    watched: dict[int, Watched] = field(default_factory=dict)
    job: int = 4
    hosts: tuple[str, ...] = ("a",)

    @property
    def logs(self) -> Path:
        return self.directory.path.parent / "logs"

    def start(self, step: Step, log: Path) -> PlayedStep:
        self.keys.append(self.directory.key.stat().st_mode & 0o777)
        return self.steps[step.name]

    def end_steps(self) -> None:
        raise AssertionError("nothing was killed")

    def time_left_s(self) -> float:
        return self.left_s

    def preemption_grace_s(self) -> float | None:
        return self.preemption_s

    def is_cancelled(self) -> bool:
        return False

    def come_back(self) -> int:
        raise AssertionError("an attempt does not come back by itself")

    def play(self, *played: PlayedStep, grace_s: float = 60.0) -> Any:
        self.steps = {step.name: step for step in played}
        signals = Signals()
        signals.install()
        running = AttemptRun(
            *(self, signals, self.directory.path.parent, self.logs),
            number=2,
            grace_s=grace_s,
            hang_timeout_s=self.hang_timeout_s,
            watched=self.watched,
        )
        return running.run([planned(step.name) for step in played], lambda: 7)


def planned(name: str) -> Step:
    return Step(name=name, hosts=("a",), tasks_per_node=1, command=(), program=(), log="")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(module, "POLL_S", 0.01)
    before = {number: signal.getsignal(number) for number in Signals.WHY}
    (tmp_path / "job").mkdir()
    (tmp_path / "logs").mkdir()
    yield Stage(JobDirectory(tmp_path / "job"))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_trainer_that_finishes_ends_the_servers_and_the_key(stage: Stage):
    # of an attempt whose node was lost
    stage.directory.key.write_text("old")
    ended = stage.play(PlayedStep("server0"), PlayedStep(TRAINER, looks=3))
    assert (ended.why, ended.steps, ended.exit_code) == ("finished", 7, 0)
    assert all(step.ended == 1 for step in stage.steps.values()) and stage.steps["server0"].asked == 0
    assert stage.keys == [0o600, 0o600] and not stage.directory.key.exists()


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGUSR2, "preempted"),
        (signal.SIGTERM, "asked"),
        (signal.SIGINT, "asked"),
        (signal.SIGHUP, "asked"),
    ],
)
def test_a_signal_is_handed_on_once_and_says_why(stage: Stage, number: int, why: str):
    trainer = PlayedStep(TRAINER)
    trainer.on_look = lambda: os.kill(os.getpid(), number) if trainer.looks % 2 else None
    ended = stage.play(PlayedStep("server0"), trainer)
    assert (ended.why, ended.reason) == (why, "") and trainer.asked == 1


def test_the_first_of_two_signals_counts(stage: Stage):
    trainer = PlayedStep(TRAINER)
    signals = [signal.SIGUSR2, signal.SIGTERM]
    trainer.on_look = lambda: os.kill(os.getpid(), signals.pop(0)) if signals else None
    assert stage.play(trainer).why == "preempted" and not signals


def test_a_lost_server_has_the_trainer_save_and_is_the_reason(stage: Stage):
    ended = stage.play(PlayedStep("server1", looks=3, code=1), PlayedStep(TRAINER))
    assert (ended.why, ended.exit_code, ended.reason) == ("failed", 143, "server1 ended with exit code 1")


def test_a_trainer_that_does_not_leave_is_ended(stage: Stage):
    trainer = PlayedStep(TRAINER, stopped_code=None)
    trainer.on_look = lambda: os.kill(os.getpid(), signal.SIGUSR2) if trainer.asked == 0 else None
    ended = stage.play(trainer, grace_s=0.1)
    assert (ended.why, ended.exit_code) == ("failed", 137) and trainer.asked == 1
    assert ended.reason == "the ranks did not leave within hardware.grace_s=0.1 s" and trainer.ended == 1


def test_who_cannot_be_asked_to_stop_yet_is_asked_again(stage: Stage):
    trainer = PlayedStep(TRAINER, deaf=3)
    trainer.on_look = lambda: os.kill(os.getpid(), signal.SIGUSR2) if trainer.deaf == 3 else None
    assert stage.play(trainer).why == "preempted" and trainer.asked == 1 and trainer.deaf == -1


def test_a_rank_that_fails_says_why_in_its_log(stage: Stage):
    (stage.logs / "rank0.log").write_text("stopped: another rank ended (gloo).\n")
    (stage.logs / "rank1.log").write_text("noise\nstopped: The loss is nan at step 3.\nmore noise\n")
    ended = stage.play(PlayedStep(TRAINER, looks=2, code=3))
    assert (ended.why, ended.exit_code, ended.reason) == ("failed", 1, "The loss is nan at step 3.")


def test_a_mistake_that_ends_ranks_is_no_wish_to_stop_though_srun_ends_the_others(stage: Stage):
    (stage.logs / "rank1.log").write_text("error: The teacher is another one.\n")
    (stage.logs / "rank0.log").write_text("stopped: asked to after 2 of 3 steps, which are saved.\n")
    ended = stage.play(PlayedStep(TRAINER, looks=2, code=143))
    assert (ended.why, ended.exit_code, ended.reason) == ("failed", 2, "The teacher is another one.")


def test_a_rank_that_says_nothing(stage: Stage):
    ended = stage.play(PlayedStep(TRAINER, looks=2, code=137))
    assert ended.reason == "the trainer ended with exit code 137"


def metrics(stage: Stage, **seconds: float) -> None:
    row = {"step": 0} | {f"time/{name}": value for name, value in seconds.items()}
    (stage.logs.parent / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def test_a_stop_begins_early_enough_for_what_it_was_measured_to_take(
    stage: Stage, capsys: pytest.CaptureFixture[str]
):
    # 1.5 * (100 + 60) + 30
    metrics(stage, total=1460.0, rollout=300.0, eval=1000.0, checkpoint=60.0)
    stage.left_s, stage.preemption_s = 269.0, 100.0
    trainer = PlayedStep(TRAINER)
    ended = stage.play(trainer)
    assert (ended.why, trainer.asked) == ("preempted", 1)
    out = capsys.readouterr().out
    assert "269 s of the job's time are left, and a stop takes up to 240 s." in out
    assert out.count("warning: a stop of this run takes up to 240 s, and a preemption in this partition") == 1


@pytest.mark.parametrize("left_s", [271.0, math.inf])
def test_nobody_stops_before_that(stage: Stage, left_s: float, capsys: pytest.CaptureFixture[str]):
    metrics(stage, total=460.0, rollout=300.0, checkpoint=60.0)
    stage.left_s, stage.preemption_s = left_s, 1000.0
    trainer = PlayedStep(TRAINER, looks=5)
    assert stage.play(trainer).why == "finished" and trainer.asked == 0
    assert capsys.readouterr().out == ""


def test_before_anything_was_measured_nobody_knows_how_early_to_stop(stage: Stage):
    stage.left_s = 1.0
    assert stage.play(PlayedStep(TRAINER, looks=5)).why == "finished"


def test_what_takes_longer_than_grace_s_is_waited_for(stage: Stage):
    metrics(stage, total=460.0, rollout=300.0, checkpoint=60.0)
    trainer = PlayedStep(TRAINER, stopped_code=None, looks=40)
    trainer.on_look = lambda: os.kill(os.getpid(), signal.SIGUSR2) if trainer.asked == 0 else None
    assert stage.play(trainer, grace_s=0.05).why == "finished"


def test_an_attempt_ends_itself_where_another_has_begun(stage: Stage):
    stage.directory.begun.write_text("4\n")
    trainer = PlayedStep(TRAINER)
    with pytest.raises(Superseded, match="attempt 2 ends: another one of this job has begun"):
        stage.play(trainer)
    # the key is the other one's
    assert trainer.ended == 1 and stage.directory.key.exists()
    stage.directory.begun.write_text("3\n")
    assert stage.play(PlayedStep(TRAINER, looks=3)).why == "finished"


def test_ranks_that_hang_end_the_attempt_with_that_as_its_reason(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"LOOK_S": 0.0, "SLOW_S": 0.0}.items():
        monkeypatch.setattr(hangs, name, value)
    monkeypatch.setattr(module, "ANSWERS_S", 0.3)
    stage.watched, stage.hang_timeout_s = {0: Watched("on n1"), 1: Watched("on n2")}, 0.2
    run = RunDirectory(stage.logs.parent)
    run.phases.mkdir()
    for rank in stage.watched:
        phase = Phase(rank=rank, step=3, phase="learn", since=1e9, progress=1e9, longest_s=0.0)
        run.phase(rank).write_text(json.dumps(asdict(phase)))
        run.stacks(rank).write_text("")
    trainer = PlayedStep(TRAINER)

    def answers() -> None:
        if signal.SIGUSR1 in trainer.signals:
            run.stacks(0).write_text(ALL_REDUCE)

    trainer.on_look = answers
    send = trainer.send
    trainer.send = lambda number: (send(number), answers())[0]  # type: ignore[method-assign]
    ended = stage.play(trainer)
    assert (ended.why, ended.exit_code, ended.reason) == (
        "failed",
        137,
        "rank 1 hangs in phase learn of step 3",
    )
    assert trainer.ended == 1 and trainer.asked == 0
    said = "rank 1 (on n2) does not say what it is at, as where its process is stopped or its machine hangs"
    assert f"warning: {said}, in phase learn of step 3 since " in capsys.readouterr().out
    diagnosis = (run.logs / "diagnosis.txt").read_text()
    assert "rank 1, on n2: in phase learn of step 3, last progress " in diagnosis
    assert "rank 0, on n1: in phase learn of step 3, last progress " in diagnosis
    assert ", waits for others in all_reduce\n" in diagnosis
    assert diagnosis.index("rank 1, on") < diagnosis.index("rank 0, on")


def test_somebody_who_stops_the_trainer_has_asked(stage: Stage):
    assert stage.play(PlayedStep(TRAINER, looks=2, code=143)).why == "asked"


def test_what_does_not_start_leaves_nothing_behind(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    def start(step: Step, log: Path) -> PlayedStep:
        raise OSError("no srun")

    monkeypatch.setattr(stage, "start", start)
    with pytest.raises(OSError, match="no srun"):
        stage.play(PlayedStep(TRAINER))
    assert not stage.directory.key.exists()


def test_the_steps_of_an_attempt(tmp_path: Path):
    hardware = HardwareSettings(nodes=3, placement="separate_nodes", server_nodes=1)
    job = Job(name="x", hardware=hardware, arguments=("/a.yaml", "run.steps=3"), python="/p")
    directory = JobDirectory(tmp_path / "job")
    layout, steps = plan_steps(
        job,
        Allocation(job=11, number=2, hosts=["n1", "n2", "n3"]),
        ParallelSettings(dp=4),
        ServerSettings(),
        directory,
        tmp_path,
    )
    server, trainer = steps
    assert (server.name, server.hosts, trainer.name, trainer.hosts) == (
        "server0",
        ("n3",),
        TRAINER,
        ("n1", "n2"),
    )
    port = layout.master_port
    assert trainer.program[3:] == (
        *(str(directory.begun), "2", "n1", str(port), "-", "/a.yaml", "run.steps=3"),
        *(f"server.urls=[http://n3:{port + 1}]", f"server.api_key_file={directory.key}"),
        "run.stop_grace_s=120",
    )
    assert server.program[3:] == (
        *(str(directory.begun), "2", "n3", str(port + 1), "-", str(directory.key)),
        *(str(tmp_path / "server0.log"), "4", "nobody"),
        *("/a.yaml", "run.steps=3"),
    )


@pytest.mark.parametrize(
    ("placement", "gpus", "settings", "added"),
    [
        ("colocated", 8, {}, ["server.release_memory=true"]),
        ("colocated", 8, {"release_memory": False}, []),
        ("colocated", 8, {"release_memory": True}, []),
        ("colocated", 0, {}, []),
        ("split_node", 8, {}, []),
    ],
)
def test_servers_on_the_trainers_gpus_give_it_their_memory(
    tmp_path: Path, placement: Any, gpus: int, settings: dict[str, bool], added: list[str]
):
    job = Job(
        name="x",
        hardware=HardwareSettings(
            nodes=1,
            gpus_per_node=gpus,
            placement=placement,
            server_gpus_per_node=4 if placement == "split_node" else 0,
        ),
        arguments=("/a.yaml",),
        python="/p",
    )
    _, steps = plan_steps(
        job,
        Allocation(job=11, number=0, hosts=["n1"]),
        ParallelSettings(dp={("colocated", 8): 8, ("split_node", 8): 4}.get((placement, gpus), 1)),
        ServerSettings.model_validate({"tp": 4 if placement == "split_node" else 1} | settings),
        JobDirectory(tmp_path / "job"),
        tmp_path,
    )
    # both sides have to know
    for step in steps:
        program = list(step.program)
        begin = program.index("/a.yaml")
        said = [argument for argument in program[begin:] if "release_memory" in argument]
        assert said == added
