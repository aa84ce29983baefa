"""Which problems a step asks."""

import random
from collections.abc import Sequence
from functools import lru_cache

from sdpo_megatron.records import Problem


class ProblemOrder:
    """Epochs of shuffled problems; what a step gets depends on the step alone, so resuming needs no state.

    A step never asks a problem twice: what is left at the end of an epoch, less than a step, is skipped.
    """

    def __init__(self, n: int, seed: int, per_step: int) -> None:
        """There are `n` problems, of which a step takes `per_step`, at most `n`."""
        self._per_step = per_step
        self._steps_per_epoch = n // per_step
        # Two epochs, since evaluation and prefetching may look beyond the end of one.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _shuffled(n, seed, epoch))

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the problems of a step, which are all different; steps count from 0."""
        epoch, place = divmod(step, self._steps_per_epoch)
        start = place * self._per_step
        return self._epoch(epoch)[start : start + self._per_step]


def canonical(problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems with one right answer, word for word, whose probability can be measured."""
    return [problem for problem in problems if problem.canonical]


def evaluated(held_out: Sequence[Problem], train: Sequence[Problem], most: int) -> list[Problem]:
    """Returns the first held-out problems, the same ones each time; of training problems where there are no others."""
    return list((held_out or train)[:most])


def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return order
