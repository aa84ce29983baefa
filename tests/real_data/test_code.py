"""The whole of HumanEval and sanitized MBPP: the sets' own solutions pass, broken ones do not."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sdpo_megatron.envs.python_tests import PythonTests, PythonTestsOptions
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from tests.graders import answering


def humaneval(data: Path) -> dict[str, str]:
    lines = gzip.decompress((data / "code/HumanEval.jsonl.gz").read_bytes()).splitlines()
    return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)}


def mbpp(data: Path) -> dict[str, str]:
    rows = json.loads((data / "code/sanitized-mbpp.json").read_text())
    return {str(row["task_id"]): row["code"] for row in rows}


def graded(env: PythonTests, programs: dict[str, str]) -> dict[str, float]:
    problems = [problem for problem in env.train_problems() if problem.id in programs]

    def grade(problem) -> float:
        return env.grade(problem, answering(f"```python\n{programs[problem.id]}\n```")).reward

    assert env.most_at_once is not None
    with ThreadPoolExecutor(env.most_at_once) as pool:
        return dict(zip([problem.id for problem in problems], pool.map(grade, problems), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "every"), [("bubblewrap", 1), ("sandlock", 8)])
@pytest.mark.parametrize(
    ("name", "file", "solutions", "count"),
    [("humaneval", "HumanEval.jsonl.gz", humaneval, 164), ("mbpp", "sanitized-mbpp.json", mbpp, 427)],
)
def test_own_solutions_pass_and_broken_ones_do_not(data, name, file, solutions, count, backend, every):
    sandbox = SandboxSettings.model_validate({"backend": backend})
    options = PythonTestsOptions(
        train_file=str(data / "code" / file), format=name, test_questions=0, sandbox=sandbox
    )
    env = PythonTests(options)
    assert len(env.train_problems()) == count
    right = dict(list(solutions(data).items())[::every])
    assert {problem for problem, reward in graded(env, right).items() if reward != 1.0} == set()
    # the same functions, and whatever they return is lost
    names = {problem: suite.program_names for problem, suite in env._tests["train"].items()}
    broken = {
        problem: program + "".join(f"\n_{f} = {f}\ndef {f}(*a, **k): _{f}(*a, **k)\n" for f in names[problem])
        for problem, program in list(right.items())[::4]
    }
    assert {problem for problem, reward in graded(env, broken).items() if reward != 0.0} == set()
