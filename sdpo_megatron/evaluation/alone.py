"""An evaluation without a trainer: whatever weights the servers have, on every suite at once."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sdpo_megatron.evaluation.measures import EXACT, exact_answer_prob
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
    total = sum(len(suite.problems) * suite.sampling.samples for suite in suites)
    gradings = [suite.grading() for suite in suites]
    done, began = 0, time.monotonic()
    told = began

    def counted(begin: Callable[[Place, Rollout], None]) -> Callable[[Place, Rollout], None]:
        def on_response(place: Place, rollout: Rollout) -> None:
            # one thread, the sampler's, calls it
            nonlocal done, told
            begin(place, rollout)
            done, now = done + 1, time.monotonic()
            if now - told >= TOLD_EVERY_S:
                told = now
                left = (now - began) / done * (total - done)
                tell(f"{done} of {total} responses, about {left:.0f} s left")

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
    pairs = suite.exact_pairs()
    if not pairs:
        return {}

    def scored(number: int, pair: tuple[list[int], list[int]]) -> list[float]:
        prompt, answer = pair
        return clients[number % len(clients)].prompt_logprobs([*prompt, *answer])[-len(answer) :]

    with ThreadPoolExecutor(SCORED_AT_ONCE) as pool:
        logprobs: list[Any] = list(pool.map(scored, range(len(pairs)), pairs))
    return {EXACT: exact_answer_prob(logprobs)}
