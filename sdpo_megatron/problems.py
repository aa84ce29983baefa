"""Which problems a step asks."""

import random
from functools import lru_cache

from sdpo_megatron.errors import UserError


class ProblemOrder:
    """Epochs of shuffled problems; what a step gets depends on the step alone, so resuming needs no state.

    A step never asks a problem twice: what is left at the end of an epoch, less than a step, is skipped.
    """

    def __init__(self, n: int, seed: int, per_step: int) -> None:
        """`n` problems, of which a step takes `per_step`. UserError if there are not so many."""
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
        """Indices of the problems of step 0, 1, ...; all different."""
        epoch, place = divmod(step, self._steps_per_epoch)
        start = place * self._per_step
        return self._epoch(epoch)[start : start + self._per_step]


def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"problems {seed} {epoch}").shuffle(order)
    return order
