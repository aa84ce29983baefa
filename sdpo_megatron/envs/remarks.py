"""What a step's grades say about the task itself: that grading fails, nothing succeeds, feedback is constant."""

from collections import Counter
from collections.abc import Sequence

from sdpo_megatron.errors import one_line, quoted
from sdpo_megatron.records import Group

LONGEST_CAUSE = 300
"""Characters of the cause of a failed grading that a message repeats."""


class Remarks:
    """Reads the graded groups of every training step, on rank 0."""

    def __init__(self, success_threshold: float, max_failed: float, *, feedback_is_shown: bool):
        """`feedback_is_shown` says whether a teacher reads the feedback at all."""
        self._threshold = success_threshold
        self._max_failed = max_failed
        self._of_success = True
        self._of_feedback = feedback_is_shown

    def of(self, groups_P: Sequence[Group]) -> list[str]:
        """Returns what is to be said after this step, a line each. That grading fails is said in each step in which it
        does, the others once."""
        remarks = [line] if (line := failed_grading(groups_P, self._max_failed)) else []
        if self._of_success and (line := without_success(groups_P, self._threshold)):
            self._of_success = False
            remarks.append(line)
        if self._of_feedback and (line := constant_feedback(groups_P, self._threshold)):
            self._of_feedback = False
            remarks.append(line)
        return remarks


def failed_grading(groups_P: Sequence[Group], max_failed: float) -> str:
    """Returns a line with the commonest causes where a greater share of the responses than `max_failed` could not be
    graded; else nothing."""
    causes = Counter(left.cause for group in groups_P for left in group.ungraded.values())
    size = sum(group.size for group in groups_P)
    if not causes or causes.total() <= max_failed * size:
        return ""
    told = "; ".join(
        f"{count} times: {one_line(cause)[:LONGEST_CAUSE]}" for cause, count in causes.most_common(3)
    )
    return (
        f"grading_failed: {causes.total()} of this step's {size} responses could not be graded and are left out of the "
        f"loss (grading.max_failed={max_failed:g}). {told}. Mend the environment or what it needs; the run goes on."
    )


def without_success(groups_P: Sequence[Group], success_threshold: float) -> str:
    """Returns a line that shows a response, the answer and the grader where no response reaches the threshold; else
    nothing."""
    grades = [grade for group in groups_P for grade in group.grades_G]
    if not grades or any(grade.reward >= success_threshold for grade in grades):
        return ""
    group = next(group for group in groups_P if group.grades_G)
    problem, response = group.problem, group.rollouts_G[0].text
    grader = f"the grader {problem.grader}" if problem.grader else "the environment's grader"
    expected = f" and expects {quoted(problem.answer)}" if problem.answer else ""
    return (
        f"no_success: none of this step's {len(grades)} responses succeeded, and the highest reward is "
        f"{max(grade.reward for grade in grades):g} (success is {success_threshold:g}). For example problem "
        f"{problem.id}: {grader} was given {quoted(response)}{expected}. If that response "
        "is right, correct the answer or the grader; else show in the prompt how to answer, raise rollout.max_tokens "
        "where responses are cut, or take easier problems."
    )


def constant_feedback(groups_P: Sequence[Group], success_threshold: float) -> str:
    """Returns a line that names the feedback where all failed responses, of which there are several, got the same; else
    nothing."""
    texts = [
        grade.feedback for group in groups_P for grade in group.grades_G if grade.reward < success_threshold
    ]
    if len(texts) < 2 or not texts[0] or len(set(texts)) > 1:
        return ""
    return (
        f"constant_feedback: all {len(texts)} failed responses of this step got the same feedback, {quoted(texts[0])}. "
        "It can teach what all of them lack, such as a form, and not which of them is nearer to right: take a grader "
        "whose feedback depends on the response, or set reprompt.feedback=never."
    )
