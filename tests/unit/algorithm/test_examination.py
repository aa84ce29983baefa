"""A teacher is judged by what it says of right and wrong responses, when it is time, and named with its tokens."""

import json
import random

import numpy as np
import pytest

from sdpo_megatron.algorithm.examination import (
    JudgedResponse,
    TeacherExaminer,
    examine,
    judged_responses,
    lost_tokens,
)
from sdpo_megatron.algorithm.reach import Reach
from sdpo_megatron.records import Sample

END = 9


def sample(
    id: int, *, success: bool, demonstration: int | None, ids: tuple[int, ...] = (5, 6, END)
) -> Sample:
    return Sample(
        id=id,
        prompt_ids=[1],
        response_ids_T=list(ids),
        rollout_logprobs_T=[-1.0] * len(ids),
        loss_mask_T=[1] * len(ids),
        teacher_prompt_ids=None if demonstration is None else [1, 2],
        teacher_tokens=len(ids),
        success=success,
        group_advantage=0.0,
        demonstration_id=demonstration,
    )


def response(right: bool, gains: list[float], group: int = 0, ended: bool = True) -> JudgedResponse:
    return JudgedResponse(
        group=(0, group),
        right=right,
        ids_T=np.array([*range(len(gains) - 1), END]),
        gains_T=np.array(gains),
        ended=ended,
    )


