"""The loop does its phases in the documented order, saves what it must, and leaves when it is asked to."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sdpo_megatron.errors import RunFailed, TeacherRefused
from sdpo_megatron.stopping import Stopped
from sdpo_megatron.train import train


class FakeRun:
    """Writes down what the loop asks for."""

    def __init__(self, *, first_step=0, steps=2, eval_every=2, save_every=2, **when):
        self.first_step, self.steps = first_step, steps
        self.eval_every, self.save_every = eval_every, save_every
        """`when`: `stop_in`, `stop_after`, `refuse_in` and `push_fails_in`, each a step."""
        self.stop_in, self.stop_after = when.get("stop_in"), when.get("stop_after")
        self.refuse_in = when.get("refuse_in")
        self.push_fails_in = when.get("push_fails_in", -1)
        self.calls: list[str] = []
        self.serving = self.log = self
        self.failure = None
        self.completed = first_step

    @contextmanager
    def step(self, step):
        self.calls.append(f"step {step}")
        yield
        self.calls.append(f"row {step}")

    @contextmanager
    def timed(self, phase):
        self.calls.append(phase)
        yield

    def add(self, metrics):
        pass

    def push(self, step=None, *, version=None):
        """The run's after a step, and the serving's before the first."""
        self.calls.append(f"push version {version if step is None else step + 1}")
        if step == self.push_fails_in:
            self.failure = RunFailed("the servers are lost")

    def grading(self, step):
        return SimpleNamespace(begin=f"grading of {step}")

    def submit(self, step, grading):
        self.calls.append(f"submit {step}")
        return f"ticket of {step}", grading.begin

    def collect(self, ticket):
        assert ticket == (f"ticket of {self.completed}", f"grading of {self.completed}")
        if self.stop_in == self.completed:
            raise Stopped
        return []

    def release_memory(self):
        self.calls.append("release_memory")

    def grade(self, grading):
        assert grading.begin == f"grading of {self.completed}"
        return []

    def samples(self, grading):
        assert grading.begin == f"grading of {self.completed}"
        return []

    def batch(self, samples):
        return SimpleNamespace(mini_batches=["first", "second"])

    def teach(self, batch, mini_batch):
        return f"teaching of the {mini_batch}"

    def learn(self, step, batch, mini_batch, teaching):
        assert teaching == f"teaching of the {mini_batch}"
        if step == self.refuse_in:
            raise TeacherRefused("worse")
        self.calls.append(mini_batch)

    def end_batch(self, step, batch):
        self.completed = step + 1

    def record(self, groups, batch):
        self.calls.append("record")

    def evaluate(self):
        self.calls.append("evaluate")

    def asked_to_stop(self):
        return self.completed == self.stop_after or self.failure is not None

    def raise_failure(self):
        if self.failure is not None:
            raise self.failure

    def save(self):
        self.calls.append(f"save {self.completed}")

    def finish(self):
        self.calls.append("finish")


def step_calls(step: int, evaluates: bool) -> list[str]:
    return [
        f"step {step}",
        *(["evaluate"] if evaluates else []),
        "rollout",
        f"submit {step}",
        # what learns has the servers' memory
        "release_memory",
        "grade",
        "reprompt",
        "pack",
        *("teacher", "learn", "first", "teacher", "learn", "second"),
        f"push version {step + 1}",
        "record",
        f"row {step}",
    ]


def test_a_whole_run_in_order():
    run: Any = FakeRun()
    assert train(run)
    assert run.calls == [
        "push",
        "push version 0",
        *step_calls(0, evaluates=True),
        *step_calls(1, evaluates=False),
        "save 2",
        "step 2",
        "evaluate",
        "row 2",
        "finish",
    ]


def test_a_resumed_run_starts_with_its_own_weights():
    run: Any = FakeRun(first_step=3, steps=4, eval_every=10)
    train(run)
    assert run.calls[:3] == ["push", "push version 3", "step 3"]
    assert "save 4" in run.calls


def test_a_finished_but_not_evaluated_run_only_evaluates():
    run: Any = FakeRun(first_step=2)
    train(run)
    assert run.calls == ["push", "push version 2", "step 2", "evaluate", "row 2", "finish"]


@pytest.mark.parametrize("done", [0, 1])
def test_stopped_while_waiting_for_rollouts_saves_what_is_complete(done):
    run: Any = FakeRun(stop_in=done)
    assert not train(run)
    assert run.calls[-1] == f"save {done}"
    assert f"row {done}" not in run.calls and "finish" not in run.calls


def test_asked_to_stop_after_a_step_saves_and_leaves():
    run: Any = FakeRun(steps=5, save_every=5, stop_after=1)
    assert not train(run)
    assert run.calls[-2:] == ["row 0", "save 1"]


def test_a_push_that_fails_ends_the_run_with_its_step_recorded_and_saved():
    run: Any = FakeRun(steps=5, save_every=5, push_fails_in=1)
    with pytest.raises(RunFailed, match="the servers are lost"):
        train(run)
    assert run.calls[-4:] == ["push version 2", "record", "row 1", "save 2"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_refused_teacher_loses_no_step(step):
    run: Any = FakeRun(steps=5, save_every=5, refuse_in=step)
    with pytest.raises(TeacherRefused):
        train(run)
    assert run.calls[-1] == f"save {step}" and "first" not in run.calls[-3:]
