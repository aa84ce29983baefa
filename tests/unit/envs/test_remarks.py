"""What is said once of a task that teaches nothing."""

from sdpo_megatron.envs.remarks import Remarks
from sdpo_megatron.records import Grade, Group, Message, Problem, Rollout, Ungraded

SAME = "This is not the expected answer."


def groups(*graded: tuple[str, float, str], grader: str = "exact") -> list[Group]:
    """One group a response."""
    return [
        Group(
            problem=Problem(
                id=f"p{k}", messages=[Message(role="user", content="?")], answer="64", grader=grader
            ),
            rollouts_G=[
                Rollout(
                    prompt_ids=[1],
                    response_ids_T=[2],
                    rollout_logprobs_T=[-1.0],
                    loss_mask_T=[1],
                    weight_spans=[],
                    finish_reason="stop",
                    text=text,
                )
            ],
            grades_G=[Grade(reward=reward, feedback=feedback)],
        )
        for k, (text, reward, feedback) in enumerate(graded)
    ]


def test_the_first_step_without_any_success_shows_a_response_the_answer_and_the_grader():
    remarks = Remarks(0.5, 0.1, feedback_is_shown=True)
    assert remarks.of(groups(("64", 1.0, ""), ("5", 0.0, "a"), ("6", 0.0, "b"))) == []
    failed = groups(("I guess 64.", 0.0, ""), ("5", 0.25, ""))
    (line,) = remarks.of(failed)
    assert line.startswith(
        "no_success: none of this step's 2 responses succeeded, and the highest reward is 0.25 (success is 0.5). For "
        "example problem p0: the grader exact was given 'I guess 64.' and expects '64'. If that response is right, "
    )
    assert remarks.of(failed) == []
    assert (
        "the environment's grader was"
        in Remarks(0.5, 0.1, feedback_is_shown=True).of(groups(("x", 0, ""), grader=""))[0]
    )


def test_feedback_that_is_the_same_for_every_failed_response_is_named_once():
    remarks = Remarks(0.5, 0.1, feedback_is_shown=True)
    step = groups(("64", 1.0, ""), ("5", 0.0, SAME), ("6", 0.0, SAME))
    (line,) = remarks.of(step)
    assert line.startswith(
        f"constant_feedback: all 2 failed responses of this step got the same feedback, '{SAME}'. It can "
    )
    assert remarks.of(step) == []


def test_feedback_that_differs_is_alone_or_is_not_shown_is_not_named():
    for step in (
        groups(("64", 1.0, ""), ("5", 0.0, "5 is wrong."), ("6", 0.0, "6 is wrong.")),
        groups(("64", 1.0, ""), ("5", 0.0, SAME)),
        groups(("64", 1.0, ""), ("5", 0.0, ""), ("6", 0.0, "")),
    ):
        assert Remarks(0.5, 0.1, feedback_is_shown=True).of(step) == []
    step = groups(("64", 1.0, ""), ("5", 0.0, SAME), ("6", 0.0, SAME))
    assert Remarks(0.5, 0.1, feedback_is_shown=False).of(step) == []


def test_both_can_be_said_of_one_step():
    lines = Remarks(0.5, 0.1, feedback_is_shown=True).of(groups(("5", 0.0, SAME), ("6", 0.0, SAME)))
    assert [line.partition(":")[0] for line in lines] == ["no_success", "constant_feedback"]


def failed(graded: int, *causes: str) -> list[Group]:
    whole = groups(*[("64", 1.0, "")] * graded)
    (one,) = groups(("64", 1.0, ""))
    left = {k: Ungraded(rollout=one.rollouts_G[0], cause=cause) for k, cause in enumerate(causes)}
    return [*whole, Group(problem=one.problem, rollouts_G=[], grades_G=[], ungraded=left)]


def test_failed_grading_names_its_commonest_causes_in_each_step_above_the_limit():
    remarks = Remarks(0.5, 0.1, feedback_is_shown=True)
    assert remarks.of(failed(18, "a", "b")) == []
    lines = [line for _ in range(2) for line in remarks.of(failed(17, "a\nb", "c", "c"))]
    assert (
        lines
        == [
            "grading_failed: 3 of this step's 20 responses could not be graded and are left out of the loss "
            "(grading.max_failed=0.1). 2 times: c; 1 times: a\\nb. Mend the environment or what it needs; the run goes "
            "on."
        ]
        * 2
    )
    (only,) = remarks.of(failed(0, "x" * 1000))
    assert len(only) < 600
