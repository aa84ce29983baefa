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

from sdpo_megatron.algorithm.examination import FIRST, LEAST
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

    def advice(self) -> str:
        """Returns what to do where it is short."""
        return (
            "unreached_teacher: the loss cannot raise tokens that the student hardly samples (the gradient has their "
            "probability as a factor); forward KL can: loss.name=divergence, loss.alpha=0, and with loss.top_k also "
            "loss.top_k_support=teacher."
        )


def reach_of(samples: Sequence[Sample], seen: Mapping[str, np.ndarray], end_ids: AbstractSet[int]) -> Reach:
    """Returns the shares. `seen` is flat over all samples' tokens: `computed`, positive where the models scored a
    token, and `unreached`, the teacher's share there. `end_ids` are the tokens that end a response.

    Feedback counts as a sibling's solution does: here no right response is needed to judge by."""
    of_responses: list[np.ndarray] = []
    ends: list[float] = []
    end = 0
    for sample in samples:
        start, end = end, end + len(sample.response_ids_T)
        if sample.success or sample.teacher_prompt_ids is None:
            continue
        taught = slice(start, start + sample.teacher_tokens)
        at_T = seen["computed"][taught] > 0
        if not at_T.any():
            continue
        shares_T = seen["unreached"][taught][at_T].astype(np.float64)
        of_responses.append(shares_T)
        ids_T = np.asarray(sample.response_ids_T)[: sample.teacher_tokens][at_T]
        if int(ids_T[-1]) in end_ids:
            ends.append(float(shares_T[-1]))
    if not of_responses:
        return Reach(shares={})
    shares = {
        "all": _mean([shares_T.mean() for shares_T in of_responses]),
        "first": _mean([shares_T[:FIRST].mean() for shares_T in of_responses]),
    }
    if ends:
        shares["end"] = _mean(ends)
    return Reach(failed=len(of_responses), shares=shares)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
