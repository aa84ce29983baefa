"""A run: its parts, and what each line of `train.train` asks of them. `build.build_run` wires it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sdpo_megatron.algorithm.examination import TeacherExaminer, judged_responses
from sdpo_megatron.algorithm.guards import Guards
from sdpo_megatron.algorithm.metrics import environment_metrics, group_metrics
from sdpo_megatron.algorithm.reach import reach_of
from sdpo_megatron.algorithm.reprompt import RepromptSettings, build_samples, reprompt_metrics
from sdpo_megatron.chat import Chat
from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.grading.step import Grader, Grading
from sdpo_megatron.envs.grading.thread import BackgroundThread
from sdpo_megatron.envs.remarks import Remarks
from sdpo_megatron.errors import PeerLost, PolicyBroken, ReportedError, TeacherRefused
from sdpo_megatron.evaluation.in_training import Evaluator
from sdpo_megatron.problems import ProblemOrder
from sdpo_megatron.records import Group, Problem, Rollout, Sample
from sdpo_megatron.rollout.ticket import Place, SampleRequest, Ticket
from sdpo_megatron.run_dir.inflight import InflightResponses
from sdpo_megatron.run_dir.log import Log
from sdpo_megatron.run_dir.records_file import StepRecord
from sdpo_megatron.serving.recovery import Serving
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.trainer.batch import Batch, MiniBatch
from sdpo_megatron.trainer.kept_states import Teaching
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.step import Learner
from sdpo_megatron.trainer.teacher import Teacher


@dataclass(kw_only=True)
class Run:
    """The parts of a run. Every rank holds one, and all call its methods together; lists of groups are rank 0's and
    empty elsewhere."""

    first_step: int
    steps: int
    eval_every: int
    save_every: int
    stop_grace_s: float
    """What a stop allows for the end of a phase and for saving."""
    log: Log
    parallel: ParallelState
    problems: Sequence[Problem]
    order: ProblemOrder
    env: Environment
    grader: Grader
    inflight: InflightResponses | None
    """The responses of the step under way, on the disk; rank 0's."""
    chat: Chat
    serving: Serving
    evaluator: Evaluator
    teacher: Teacher | None
    """The teacher; None where the loss has no use for one."""
    learner: Learner
    examiner: TeacherExaminer
    guards: Guards
    remarks: Remarks
    stop: StopRequest
    rollout: RolloutSettings
    recorded_groups: int
    """Groups of a step whose numbers per token are recorded."""
    reprompt: RepromptSettings
    seed: int
    """The run's: what is drawn for a step is a function of both."""
    max_context_length: int
    save_state: Callable[[int], None]
    """Saves everything after that many completed steps."""
    export: Callable[[], None]
    completed: int
    """Training steps that the weights have seen."""
    saved: int
    """Training steps of the newest checkpoint; 0 for none."""
    preparing: BackgroundThread = dataclasses.field(default_factory=lambda: BackgroundThread("samples"))
    """Makes samples of the groups that are graded."""
    failure: ReportedError | None = None
    """Why the servers do not have the current weights."""
    _grace_is_short: bool = False
    _step_metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def requests(self, step: int) -> list[SampleRequest]:
        """Returns what step `step` asks, a pure function of the step, on rank 0, and an empty list elsewhere."""

        def tokenised() -> list[SampleRequest]:
            problems = self._problems_of(step) if self.parallel.is_main else []
            return [
                SampleRequest(
                    id=problem.id,
                    prompt_ids=self.chat.prompt_ids(problem.messages, problem.tools),
                    n=self.rollout.group_size,
                    temperature=self.rollout.temperature,
                    max_tokens=self.rollout.max_tokens,
                )
                for problem in problems
            ]

        return self.parallel.everywhere(tokenised)

    def submit(self, step: int, grading: Grading[list[Sample]]) -> Ticket:
        """Has the step's responses sampled, each kept on the disk and graded as it arrives. Those that an interruption
        left there, sampled from the same weights, are taken as they are; `rollout/reused_count` says how many."""
        requests = self.requests(step)
        asked = self.serving.asked(requests)
        if self.inflight is None or not asked:
            return self.serving.submit(requests, grading.begin)
        done = self.inflight.begin(step, asked, [request.prompt_ids for request in requests])
        if done:
            every = sum(request.n for request in requests)
            self.log.message(
                f"{len(done)} of {every} responses of step {step} were sampled before the interruption and are used "
                "again."
            )
            self.log.add({"rollout/reused_count": len(done)})
        for place, rollout in done.items():
            grading.begin(place, rollout)
        keep = self.inflight.keep

        def arrived(place: Place, rollout: Rollout) -> None:
            keep(place, rollout)
            grading.begin(place, rollout)

        return self.serving.submit(requests, arrived, done)

    def grading(self, step: int) -> Grading[list[Sample]]:
        """Returns what grades the step's responses as they arrive, and makes samples of each group that is graded."""
        problems = self._problems_of(step) if self.parallel.is_main else []

        def prepare(p: int, group: Group, samples: Future[list[Sample]]) -> None:
            self.preparing.run(lambda: self._samples_of(step, p, group), samples)

        return Grading(problems, self.grader, self.rollout.group_size, prepare)

    def grade(self, grading: Grading) -> list[Group]:
        """Returns the step's graded groups on rank 0, and an empty list elsewhere."""
        graded_P = grading.join()
        threshold = self.reprompt.success_reward_threshold
        if graded_P:
            self._note(environment_metrics(graded_P, threshold) | group_metrics(graded_P, threshold))
            for remark in self.remarks.of(graded_P):
                self.log.message(f"warning: {remark}")
        return graded_P

    def samples(self, grading: Grading[list[Sample]]) -> list[Sample]:
        """Returns the step's samples on rank 0, and an empty list elsewhere."""

        def built() -> list[Sample]:
            samples = [sample for group in grading.prepared() for sample in group]
            if self.parallel.is_main:
                self.log.add(reprompt_metrics(samples))
            return samples

        return self.parallel.everywhere(built)

    def batch(self, samples: list[Sample]) -> Batch:
        """Returns this rank's part of rank 0's samples."""
        return self.learner.begin(samples)

    def teach(self, batch: Batch, mini_batch: MiniBatch) -> Teaching | None:
        """Returns what the teacher's passes left, None where the loss has no use for a teacher."""
        if self.teacher is None:
            return None
        return self.teacher.teach(mini_batch.own_samples, batch.ragged)

    def learn(self, step: int, batch: Batch, mini_batch: MiniBatch, teaching: Teaching | None) -> None:
        # later mini-batches meet weights that the first has moved
        first = self.teacher is not None and mini_batch is batch.mini_batches[0]
        batch.examined = first and self.parallel.share(self.examiner.is_due(step))

        def before_update() -> None:
            if batch.examined:
                self.examine_teacher(step, batch)

        self.learner.learn(batch, mini_batch, teaching, step, before_update)
        if self.teacher is not None:
            self.teacher.update_after("optimizer_step")

    def examine_teacher(self, step: int, batch: Batch) -> None:
        """Examines the teacher by what the models have said of the batch so far.

        Raises TeacherRefused, on all ranks, where it is worse than its student and the settings refuse that."""
        seen = batch.gathered(("computed", "student", "teacher", "unreached"), self.parallel)

        def judge() -> None:
            if not self.parallel.is_main:
                return
            samples, end_ids = batch.step_samples, set(self.chat.stop_token_ids)
            responses = judged_responses(
                *(samples, seen), end_ids=end_ids, group_size=self.rollout.group_size, step=step
            )
            finding = self.examiner.examine(responses, reach_of(samples, seen, end_ids))
            if finding.refused:
                raise TeacherRefused(finding.line)
            self.log.add(finding.metrics)
            for line in filter(None, (finding.line, finding.warning)):
                self.log.message(line)

        self.parallel.everywhere(judge)

    def end_batch(self, step: int, batch: Batch) -> None:
        """Ends the batch: updates the teacher, and gives the metrics and the warnings to the log."""
        self.completed = step + 1
        if self.teacher is not None:
            self.teacher.update_after("batch")
        metrics = self.learner.metrics(batch)
        if self.parallel.is_main:
            self._note(metrics)
            self._warn()

    def push(self, step: int) -> None:
        """Pushes what step `step` has learned. Where that cannot be done, the run ends, but only after it has recorded
        and saved the step: `raise_failure`."""
        try:
            with self.log.timed("push"):
                self.log.add(self.serving.push(version=step + 1))
        # others are gone, or nothing is worth saving
        except (PeerLost, PolicyBroken):
            raise
        except ReportedError as error:
            self.failure = error

    def evaluate(self) -> None:
        with self.log.timed("eval"):
            for measured in self.evaluator.evaluate(self.completed):
                self._note(measured.metrics)
                self.log.evaluated(measured.evaluation)
                self.log.record(measured.suite.split, StepRecord(groups_P=measured.groups_P))
        # no training step follows that would do it
        if self.completed == self.steps:
            self._warn()

    def record(self, groups_P: list[Group], batch: Batch) -> None:
        """Has the responses and what was learned from them written to rollouts/train, on rank 0."""
        names = {
            "computed": "computed",
            "student_logprobs": "student",
            "advantages": "advantage",
            "divergence": "divergence",
        }
        if batch.old_logprobs_B is not None:
            names["old_logprobs"] = "old"
        if self.teacher is not None:
            names["teacher_logprobs"] = "teacher"
        recorded = self.recorded_groups * self.rollout.group_size
        seen = batch.gathered(list(names.values()), self.parallel, recorded)
        if self.parallel.is_main:
            self.log.record(
                "train",
                StepRecord(
                    groups_P=groups_P,
                    samples=batch.step_samples,
                    recorded=recorded,
                    columns={column: seen[name] for column, name in names.items()},
                    decode=self.chat.decode_all,
                ),
            )

    def asked_to_stop(self) -> bool:
        """Returns whether any rank was asked to stop, or the servers cannot be given the weights; the answer is the
        same on all."""
        return self.parallel.any(self.stop.requested or self.failure is not None)

    def raise_failure(self) -> None:
        """Raises what kept the weights from the servers, if anything did."""
        if self.failure is not None:
            raise self.failure

    def save(self) -> None:
        """Saves what is not saved yet; the responses of a step that was interrupted are on the disk then, too."""
        if self.inflight is not None:
            self.inflight.settle()
        if self.completed > self.saved:
            began = time.monotonic()
            with self.log.timed("checkpoint"):
                # a run that goes on from here lacks no record of a step behind it
                self.log.settle()
                self.save_state(self.completed)
            self._compare_with_grace(time.monotonic() - began)
            self.saved = self.completed
            if self.inflight is not None:
                self.inflight.saved(self.saved)

    def finish(self) -> None:
        with self.log.timed("export"):
            self.export()
        self.log.finish()

    def _compare_with_grace(self, seconds: float) -> None:
        """Warns, once, where saving takes most of the time that a stop allows: a step has to end in it as well."""
        if 2 * seconds > self.stop_grace_s and not self._grace_is_short:
            self._grace_is_short = True
            self.log.message(
                f"warning: saving took {seconds:.0f} s, and run.stop_grace_s={self.stop_grace_s:g} s is all that a "
                f"stop allows for it and the end of a step: set it to {3 * seconds:.0f} or more (torchrun: "
                "--shutdown-timeout; in a job: hardware.grace_s)."
            )

    def _samples_of(self, step: int, p: int, group: Group) -> list[Sample]:
        return build_samples(
            *(p, group, self.reprompt),
            lambda problem, hints: self.env.show(problem, hints, self.reprompt.template),
            lambda messages: self.chat.known_ids(self.chat.prompt_ids(messages, group.problem.tools)),
            self.max_context_length,
            seed=f"{self.seed} {step}",
        )

    def _problems_of(self, step: int) -> list[Problem]:
        return [self.problems[index] for index in self.order.indices(step)]

    def _warn(self) -> None:
        """Gives the warnings that begin with this row, and notes those that hold."""
        for warning in self.guards.check(self._step_metrics).values():
            self.log.message(f"warning: {warning}")
        self.log.add({f"warning/{name}": 1.0 for name in self.guards.standing})
        self._step_metrics = {}

    def _note(self, metrics: dict[str, float]) -> None:
        """Adds metrics to the step's row, and to what the guards will check."""
        self.log.add(metrics)
        self._step_metrics |= metrics