def responses(
    right: list[float], wrong: list[float], count: int = 24, seed: int = 0, noise: float = 0.3
) -> list[JudgedResponse]:
    """`count` right ones and as many wrong ones, two of each in a group, with these mean gains by position."""
    rng = random.Random(seed)
    return [
        response(is_right, [gain + rng.gauss(0, noise) for gain in gains], group=k // 2)
        for is_right, gains in ((True, right), (False, wrong))
        for k in range(count)
    ]


GOOD = responses([0.2, 0.1, 0.0, 0.1, 0.3, 0.0], [-0.2, -0.3, -0.5, -0.2, -0.5, 0.0])
CHANCE = responses([-0.13] * 6, [-0.1] * 6)
"""Wrong ones a little ahead, within the interval."""
REVERSED = responses([-0.3] * 6, [0.2] * 6)
SAYS_THE_SAME = responses([-0.003] * 6, [0.002] * 6, noise=0.003)
"""In the order of REVERSED, by thousandths of a nat."""
OTHER_FORM = responses([-2.43, 0.1, 0.0, 0.0, 0.1, 0.0], [-2.6, -0.2, -0.5, -0.5, -0.5, 0.0])
"""Right ones lose at their first token, though less than wrong ones; the figures that ruined a sound model."""


class Examiner(TeacherExaminer):
    """Whose steps have nothing that the student does not reach, but where a test says so."""

    def examine(self, responses, reach=Reach(shares={})):  # noqa: B008  it is frozen
        return super().examine(responses, reach)


def examiner(earlier=(), every=5, refuse_worse=True, raises_unsampled=False) -> Examiner:
    return Examiner(
        every=every,
        refuse_worse=refuse_worse,
        raises_unsampled=raises_unsampled,
        decode=lambda ids: str(ids[0]),
        earlier=earlier,
    )


def test_only_what_a_siblings_solution_taught_is_a_witness():
    samples = [
        sample(0, success=True, demonstration=1),
        sample(1, success=True, demonstration=1),  # its own demonstration
        sample(2, success=False, demonstration=None),  # not taught, or by feedback alone
        sample(3, success=False, demonstration=1, ids=(5, 6)),
        sample(4, success=False, demonstration=5),  # its tokens do not count
    ]
    counted_B = np.array([1.0, 1, 0] + [1.0] * 8 + [0.0] * 3)
    seen = {"computed": counted_B, "student": np.full(14, -1.0), "teacher": np.arange(14.0)}
    found = judged_responses(samples, seen, end_ids={END}, group_size=4, step=7)
    assert [(one.group, one.right, one.ended) for one in found] == [
        ((7, 0), True, False),
        ((7, 0), False, False),
    ]
    assert [one.ids_T.tolist() for one in found] == [[5, 6], [5, 6]]
    assert [one.gains_T.tolist() for one in found] == [[1.0, 2.0], [10.0, 11.0]]


def test_the_numbers_by_position():
    found = examine([response(True, [1.0, 1, 1, 1, -2, -4]), response(False, [-3.0], ended=False)])
    assert found.metrics == pytest.approx(
        {
            "teacher/right": 1,
            "teacher/wrong": 1,
            "teacher/gain_right/first": 4.0,
            "teacher/gain_right/rest": -2.0,
            "teacher/gain_right/end": -4.0,
            "teacher/gain_wrong/first": -3.0,
            "teacher/gap/first": -0.5,
            "teacher/gap/end": 4.0,
            "teacher/auc": 1.0,
            "teacher/auc_low": 0.0,
            "teacher/auc_high": 1.0,
        }
    )
    assert examine([]).metrics == {"teacher/right": 0, "teacher/wrong": 0}


@pytest.mark.parametrize(
    ("pool", "faults"),
    [
        (GOOD, []),
        (CHANCE, []),
        (SAYS_THE_SAME, []),
        (REVERSED, ["prefers wrong responses to right ones (AUC 0.0"]),
        (OTHER_FORM, ["nats less than its student in their first 4 tokens (at most 2)"]),
        (responses([0.1, 0, 0, 0, -0.7, 0.7], [-1.0] * 6), ["in each further 4 tokens (at most 2)"]),
        (responses([0.3, 0.3, 0.3, 0.3, 0.6, -2.6], [-1.0] * 6), ["in the token that ends them (at most 2)"]),
        (responses([-0.45] * 6, [-1.0] * 6), []),
    ],
)
def test_worse_is_a_reversed_order_or_a_loss_beyond_the_bound(pool, faults):
    found = examine(pool)
    assert (found.metrics["teacher/auc_high"] < 0.5) == (pool in (SAYS_THE_SAME, REVERSED))
    assert found.has_verdict and found.metrics["teacher/worse"] == bool(faults)
    assert (found.metrics["teacher/auc"] < 0.5) == (pool in (CHANCE, SAYS_THE_SAME, REVERSED))
    assert len(found.faults) == len(faults)
    for fault, part in zip(found.faults, faults, strict=True):
        assert part in fault


@pytest.mark.parametrize("few", [True, False])
def test_under_20_right_or_wrong_there_is_no_verdict(few: bool):
    reversed_few = [one for one in REVERSED if one.right is few][:19] + [
        one for one in REVERSED if one.right is not few
    ]
    found = examine(reversed_few)
    assert not found.has_verdict and found.faults == [] and "teacher/worse" not in found.metrics
    finding = examiner().examine(reversed_few)
    assert not finding.refused
    counts = "19 right and 24 wrong" if few else "24 right and 19 wrong"
    assert counts in finding.line and "20 of each" in finding.line


def test_the_tokens_that_lose_most_are_named():
    pool = [response(True, [-2.5, 0.5, -0.1]), response(True, [-2.3, 0.5, -0.3]), response(False, [-9.0])]
    assert lost_tokens(pool, lambda ids: f"<{ids[0]}>") == (
        "token 1 '<0>' loses 2.40 nats, 2 times; the end '<9>' loses 0.20 nats, 2 times"
    )


def test_a_worse_teacher_is_refused_at_once_or_only_named():
    refused = examiner().examine(OTHER_FORM)
    assert refused.refused
    for part in (
        "worse_teacher",
        "24 right",
        "token 1 '0' loses 2.",
        "reprompt.template",
        "refuse_worse=false",
    ):
        assert part in refused.line
    tolerated = examiner(refuse_worse=False).examine(OTHER_FORM)
    assert not tolerated.refused and tolerated.line.startswith("warning: worse_teacher")
    assert tolerated.metrics["teacher/worse"] == 1.0


def test_few_witnesses_wait_for_those_of_the_next_steps():
    waiting = examiner()
    assert waiting.is_due(0)
    first = waiting.examine(OTHER_FORM[:10] + OTHER_FORM[24:34])
    assert "not judged yet" in first.line and first.metrics["teacher/right"] == 10
    assert waiting.is_due(1)
    second = waiting.examine(OTHER_FORM[10:14] + OTHER_FORM[34:38])
    assert second.line == "" and second.metrics["teacher/right"] == 14
    assert waiting.examine(OTHER_FORM[14:24] + OTHER_FORM[38:]).refused


def test_after_a_verdict_it_is_due_at_every_evaluation():
    passed = examiner()
    finding = passed.examine(GOOD)
    assert (
        finding.line.startswith("The teacher passed: 24 right and 24 wrong responses") and not finding.refused
    )
    assert [step for step in range(1, 12) if passed.is_due(step)] == [5, 10]
    again = passed.examine(GOOD)
    assert again.line == "" and again.metrics["teacher/right"] == 24


def test_later_only_two_worse_verdicts_in_a_row_refuse():
    later = examiner()
    assert not later.examine(GOOD).refused
    once = later.examine(REVERSED)
    assert not once.refused and once.line.startswith("warning: worse_teacher")
    assert not later.examine(GOOD).refused
    assert not later.examine(REVERSED).refused
    assert later.examine(REVERSED).refused


def test_a_resumed_run_does_not_repeat_what_was_passed():
    rows = [{"step": 0.0, **examine(GOOD).metrics}, {"step": 1.0}]
    resumed = examiner(json.loads(json.dumps(rows)))
    assert [step for step in range(2, 8) if resumed.is_due(step)] == [5]
    assert not resumed.examine(REVERSED).refused
    worse_before = examiner([*rows, examine(REVERSED).metrics])
    assert worse_before.examine(REVERSED).refused
    undecided = examiner([examine(GOOD[:3]).metrics])
    assert undecided.is_due(2)


SHORT = Reach(failed=30, shares={"all": 0.09, "first": 0.24})
LONG = Reach(failed=30, shares={"all": 0.001, "first": 0.002})


def test_what_the_student_does_not_reach_is_part_of_the_message_and_the_metrics():
    finding = examiner().examine(GOOD, LONG)
    assert finding.line.startswith("The teacher passed") and finding.line.endswith(LONG.said())
    assert finding.metrics["teacher/unreached/first"] == 0.002 and finding.warning == ""
    waiting = examiner()
    # before the first success nobody is a witness, and it is known nevertheless
    first = waiting.examine([], SHORT)
    assert "not judged yet: 0 right and 0 wrong" in first.line and first.line.endswith(SHORT.said())
    assert first.warning.startswith("warning: unreached_teacher: the loss cannot raise tokens")
    assert first.warning.count("\n") == 0 and "loss.alpha=0" in first.warning
    again = waiting.examine([], SHORT)
    assert (again.line, again.warning) == ("", "") and again.metrics["teacher/unreached/all"] == 0.09


def test_the_advice_is_for_losses_that_need_it():
    assert examiner(raises_unsampled=True).examine([], SHORT).warning == ""
    assert examiner().examine([], LONG).warning == ""
    later = examiner()
    assert later.examine(GOOD, LONG).warning == ""
    # a verdict that has nothing new to say does not swallow it
    finding = later.examine(GOOD, SHORT)
    assert finding.line == "" and finding.warning
