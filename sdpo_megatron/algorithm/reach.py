"""How much of what a teacher wants lies where its student never goes, so that the student could not learn it.

A student is trained on what it samples. By the logit of a token v, with the student's p and the teacher's q, the
gradient of reverse KL is p(v) (log p(v)/q(v) - KL), and Jensen-Shannon's has the factor p(v) too: where p(v) is
nothing, so is the gradient, however much the teacher wants the token. Forward KL's is p(v) - q(v). SmolLM2 on sums that
are to stand in brackets, which it never writes: 0.93 of the teacher's probability at the first token, 0.24 in the
opening; after 12 steps reverse KL had taught nothing, forward KL a held-out probability of 0.18.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from sdpo_megatron.algorithm.examination import FIRST, LEAST, scored
from sdpo_megatron.records import Sample

UNREACHED = 1e-4
"""The student's probability below which it does not reach a token: it samples one such in ten thousand."""
LARGEST_UNREACHED = 0.1
"""The share of the teacher's probability on such tokens, in a part of the responses that failed, from which on it is
what they fail for."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The shares, of the responses that failed and have a teacher."""

    failed: int = 0
    shares: Mapping[str, float]
    """`all`: mean over responses of their tokens' mean; `first`: the same of their openings; `end`: of the tokens that
    end them. What there is none of is left out."""

    @property
    def metrics(self) -> dict[str, float]:
        return {f"teacher/unreached/{part}": share for part, share in self.shares.items()}

    @property
    def is_short(self) -> bool:
        """Whether the student cannot learn a large part of what the teacher wants from where it goes by itself."""
        return self.failed >= LEAST and max(self.shares.values()) > LARGEST_UNREACHED

    def said(self) -> str:
        """Returns the shares in words; empty where there are none."""
        if not self.shares:
            return ""
        return (
            f"Of its probability on {self.failed} failed responses, {self.shares['all']:.1%} (of their first {FIRST} "
            f"tokens {self.shares['first']:.1%}) lies on tokens to which the student gives less than {UNREACHED:g}."
        )


def reach_of(samples: Sequence[Sample], seen: Mapping[str, np.ndarray], end_ids: AbstractSet[int]) -> Reach:
    """Returns the shares. `seen` is that of `examination.scored`, with `unreached`, the teacher's share; `end_ids` are
    the tokens that end a response.

    Feedback counts as a sibling's solution does: here no right response is needed to judge by."""
    failed = [
        (said["unreached"].astype(np.float64), int(ids_T[-1]) in end_ids)
        for sample, ids_T, said in scored(samples, seen)
        if not sample.success
    ]
    shares = {
        "all": [shares_T.mean() for shares_T, _ in failed],
        "first": [shares_T[:FIRST].mean() for shares_T, _ in failed],
        "end": [shares_T[-1] for shares_T, ended in failed if ended],
    }
    means = {part: float(np.mean(values)) for part, values in shares.items() if values}
    return Reach(failed=len(failed), shares=means)
