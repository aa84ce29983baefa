"""A set of problems to evaluate on: what is asked of a policy, and what its answers come to."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

from sdpo_megatron.algorithm.metrics import environment_metrics
from sdpo_megatron.chat import Chat
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.envs.grading.step import Grading
from sdpo_megatron.evaluation import ruler
from sdpo_megatron.evaluation.measures import doubt_words, measures, problem_results
from sdpo_megatron.records import Group, Problem
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.run_dir.evaluations_file import HELD_OUT, Evaluation, Ruler


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are sampled."""

    samples: int
    """Responses to each problem."""
    temperature: float
    top_p: float
    max_tokens: int
    max_context_length: int

    def __str__(self) -> str:
        return (
            f"{self.samples} responses, temperature {self.temperature:g}, top_p {self.top_p:g}, at most "
            f"{self.max_tokens} tokens in a context of {self.max_context_length}"
        )


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the suites of an evaluation have in common, for their rulers."""

    base_model: "Future[str]"
    """The SHA-256 of the weights that training began with: another model has other capabilities."""
    server: str
    """Name and version of what sampled, and in which arithmetic."""
    success_threshold: float


@dataclass(frozen=True, kw_only=True)
class Suite:
    name: str
    """`test`, or the name under eval.suites."""
    env_name: str
    env: Environment
    grader: GradingPool
    problems: Sequence[Problem]
    exact_problems: Sequence[Problem] = ()
    """Those whose canonical answer's probability is measured."""
    sampling: Sampling
    chat: Chat

    @property
    def prefix(self) -> str:
        """Leads the names of its metrics."""
        return f"{HELD_OUT}/" if self.name == HELD_OUT else f"{HELD_OUT}_{self.name}/"

    @property
    def split(self) -> str:
        """The folder of its responses under rollouts/."""
        return "eval" if self.name == HELD_OUT else f"eval_{self.name}"

    def requests(self) -> list[SampleRequest]:
        return [
            SampleRequest(
                id=f"{self.split} {problem.id}",
                prompt_ids=self.chat.prompt_ids(problem.messages, problem.tools),
                n=self.sampling.samples,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_tokens,
            )
            for problem in self.problems
        ]

    def exact_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Returns the ids of the exact problems' prompts and of their answers, to be scored."""
        asked, chat = self.exact_problems, self.chat
        pairs = [(chat.prompt_ids(p.messages, p.tools), chat.answer_ids(p.answer)) for p in asked]
        # what stands right behind a prompt that began a thought is no answer
        return [pair for pair in pairs if not chat.opens_thought(pair[0])]

    def grading(self) -> Grading[None]:
        return Grading(self.problems, self.grader, self.sampling.samples)

    def ruler(self, conditions: Conditions) -> Ruler:
        """Returns what its numbers are measured with; waits for the hash of the weights."""
        grader = ruler.grader(self.env_name, self.env, conditions.success_threshold)
        return self._own_ruler | {
            "grader": grader,
            "base model": conditions.base_model.result(),
            "server": conditions.server,
        }

    @cached_property
    def _own_ruler(self) -> dict[str, str]:
        asked = [*self.problems, *self.exact_problems]
        exact = {"exact problems": ruler.data(self.exact_problems, self.env)} if self.exact_problems else {}
        return exact | {
            "problems": ruler.data(self.problems, self.env),
            "prompts": ruler.rendered(asked, self.chat),
            "chat template": ruler.thinking(asked, self.chat),
            "sampling": str(self.sampling),
        }

    def evaluation(
        self,
        groups_P: Sequence[Group],
        conditions: Conditions,
        *,
        step: int | None,
        subject: Mapping[str, str],
        more: Mapping[str, float],
    ) -> Evaluation:
        """Returns what graded responses came to; `more` are metrics that were measured otherwise."""
        threshold = conditions.success_threshold
        results_P = problem_results(groups_P, threshold)
        own = environment_metrics(groups_P, threshold) | measures(results_P, self.sampling.samples)
        if groups_P:
            own["env/all/doubt_words"] = doubt_words(groups_P)
        return Evaluation(
            suite=self.name,
            step=step,
            subject=subject,
            ruler=self.ruler(conditions),
            metrics=own | dict(more),
            problems=results_P,
        )
