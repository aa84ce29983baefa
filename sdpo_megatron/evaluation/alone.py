"""An evaluation without a trainer: whatever weights the servers have, on every suite at once."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdpo_megatron.evaluation.exact import EXACT, exact_answer_prob, exact_pairs
from sdpo_megatron.evaluation.suite import Suite
from sdpo_megatron.records import Group, Rollout
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.ticket import Place

TOLD_EVERY_S = 15.0
SCORED_AT_ONCE = 16


def sampled_groups(
    suites: Sequence[Suite], sampler: Sampler, tell: Callable[[str], None]
) -> list[list[Group]]:
    """Returns the graded responses to each suite's problems, in their order; `tell` hears how far it is.

    Raises what `Sampler.collect` raises."""
    progress = _Progress(sum(len(suite.problems) * suite.sampling.samples for suite in suites), tell)
    gradings = [suite.grading() for suite in suites]

    def counted(begin: Callable[[Place, Rollout], None]) -> Callable[[Place, Rollout], None]:
        def on_response(place: Place, rollout: Rollout) -> None:
            begin(place, rollout)
            progress.count()

        return on_response

    tickets = [
        sampler.submit(suite.requests(), counted(grading.begin))
        for suite, grading in zip(suites, gradings, strict=True)
    ]
    for ticket in tickets:
        sampler.collect(ticket)
    return [grading.join() for grading in gradings]


def exact_metrics(suite: Suite, clients: Sequence[Client]) -> dict[str, float]:
    """Returns the probability of the suite's canonical answers, as its servers compute it."""
    pairs = exact_pairs(suite.exact_problems, suite.chat)
    if not pairs:
        return {}

    def scored(number: int, pair: tuple[list[int], list[int]]) -> list[float]:
        prompt, answer = pair
        return clients[number % len(clients)].prompt_logprobs([*prompt, *answer])[-len(answer) :]

    with ThreadPoolExecutor(SCORED_AT_ONCE) as pool:
        logprobs: list[Any] = list(pool.map(scored, range(len(pairs)), pairs))
    return {EXACT: exact_answer_prob(logprobs)}


class _Progress:
    """Says now and then how many responses have come; its one caller is the sampler's thread."""

    def __init__(self, total: int, tell: Callable[[str], None]) -> None:
        self._total, self._tell = total, tell
        self._done = 0
        self._told = self._began = time.monotonic()

    def count(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY_S:
            self._told = now
            left = (now - self._began) / self._done * (self._total - self._done)
            self._tell(f"{self._done} of {self._total} responses, about {left:.0f} s left")
