"""Rows of each published set, made by hand, and what is wrong with others: file, line and field are named."""

import base64
import gzip
import json
import os
import pickle
import zlib
from types import SimpleNamespace

import pytest

from sdpo_megatron.envs.data.files import read_lines
from sdpo_megatron.envs.programs.cases import Case
from sdpo_megatron.envs.programs.formats import FORMATS
from sdpo_megatron.envs.programs.packed import unpacked
from sdpo_megatron.errors import UserError

STDIN_TESTS = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALL_TESTS = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}]


def packed(tests: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LIVECODEBENCH = {
    "question_title": "Sum",
    "question_content": "Add two numbers.",
    "question_id": "abc_1",
    "contest_date": "2025-03-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(STDIN_TESTS),
    "private_test_cases": packed([{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]),
    "metadata": "{}",
}


def question(name: str, row: object, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row))
    [line] = read_lines(path, {}, "a row")
    made = FORMATS[name](line)
    return SimpleNamespace(id=made.id, prompt=made.messages[0]["content"], tests=made.metadata["tests"])


def test_livecodebench_with_packed_private_tests(tmp_path):
    made = question("livecodebench", LIVECODEBENCH, tmp_path)
    assert (
        made.id == "abc_1" and "standard input" in made.prompt and made.prompt.startswith("Add two numbers.")
    )
    assert made.tests.cases == (Case("stdin", "1 2\n", "3\n", True), Case("stdin", "5 6\n", "11\n"))


def test_livecodebench_with_a_function(tmp_path):
    row = {
        **LIVECODEBENCH,
        "starter_code": "class Solution:\n    def add(self, items, n):",
        "public_test_cases": json.dumps(CALL_TESTS),
        "private_test_cases": json.dumps(CALL_TESTS),
        "metadata": '{"func_name": "add"}',
    }
    made = question("livecodebench", row, tmp_path)
    assert made.tests.function == "add" and "Complete this code" in made.prompt and "def add" in made.prompt
    assert made.tests.cases == (
        Case("call", "[1, 2]\n3", "[4, 5]", True),
        Case("call", "[1, 2]\n3", "[4, 5]"),
    )


@pytest.mark.parametrize(
    ("row", "cases", "function"),
    [
        ({"tests": json.dumps(STDIN_TESTS)}, (Case("stdin", "1 2\n", "3\n"),), ""),
        ({"tests": [{"type": "stdin_stdout", "input": "1", "output": "2"}]}, (Case("stdin", "1", "2"),), ""),
        ({"tests": [{"input": ["1", "2"], "output": ["3"]}]}, (Case("stdin", "1\n2", "3"),), ""),
        (
            {"tests": CALL_TESTS, "metadata": {"func_name": "add"}},
            (Case("call", "[1, 2]\n3", "[4, 5]"),),
            "add",
        ),
        ({"tests": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})}, (Case("stdin", "1\n", "2\n"),), ""),
        (
            {"tests": [{**CALL_TESTS[0], "fn_name": "add"}]},
            (Case("call", "[1, 2]\n3", "[4, 5]"),),
            "add",
        ),
        (
            {"tests": [{**CALL_TESTS[0], "metadata": {"func_name": "add"}}]},
            (Case("call", "[1, 2]\n3", "[4, 5]"),),
            "add",
        ),
        (
            {"tests": {"fn_name": "f", "inputs": [[[1], 2]], "outputs": [[3]]}},
            (Case("call", "[1]\n2", "[3]", wrapped=True),),
            "f",
        ),
    ],
)
def test_deepcoder(row, cases, function, tmp_path):
    made = question("deepcoder", {"problem": "Add.", **row}, tmp_path)
    assert (made.id, made.tests.cases, made.tests.function) == ("1", cases, function)


def test_humaneval(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "import math\n\ndef f(x):\n    '''Double.'''\n",
        "entry_point": "f",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    }
    made = question("humaneval", row, tmp_path)
    assert made.tests.program_names == ("f",) and made.tests.preamble == row["prompt"]
    assert made.tests.cases[0].input.endswith("check(f)\n") and not made.tests.cases[0].public
    assert "Double." in made.prompt and "candidate(1)" not in made.prompt


def test_mbpp_shows_its_tests_and_takes_from_the_program_what_its_own_solution_defines(tmp_path):
    row = {
        "task_id": 126,
        "prompt": "Add.",
        "code": "import sys\ndef sum(a, b):\n  return a + b",
        "test_imports": ["import math"],
        "test_list": ["assert sum(1, 2) == math.floor(3.5)", "assert abs(sum(1, 2)) == 3"],
    }
    made = question("mbpp", row, tmp_path)
    assert made.id == "126" and row["test_list"][0] in made.prompt
    assert made.tests.program_names == ("sum",) and "import math" in made.tests.preamble
    assert all(case.public for case in made.tests.cases) and len(made.tests.cases) == 2
    # without a solution: what nobody else has
    row = {"task_id": 1, "text": "Add.", "test_list": ["assert add(1, 2) == math.floor(3.5)"]}
    assert question("mbpp", row, tmp_path).tests.program_names == ("add",)


