"""Evaluation in training: sampled by the run's own servers, and the exact probability of canonical answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdpo_megatron.evaluation.exact import EXACT, exact_answer_prob, exact_pairs
from sdpo_megatron.evaluation.suite import Conditions, Suite
from sdpo_megatron.records import Group
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.run_dir.evaluations_file import Evaluation
from sdpo_megatron.serving.recovery import Serving
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Scorer


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One suite's responses, and what they came to."""

    split: str
    groups_P: list[Group]
    evaluation: Evaluation


class Evaluator:
    """Evaluates the policy on each suite, all of them at once. Every rank calls `evaluate`."""

    def __init__(
        self,
        suites: Sequence[Suite],
        serving: Serving,
        policy: Scorer,
        parallel: ParallelState,
        *,
        name: str,
        conditions: Callable[[], Conditions] | None,
    ):
        """`policy` must score at temperature 1, so that the probability of an answer is the model's own. `name` is the
        run's; `conditions` are rank 0's."""
        self.suites = list(suites)
        self.serving = serving
        self.policy = policy
        self.parallel = parallel
        self.name = name
        self.conditions = conditions

    def evaluate(self, step: int) -> list[Measured]:
        """Evaluates the weights after `step` training steps; returns what each suite came to on rank 0, and an empty
        list elsewhere."""
        gradings = [suite.grading() if self.parallel.is_main else None for suite in self.suites]
        tickets = [
            self.serving.submit(
                self.parallel.everywhere(lambda suite=suite: self._requests(suite)),
                None if grading is None else grading.begin,
            )
            for suite, grading in zip(self.suites, gradings, strict=True)
        ]
        for ticket in tickets:
            self.serving.collect(ticket)
        exact_by_suite = [self._exact(suite) for suite in self.suites]

        def joined() -> list[Measured]:
            measured: list[Measured] = []
            conditions = self.conditions() if self.conditions and self.suites else None
            subject = {"name": f"{self.name} after {step} steps"}
            for suite, grading, exact in zip(self.suites, gradings, exact_by_suite, strict=True):
                if grading is not None and conditions is not None:
                    groups_P = grading.join()
                    evaluation = suite.evaluation(
                        groups_P, conditions, step=step, subject=subject, more=exact
                    )
                    measured.append(Measured(split=suite.split, groups_P=groups_P, evaluation=evaluation))
            return measured

        return self.parallel.everywhere(joined)

    def metrics(self, measured: Sequence[Measured]) -> dict[str, float]:
        """Returns the numbers of all suites under the names that a row gives them."""
        prefixes = {suite.name: suite.prefix for suite in self.suites}
        return {
            f"{prefixes[one.evaluation.suite]}{key}": value
            for one in measured
            for key, value in one.evaluation.metrics.items()
        }

    def _requests(self, suite: Suite) -> list[SampleRequest]:
        return suite.requests() if self.parallel.is_main else []

    def _exact(self, suite: Suite) -> dict[str, float]:
        if not suite.exact_problems:
            return {}

        def tokenised() -> list[tuple[list[int], list[int]]]:
            return exact_pairs(suite.exact_problems, suite.chat) if self.parallel.is_main else []

        pairs = self.parallel.share(self.parallel.everywhere(tokenised))
        if not pairs:
            return {}
        logprobs = self.policy.response_logprobs([(prompt, answer) for prompt, answer in pairs])
        return {EXACT: exact_answer_prob(logprobs)}
