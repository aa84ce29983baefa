"""Held-out accuracy: sampled, and as the exact probability of canonical answers."""

import math
from collections.abc import Sequence

from sdpo_megatron.algorithm.metrics import environment_metrics
from sdpo_megatron.chat import Chat
from sdpo_megatron.config import EvalSettings
from sdpo_megatron.envs.grading.step import Grader, Grading
from sdpo_megatron.problems import canonical
from sdpo_megatron.records import Group, Problem
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.serving.recovery import Serving
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Scorer


class Evaluator:
    """Measures held-out accuracy on the first problems of the held-out set, the same ones each time. Every rank calls
    `evaluate`."""

    def __init__(
        self,
        problems: Sequence[Problem],
        grader: Grader,
        chat: Chat,
        serving: Serving,
        policy: Scorer,
        parallel: ParallelState,
        *,
        settings: EvalSettings,
        max_tokens: int,
        success_threshold: float,
    ):
        """`policy` must score at temperature 1, so that the probability of an answer is the model's own."""
        self.problems = list(problems)
        self.grader = grader
        self.chat = chat
        self.serving = serving
        self.policy = policy
        self.parallel = parallel
        self.settings = settings
        self.max_tokens = settings.max_tokens or max_tokens
        self.success_threshold = success_threshold

    def evaluate(self) -> tuple[dict[str, float], list[Group]]:
        """Returns metrics, and the sampled responses (on rank 0)."""
        groups_P = self._sampled()
        metrics = environment_metrics(groups_P, self.success_threshold, prefix="test/")
        return metrics | self._exact(), groups_P

    def _sampled(self) -> list[Group]:
        if not self.problems[: self.settings.problems]:
            return []
        problems = self.problems[: self.settings.problems] if self.parallel.is_main else []

        def tokenised() -> list[SampleRequest]:
            return [
                SampleRequest(
                    id=f"eval {problem.id}",
                    prompt_ids=self.chat.prompt_ids(problem.messages, problem.tools),
                    n=self.settings.samples,
                    temperature=self.settings.temperature,
                    top_p=self.settings.top_p,
                    max_tokens=self.max_tokens,
                )
                for problem in problems
            ]

        grading: Grading[None] = Grading(problems, self.grader, self.settings.samples)
        ticket = self.serving.submit(self.parallel.everywhere(tokenised), grading.begin)
        self.serving.collect(ticket)
        return grading.join()

    def _exact(self) -> dict[str, float]:
        problems = canonical(self.problems)[: self.settings.exact_problems]
        if not problems:
            return {}

        def tokenised() -> list[tuple[list[int], list[int]]]:
            asked = problems if self.parallel.is_main else []
            pairs = [
                (self.chat.prompt_ids(p.messages, p.tools), self.chat.answer_ids(p.answer)) for p in asked
            ]
            # what stands right behind a prompt that began a thought is no answer
            return [pair for pair in pairs if not self.chat.opens_thought(pair[0])]

        pairs = self.parallel.share(self.parallel.everywhere(tokenised))
        if not pairs:
            return {}
        logprobs = self.policy.response_logprobs([(prompt, answer) for prompt, answer in pairs])
        probabilities = [math.exp(sum(logprobs_T)) for logprobs_T in logprobs]
        return {"test/exact_answer_prob": sum(probabilities) / len(probabilities)}