def test_own_questions(tmp_path):
    tests = [
        {"input": "1", "output": "2", "public": True},
        {"arguments": [1, [2]], "result": None},
        {"check": "assert f(1) == 2"},
    ]
    made = question(
        "own", {"prompt": "Do.", "function": "f", "preamble": "import math", "tests": tests}, tmp_path
    )
    assert made.id == "1" and made.prompt == "Do." and made.tests.program_names == ("f",)
    assert made.tests.cases == (
        Case("stdin", "1", "2", True),
        Case("call", "1\n[2]", "null"),
        Case("check", "assert f(1) == 2"),
    )
    made = question(
        "own", {"prompt": "Do.", "tests": [{"check": "for x in range(3): assert g(x)"}]}, tmp_path
    )
    assert made.tests.program_names == ("g",)


OWN = {"prompt": "Do.", "tests": [{"input": "1", "output": "2"}]}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("own", {"tests": []}, "line 1: 'prompt' is missing; add it"),
        ("own", {**OWN, "test": 1}, "unknown key 'test'.*Did you mean 'tests'"),
        ("own", {**OWN, "tests": []}, "'tests' is \\[\\]"),
        ("own", {**OWN, "tests": [{"input": "1"}]}, "test 1 has input; it must have input and output"),
        ("own", {**OWN, "tests": [{}]}, "test 1 has nothing"),
        ("own", {**OWN, "tests": [{"arguments": [1], "result": 2}]}, "name the function in 'function'"),
        ("own", {**OWN, "tests": [{"check": "assert ("}]}, "test 1: 'check' is not Python that compiles"),
        ("own", {**OWN, "preamble": "import ("}, "'preamble' is not Python"),
        ("mbpp", {"task_id": 1, "prompt": "x", "test_list": []}, "'test_list' is"),
        ("mbpp", {"task_id": 1, "test_list": ["assert f()"]}, "'prompt' is missing"),
        ("humaneval", {"task_id": "x", "prompt": "", "test": ""}, "'entry_point' is missing"),
        (
            "humaneval",
            {"task_id": "x", "prompt": "def f(", "test": "", "entry_point": "f"},
            "'prompt' is not Python",
        ),
        ("deepcoder", {"problem": "x", "tests": "["}, "'tests' is not JSON"),
        ("deepcoder", {"problem": "x", "tests": {"inputs": [1], "outputs": []}}, "two lists of one length"),
        ("deepcoder", {"problem": "x", "tests": [{"input": "1"}]}, "test 1 needs 'input' and 'output'"),
        ("deepcoder", {"problem": "x", "tests": [{"input": "", "output": "", "type": "gpu"}]}, "type 'gpu'"),
        ("deepcoder", {"problem": "x", "tests": CALL_TESTS}, "calls a function, but the row names none"),
        (
            "deepcoder",
            {"problem": "x", "tests": {"fn_name": "f", "inputs": ["x y"], "outputs": ["1"]}},
            "must be JSON",
        ),
        ("livecodebench", {**LIVECODEBENCH, "private_test_cases": "!!"}, "neither JSON nor a packed list"),
        ("livecodebench", {**LIVECODEBENCH, "public_test_cases": "{}"}, "must be a list of tests"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_in_one_line(name, row, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        question(name, row, tmp_path)
    assert "set.jsonl line 1" in str(refused.value) and "\n" not in str(refused.value)


def test_a_pickle_that_would_run_something_is_refused():
    class Harmful:
        def __reduce__(self):
            return os.mkdir, ("/tmp/harm",)

    harmful = base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()
    with pytest.raises(ValueError, match="it names posix.mkdir"):
        unpacked(harmful)
    assert unpacked(packed([1])) == [1] and unpacked("[1]") == [1]


def test_files_may_be_lists_lines_or_compressed(tmp_path):
    for content in (b'[{"a": 1}, {"a": 2}]', b'{"a": 1}\n\n{"a": 2}\n', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}'):
        for data in (content, gzip.compress(content)):
            (tmp_path / "set").write_bytes(data)
            assert [line.values["a"] for line in read_lines(tmp_path / "set", {}, "a row")] == [1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "set line 1: not JSON"),
        (b"[1]", "set entry 1: not a JSON object"),
        (b"1", "line 1: not a JSON object"),
        (b"\xff", "line 1: not UTF-8"),
        (gzip.compress(b"{}", mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_a_file_that_cannot_be_read(data, message, tmp_path):
    (tmp_path / "set").write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_lines(tmp_path / "set", {}, "a row"))
    with pytest.raises(UserError, match="There is no problem file"):
        list(read_lines(tmp_path / "none", {}, "a row"))
    with pytest.raises(UserError, match="is a directory"):
        list(read_lines(tmp_path, {}, "a row"))
