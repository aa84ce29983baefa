"""A run: its parts, and what each line of `train.train` asks of them. `build.build_run` wires it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdpo_megatron.algorithm.batching import teacher_views
from sdpo_megatron.algorithm.metrics import environment_metrics, group_metrics
from sdpo_megatron.algorithm.reprompt import build_samples
from sdpo_megatron.chat import Chat
from sdpo_megatron.config import RepromptSettings, RolloutSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.evaluate import Evaluator, grade_groups, join_groups
from sdpo_megatron.problems import ProblemOrder
from sdpo_megatron.records import Group, Problem, Rollout, Sample
from sdpo_megatron.rollout.sampler import SampleRequest
from sdpo_megatron.run_log import NullLog
from sdpo_megatron.serving import Serving
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Ragged, Scorer
from sdpo_megatron.trainer.step import Learner, StepResult


@dataclass(kw_only=True)
class Run:
    """All ranks hold one and call its methods together; lists of groups are rank 0's and empty elsewhere."""

    first_step: int
    steps: int
    eval_every: int
    save_every: int
    log: NullLog
    parallel: ParallelState
    problems: Sequence[Problem]
    order: ProblemOrder
    env: Environment
    chat: Chat
    serving: Serving
    evaluator: Evaluator
    reference: Scorer | None
    """The teacher; None where the loss has no use for one."""
    learner: Learner
    stop: StopRequest
    rollout: RolloutSettings
    reprompt: RepromptSettings
    max_context_length: int
    save_state: Callable[[int], None]
    """Saves everything after that many completed steps."""
    export: Callable[[], None]
    completed: int
    """Training steps that the weights have seen."""
    saved: int
    """Training steps of the newest checkpoint; 0 for none."""

    def requests(self, step: int) -> list[SampleRequest]:
        """What step `step` asks, a pure function of the step."""
        return [
            SampleRequest(
                id=problem.id,
                prompt_ids=self.chat.prompt_ids(problem.messages),
                n=self.rollout.group_size,
                temperature=self.rollout.temperature,
                max_tokens=self.rollout.max_tokens,
            )
            for problem in self._problems_of(step)
        ]

    def groups(self, step: int, rollouts_PG: list[list[Rollout]]) -> list[Group]:
        problems = self._problems_of(step) if self.parallel.is_main else []
        return join_groups(problems, rollouts_PG)

    def grade(self, groups_P: list[Group]) -> list[Group]:
        graded_P = grade_groups(groups_P, self.env)
        threshold = self.reprompt.success_reward_threshold
        if graded_P:
            self.log.add(environment_metrics(graded_P, threshold) | group_metrics(graded_P, threshold))
        return graded_P

    def samples(self, groups_P: list[Group]) -> list[Sample]:
        """On every rank."""
        samples: list[Sample] = []
        if self.parallel.is_main:
            samples, stats = build_samples(
                groups_P, self.reprompt, self.env.show, self.chat.prompt_ids, self.max_context_length
            )
            self.log.add(stats.metrics())
        shared = self.parallel.share([dataclasses.asdict(sample) for sample in samples])
        return [Sample(**fields) for fields in shared]

    def teacher(self, samples: list[Sample]) -> Tensor:
        """The teacher's log-probabilities, flat by sample; 0 where it says nothing."""
        ragged = _ragged(samples)
        if self.reference is None:
            return ragged.zeros()
        return self.reference.logprobs(teacher_views(samples), ragged)

    def learn(self, step: int, samples: list[Sample], teacher_T: Tensor) -> StepResult:
        result = self.learner.step(samples, teacher_T, _ragged(samples), step)
        self.completed = step + 1
        self.log.add(result.metrics)
        return result

    def evaluate(self) -> None:
        with self.log.timed("eval"):
            metrics, rows = self.evaluator.evaluate()
            self.log.add(metrics)
            self.log.rollouts("eval", rows)

    def record(self, groups_P: list[Group], samples: list[Sample], result: StepResult) -> None:
        """rollouts/train/STEP.jsonl."""
        rows = []
        for p, group in enumerate(groups_P):
            for g, (rollout, grade) in enumerate(zip(group.rollouts_G, group.grades_G, strict=True)):
                sample = samples[p * len(group.rollouts_G) + g]
                rows.append(
                    {"problem": group.problem.id, "prompt": group.problem.messages, "response": rollout.text}
                    | {"reward": grade.reward, "feedback": grade.feedback}
                    | {"finish_reason": rollout.finish_reason, "teacher_prompt": self._shown(sample)}
                    | {
                        key: getattr(sample, key)
                        for key in ("response_ids_T", "loss_mask_T", "rollout_logprobs_T")
                    }
                    | {
                        "old_logprobs_T": result.old_logprobs[sample.id],
                        "student_logprobs_T": result.student_logprobs[sample.id],
                        "teacher_logprobs_T": self._teacher_row(sample, result),
                        "advantages_T": result.advantages[sample.id],
                        "weight_spans": [dataclasses.asdict(span) for span in rollout.weight_spans],
                        "segments": [dataclasses.asdict(segment) for segment in rollout.segments],
                        "prompt_ids": sample.prompt_ids,
                        "teacher_prompt_ids": sample.teacher_prompt_ids,
                        "teacher_tokens": sample.teacher_tokens,
                        "group_advantage": sample.group_advantage,
                    }
                )
        self.log.rollouts("train", rows)

    def asked_to_stop(self) -> bool:
        """Whether any rank was; the same answer on all."""
        return self.parallel.any(self.stop.requested)

    def save(self) -> None:
        if self.completed > self.saved:
            with self.log.timed("checkpoint"):
                self.save_state(self.completed)
            self.saved = self.completed

    def finish(self) -> None:
        self.export()
        self.log.finish()

    def _problems_of(self, step: int) -> list[Problem]:
        return [self.problems[index] for index in self.order.indices(step)]

    def _shown(self, sample: Sample) -> str | None:
        return None if sample.teacher_prompt_ids is None else self.chat.decode_all(sample.teacher_prompt_ids)

    def _teacher_row(self, sample: Sample, result: StepResult) -> list[float] | None:
        if self.reference is None or sample.teacher_prompt_ids is None:
            return None
        return result.teacher_logprobs[sample.id][: sample.teacher_tokens]


def _ragged(samples: Sequence[Sample]) -> Ragged:
    return Ragged([len(sample.response_ids_T) for sample in samples])


def loop_state(serving: Serving) -> dict[str, Any]:
    """What a checkpoint holds of the loop beside weights and optimizer; JSON."""
    sampler = None if serving.sampler is None else serving.sampler.state()
    return {"sampler": sampler, "weights_version": serving.version}
