"""What a step's grades say about the task itself, each once: that nothing succeeds, that feedback says nothing."""

from collections.abc import Sequence

from sdpo_megatron.errors import quoted
from sdpo_megatron.records import Group


class Remarks:
    """Reads the graded groups of every training step, on rank 0."""

    def __init__(self, success_threshold: float, *, feedback_is_shown: bool):
        """`feedback_is_shown` says whether a teacher reads the feedback at all."""
        self._threshold = success_threshold
        self._of_success = True
        self._of_feedback = feedback_is_shown

    def of(self, groups_P: Sequence[Group]) -> list[str]:
        """Returns what is to be said after this step, a line each; empty where it was said before."""
        remarks = []
        if self._of_success and (line := without_success(groups_P, self._threshold)):
            self._of_success = False
            remarks.append(line)
        if self._of_feedback and (line := constant_feedback(groups_P, self._threshold)):
            self._of_feedback = False
            remarks.append(line)
        return remarks


def without_success(groups_P: Sequence[Group], success_threshold: float) -> str:
    """Returns a line that shows a response, the answer and the grader where no response reaches the threshold; else
    nothing."""
    grades = [grade for group in groups_P for grade in group.grades_G]
    if not grades or any(grade.reward >= success_threshold for grade in grades):
        return ""
    problem, response = groups_P[0].problem, groups_P[0].rollouts_G[0].text
    grader = f"the grader {problem.grader}" if problem.grader else "the environment's grader"
    return (
        f"no_success: none of this step's {len(grades)} responses succeeded, and the highest reward is "
        f"{max(grade.reward for grade in grades):g} (success is {success_threshold:g}). For example problem "
        f"{problem.id}: {grader} was given {quoted(response)} and expects {quoted(problem.answer)}. If that response "
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
        "It tells nothing apart, so a teacher that reads nothing else teaches nothing about them: take a grader whose "
        "feedback depends on the response, or set reprompt.feedback=never."
    )
