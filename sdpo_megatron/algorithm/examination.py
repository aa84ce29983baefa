"""Whether a teacher is worth learning from, judged by the responses of a step before they are learned from.

A teacher that was shown a sibling's solution should find right responses likelier than the student did, or lose less on
them than on wrong ones. One that answers in another form than the student, because its prompt asks for one, takes
probability from right answers: the student then unlearns them within a few steps.

The numbers are those that the loss has at hand: log-probabilities that teacher and student give the sampled tokens, at
the sampling temperature. Of samples from the student, the mean loss estimates KL(student || teacher).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdpo_megatron.algorithm.roc import Auc, clustered_auc
from sdpo_megatron.records import Sample

if TYPE_CHECKING:
    from sdpo_megatron.algorithm.reach import Reach

FIRST = 4
"""Tokens that count as a response's opening, where its form is decided."""
LEAST = 20
"""Right responses, and wrong ones, without which there is no verdict."""
LARGEST_LOSS = 2.0
"""Nats that right responses may lose in their opening, in the token that ends them, and in each FIRST tokens between. A
student that becomes a teacher that far away keeps exp(-2), one in seven, of what it gave to right answers. SmolLM2 on
one-digit sums: 1.5 in the opening and 0.2 at the end with the default template, 3.5 and 2.6 with one that asks to
explain."""
LEAST_PREFERENCE = 0.1
"""Nats of a whole response below which the order of right and wrong is nobody's preference: a teacher that hardly
differs from its student teaches nothing, and nothing wrong either."""
NAMED = 3
"""Tokens that the verdict names."""
_ADVICE = (
    "Learning from it makes the student worse. Change what the teacher reads, so that it is asked for an answer in the "
    "form of the solution shown (reprompt.template, or the environment's own `show`), or the objective "
    "(loss.name=grpo)."
)
_UNREACHED_ADVICE = (
    "the loss cannot raise tokens that the student hardly samples (the gradient has their probability as a factor); "
    "forward KL can: loss.name=divergence, loss.alpha=0, and with loss.top_k also loss.top_k_support=teacher."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedResponse:
    """A response that a teacher scored who was shown another response as the solution."""

    group: tuple[int, int]
    """Step and problem: responses of one group are no independent witnesses."""
    right: bool
    ids_T: np.ndarray
    gains_T: np.ndarray
    """Teacher's minus student's log-probability of each token, in nats."""
    ended: bool
    """Whether the last token is one that ends a response."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found out about a teacher."""

    right: int
    wrong: int
    metrics: dict[str, float]
    """The numbers, as `teacher/*`."""
    faults: list[str]
    """In which ways the teacher is worse than its student; empty where it is not, or where there is no verdict."""

    @property
    def has_verdict(self) -> bool:
        return "teacher/worse" in self.metrics


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an examination leads to."""

    metrics: dict[str, float]
    line: str = ""
    """A line for the person who watches; empty where there is nothing new to say."""
    warning: str = ""
    """Another one, where the loss cannot learn what the teacher wants; empty else."""
    refused: bool = False
    """Whether the teacher must not be learned from; `line` says why."""


def scored(
    samples: Sequence[Sample], seen: Mapping[str, np.ndarray]
) -> Iterator[tuple[Sample, np.ndarray, dict[str, np.ndarray]]]:
    """Yields each sample of which the models scored tokens that its teacher reads, with these tokens' ids and what was
    seen of them. `seen` is flat over all samples' tokens; its `computed` is positive where the models scored one."""
    end = 0
    for sample in samples:
        start, end = end, end + len(sample.response_ids_T)
        taught = slice(start, start + sample.teacher_tokens)
        at_T = seen["computed"][taught] > 0
        if at_T.any():
            ids_T = np.asarray(sample.response_ids_T)[: sample.teacher_tokens][at_T]
            yield sample, ids_T, {name: column[taught][at_T] for name, column in seen.items()}


def judged_responses(
    samples: Sequence[Sample],
    seen: Mapping[str, np.ndarray],
    *,
    end_ids: AbstractSet[int],
    group_size: int,
    step: int,
) -> list[JudgedResponse]:
    """Returns the responses that can witness for or against the teacher. `seen` is `scored`'s, with what `student` and
    `teacher` said; `end_ids` are the tokens that end a response.

    A response that the teacher was shown itself, or that it read with feedback alone, is left out.
    """
    return [
        JudgedResponse(
            group=(step, sample.id // group_size),
            right=sample.success,
            ids_T=ids_T,
            gains_T=(said["teacher"] - said["student"]).astype(np.float64),
            ended=int(ids_T[-1]) in end_ids,
        )
        for sample, ids_T, said in scored(samples, seen)
        if sample.demonstration_id not in (None, sample.id)
    ]


def examine(responses: Sequence[JudgedResponse]) -> Examination:
    """Returns the numbers, and the verdict where LEAST responses are right and LEAST wrong."""
    right = [response for response in responses if response.right]
    wrong = [response for response in responses if not response.right]
    metrics = {"teacher/right": float(len(right)), "teacher/wrong": float(len(wrong))}
    for name, some in (("gain_right", right), ("gain_wrong", wrong)):
        metrics |= {f"teacher/{name}/{part}": value for part, value in _gains(some).items()}
    # the form's distance: of samples from the student the mean loss estimates a divergence
    both = _gains(responses)
    metrics |= {f"teacher/gap/{part}": -both[part] for part in ("first", "end") if part in both}
    faults = []
    if right and wrong:
        auc = clustered_auc(*([(one.group, _mean(one.gains_T)) for one in some] for some in (right, wrong)))
        metrics |= {"teacher/auc": auc.value, "teacher/auc_low": auc.low, "teacher/auc_high": auc.high}
        if min(len(right), len(wrong)) >= LEAST:
            faults = [*_order_fault(auc, right, wrong), *_loss_faults(_gains(right))]
            metrics["teacher/worse"] = float(bool(faults))
    return Examination(right=len(right), wrong=len(wrong), metrics=metrics, faults=faults)


def lost_tokens(responses: Sequence[JudgedResponse], decode: Callable[[list[int]], str]) -> str:
    """Returns in words the tokens of right responses on which the teacher takes most, over all of them: where, which,
    how much each time, how often."""
    losses: defaultdict[tuple[str, int], float] = defaultdict(float)
    counts: Counter[tuple[str, int]] = Counter()
    for response in responses:
        if not response.right:
            continue
        for t, (token, gain) in enumerate(
            zip(response.ids_T.tolist(), response.gains_T.tolist(), strict=True)
        ):
            last = response.ended and t == len(response.ids_T) - 1
            place = "the end" if last else f"token {t + 1}" if t < FIRST else "later"
            losses[place, token] -= gain
            counts[place, token] += 1
    worst = sorted((key for key in losses if losses[key] > 0), key=lambda key: -losses[key])[:NAMED]
    return "; ".join(
        f"{place} {decode([token])!r} loses {losses[place, token] / counts[place, token]:.2f} nats, "
        f"{counts[place, token]} times"
        for place, token in worst
    )


class TeacherExaminer:
    """Says when a teacher is examined, pools its witnesses until there are enough, and remembers earlier verdicts.

    The first examination begins with the first step, another with every `every`-th. Where a step has too few right or
    wrong responses, those of the next steps are added."""

    def __init__(
        self,
        *,
        every: int,
        refuse_worse: bool,
        raises_unsampled: bool,
        decode: Callable[[list[int]], str],
        earlier: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """`raises_unsampled` says that the loss can raise what the student hardly samples. `earlier` holds the metrics
        of the steps that a resumed run has behind it: a verdict that was reached there is not asked for again before
        its time."""
        self._every, self._refuse_worse, self._decode = every, refuse_worse, decode
        self._warns_of_reach = not raises_unsampled
        verdicts = [metrics["teacher/worse"] for metrics in earlier if "teacher/worse" in metrics]
        self._first = self._looking = not verdicts
        self._was_worse = bool(verdicts and verdicts[-1])
        self._pool: list[JudgedResponse] = []
        self._waiting = False

    def is_due(self, step: int) -> bool:
        return self._looking or step % self._every == 0

    def examine(self, responses: Sequence[JudgedResponse], reach: "Reach") -> Finding:
        """Returns what a step that is due leads to; `reach` says what of the teacher its student does not reach."""
        self._pool = [*self._pool, *responses] if self._looking else list(responses)
        found = examine(self._pool)
        line, refused = self._verdict(found)
        warning = ""
        if reach.is_short and self._warns_of_reach:
            self._warns_of_reach = False
            warning = f"warning: unreached_teacher: {_UNREACHED_ADVICE}"
        return Finding(
            metrics=found.metrics | reach.metrics,
            line=f"{line} {reach.said()}".rstrip() if line else "",
            warning=warning,
            refused=refused,
        )

    def _verdict(self, found: Examination) -> tuple[str, bool]:
        """Returns what is to be said of the pool's examination, and whether the teacher is refused.

        A worse teacher is refused by the first verdict, when nothing is lost by stopping, and later by two in a row: a
        student that has learned what its teacher knows is as good as it, and one verdict in forty is then chance."""
        self._looking = not found.has_verdict
        if self._looking:
            said, self._waiting = self._waiting, True
            return "" if said else _too_few(found), False
        worse, is_first, was_worse = bool(found.faults), self._first, self._was_worse
        self._first, self._was_worse, self._waiting = False, worse, False
        if not worse:
            return _passed(found) if is_first else "", False
        line = _condemnation(found, lost_tokens(self._pool, self._decode))
        if self._refuse_worse and (is_first or was_worse):
            advice = "Nothing was learned from this step. To train nevertheless: teacher.refuse_worse=false."
            return f"{line} {advice}", True
        return f"warning: {line}", False


def _too_few(found: Examination) -> str:
    return (
        f"The teacher is not judged yet: {found.right} right and {found.wrong} wrong responses had a sibling's "
        f"solution to be scored under, and it takes {LEAST} of each; those of the next steps are added."
    )


def _passed(found: Examination) -> str:
    numbers = found.metrics
    return (
        f"The teacher passed: {_witnesses(found)} tell right from wrong with AUC {numbers['teacher/auc']:.2f} (95 % "
        f"interval {numbers['teacher/auc_low']:.2f} to {numbers['teacher/auc_high']:.2f}); in their first {FIRST} "
        f"tokens right ones gain {numbers['teacher/gain_right/first']:+.2f} nats, wrong ones "
        f"{numbers['teacher/gain_wrong/first']:+.2f}."
    )


def _condemnation(found: Examination, tokens: str) -> str:
    return (
        f"worse_teacher: judged by {_witnesses(found)}, the teacher {' and '.join(found.faults)}. Of right responses "
        f"{tokens}. {_ADVICE}"
    )


def _witnesses(found: Examination) -> str:
    return f"{found.right} right and {found.wrong} wrong responses"


def _gains(responses: Sequence[JudgedResponse]) -> dict[str, float]:
    """`first`: mean over responses of their opening's gain; `end`: mean over the tokens that end a response; `rest`:
    over those between. What there is none of is left out."""
    rest = [one.gains_T[FIRST : len(one.gains_T) - one.ended] for one in responses]
    ends = [response.gains_T[-1:] for response in responses if response.ended]
    found = {} if not responses else {"first": _mean([one.gains_T[:FIRST].sum() for one in responses])}
    parts = [(name, np.concatenate([np.zeros(0), *some])) for name, some in (("rest", rest), ("end", ends))]
    return found | {name: _mean(gains) for name, gains in parts if len(gains)}


def _order_fault(auc: Auc, right: Sequence[JudgedResponse], wrong: Sequence[JudgedResponse]) -> list[str]:
    """A teacher that says what its student says orders responses by chance, and by what little rounding makes."""
    gain_right, gain_wrong = (_mean([one.gains_T.sum() for one in some]) for some in (right, wrong))
    if auc.high >= 0.5 or gain_wrong - gain_right < LEAST_PREFERENCE:
        return []
    return [
        f"prefers wrong responses to right ones (AUC {auc.value:.2f}, 95 % interval {auc.low:.2f} to {auc.high:.2f}, "
        "0.5 is chance)"
    ]


def _loss_faults(gains_right: Mapping[str, float]) -> list[str]:
    places = {
        "first": (f"in their first {FIRST} tokens", 1),
        "rest": (f"in each further {FIRST} tokens", FIRST),
        "end": ("in the token that ends them", 1),
    }
    return [
        f"gives right responses {-gain * tokens:.1f} nats less than its student {where} (at most {LARGEST_LOSS:g})"
        for part, gain in gains_right.items()
        for where, tokens in [places[part]]
        if -gain * tokens > LARGEST_LOSS
    ]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values))
