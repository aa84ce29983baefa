"""Which problems a step asks."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Message, Problem

PromptIds = Callable[[list[Message], list[dict[str, Any]]], list[int]]
"""(messages, schemas of tools) -> the token ids up to where the assistant's turn begins."""
_TURN_TOKENS = 64
"""More than a chat template puts round one turn."""


class ProblemOrder:
    """Epochs of shuffled problems; what a step gets depends on the step alone, so resuming needs no state.

    A step never asks a problem twice: what is left at the end of an epoch, less than a step, is skipped.
    """

    def __init__(self, n: int, seed: int, per_step: int) -> None:
        """There are `n` problems, of which a step takes `per_step`. Raises UserError if there are not so many."""
        if not 0 < per_step <= n:
            raise UserError(
                f"rollout.problems_per_step is {per_step}, but there are {n} training problems: "
                f"set it to at most {n} or add problems."
            )
        self._per_step = per_step
        self._steps_per_epoch = n // per_step
        # Two epochs, since evaluation and prefetching may look beyond the end of one.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _shuffled(n, seed, epoch))

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the problems of a step, which are all different; steps count from 0."""
        epoch, place = divmod(step, self._steps_per_epoch)
        start = place * self._per_step
        return self._epoch(epoch)[start : start + self._per_step]


def check_prompts_fit(problems: Sequence[Problem], prompt_ids: PromptIds, max_context_length: int) -> None:
    """Raises UserError where a prompt leaves no room for a response, before the step that would ask it.

    A token stands for one byte at least, so that most prompts are short enough without being tokenised."""
    always_there = _always_there(prompt_ids)
    long = [problem for problem in problems if always_there + _most_tokens(problem) >= max_context_length]
    lengths = [(len(prompt_ids(problem.messages, problem.tools)), problem.id) for problem in long]
    too_long = [(length, name) for length, name in lengths if length >= max_context_length]
    if too_long:
        longest, name = max(too_long)
        raise UserError(
            f"{len(too_long)} of {len(problems)} problems leave no room for a response in "
            f"model.max_context_length={max_context_length}: the longest prompt, of {name}, has {longest} tokens; "
            "raise model.max_context_length, or leave these problems out."
        )


def canonical(problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems with one right answer, word for word, whose probability can be measured."""
    return [problem for problem in problems if problem.canonical]


def check_answers_fit(
    problems: Sequence[Problem],
    prompt_ids: PromptIds,
    answer_ids: Callable[[str], list[int]],
    max_context_length: int,
) -> None:
    """Raises UserError where an answer does not fit behind its prompt, so that its probability could not be
    measured."""
    always_there = _always_there(prompt_ids) + _TURN_TOKENS
    for problem in problems:
        most = always_there + _most_tokens(problem) + len(problem.answer.encode())
        if most <= max_context_length:
            continue
        length = len(prompt_ids(problem.messages, problem.tools)) + len(answer_ids(problem.answer))
        if length > max_context_length:
            raise UserError(
                f"Problem {problem.id} and its canonical answer have {length} tokens, more than "
                f"model.max_context_length={max_context_length}; raise that, or leave the problem out."
            )


def _always_there(prompt_ids: PromptIds) -> int:
    """Tokens of the system turn and of what else a template writes by itself."""
    return len(prompt_ids([Message(role="user", content="")], []))


def _most_tokens(problem: Problem) -> int:
    return sum(len(message["content"].encode()) + _TURN_TOKENS for message in problem.messages)


def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return order
