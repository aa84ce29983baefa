"""evaluations.jsonl: what is written comes back, and neither a crash nor a resumed run leaves it wrong."""

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.evaluations_file import (
    Evaluation,
    EvaluationsFile,
    ProblemResult,
    read_evaluations,
)


def evaluation(step: int) -> Evaluation:
    return Evaluation(
        suite="test",
        step=step,
        subject={"name": "run"},
        ruler={"server": "SGLang"},
        metrics={"avg@1": 0.5},
        problems=[ProblemResult(id="a", graded=1, correct=1, majority=None)],
    )


def test_what_is_appended_comes_back_but_for_a_line_that_was_cut(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    file = EvaluationsFile(path)
    file.append(evaluation(0))
    file.append(evaluation(5))
    with path.open("a") as more:
        more.write('{"suite": "te')
    assert read_evaluations(path) == [evaluation(0), evaluation(5)]
    EvaluationsFile(path).append(evaluation(10))
    assert [one.step for one in read_evaluations(path)] == [0, 5, 10]


def test_a_resumed_run_makes_what_comes_again(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    for step in (0, 5, 10):
        EvaluationsFile(path).append(evaluation(step))
    EvaluationsFile(path, first_step=5)
    assert [one.step for one in read_evaluations(path)] == [0]


@pytest.mark.parametrize("line", ["{}", "[1]", "no", '{"suite": "a", "problems": [{}]}'])
def test_damage_is_named(tmp_path, line: str):
    path = tmp_path / "evaluations.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match="evaluations.jsonl line 1 is no evaluation"):
        read_evaluations(path)
    with pytest.raises(UserError, match="none.jsonl cannot be read"):
        read_evaluations(tmp_path / "none.jsonl")
