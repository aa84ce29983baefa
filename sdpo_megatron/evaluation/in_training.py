"""Evaluation in training: sampled by the run's own servers, and the exact probability of canonical answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sdpo_megatron.evaluation.measures import EXACT, exact_answer_prob
from sdpo_megatron.evaluation.suite import Conditions, Suite
from sdpo_megatron.records import Group
from sdpo_megatron.run_dir.evaluations_file import Evaluation
from sdpo_megatron.serving.recovery import Serving
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Scorer


class Measured(NamedTuple):
    """One suite's responses, and what they came to."""

    suite: Suite
    groups_P: list[Group]
    evaluation: Evaluation

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers under the names that a row gives them."""
        return {f"{self.suite.prefix}{key}": value for key, value in self.evaluation.metrics.items()}


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
        gradings = [suite.grading() for suite in self.suites]
        tickets = [
            self.serving.submit(
                self.parallel.everywhere(
                    lambda suite=suite: suite.requests() if self.parallel.is_main else []
                ),
                grading.begin,
            )
            for suite, grading in zip(self.suites, gradings, strict=True)
        ]
        for ticket in tickets:
            self.serving.collect(ticket)
        exact_by_suite = [self._exact(suite) for suite in self.suites]

        def joined() -> list[Measured]:
            if self.conditions is None or not self.suites:
                return []
            conditions, subject = self.conditions(), {"name": f"{self.name} after {step} steps"}
            measured: list[Measured] = []
            for suite, grading, exact in zip(self.suites, gradings, exact_by_suite, strict=True):
                groups_P = grading.join()
                evaluation = suite.evaluation(groups_P, conditions, step=step, subject=subject, more=exact)
                measured.append(Measured(suite, groups_P, evaluation))
            return measured

        return self.parallel.everywhere(joined)

    def _exact(self, suite: Suite) -> dict[str, float]:
        if not suite.exact_problems:
            return {}
        own = self.parallel.everywhere(lambda: suite.exact_pairs() if self.parallel.is_main else [])
        pairs = self.parallel.share(own)
        if not pairs:
            return {}
        return {EXACT: exact_answer_prob(self.policy.response_logprobs(pairs))}
