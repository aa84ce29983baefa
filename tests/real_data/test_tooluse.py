import json

from sdpo_megatron.envs.tool_call import ToolCall, ToolCallOptions
from tests.graders import answering


def build(data, **options) -> ToolCall:
    return ToolCall(ToolCallOptions(train_file=str(data / "tooluse/test.jsonl"), **options))


def written(problem) -> str:
    calls = json.loads(problem.answer)
    return "\n".join(
        f"Thought: I need it.\nAction: {c['Action']}\nAction Input: {c['Action_Input']}" for c in calls
    )


def test_all_right_answers_score_1_and_those_of_other_problems_0(data):
    env = build(data)
    problems = env.train_problems()
    assert len(problems) == 68
    for problem in problems:
        assert env.grade(problem, answering(written(problem))).reward == 1
        for other in problems:
            if other.answer != problem.answer:
                assert env.grade(problem, answering(written(other))).reward == 0


def test_the_official_grader_reads_66_of_68(data):
    env = build(data, grader="official")
    assert sum(env.grade(p, answering(written(p))).reward for p in env.train_problems()) == 66
