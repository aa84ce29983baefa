"""Small files made by hand in the forms in which the sets are published, and what an environment reads of them."""

import base64
import csv
import gzip
import io
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

TESTS = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def table(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _sciknoweval(start: int, count: int) -> bytes:
    return lines(
        [
            {
                "idx": n,
                "kind": "mcq",
                "dataset": "physics",
                "answer": "B",
                "elo": 1,
                "prompt": f"What is {n}?\n\nA: this\nB: that\nPlease reason step by step.",
                "description": "-",
                "tests": "-",
                "embedding": [],
                "system": "Choose.",
            }
            for n in range(start, start + count)
        ]
    )


def _tooluse(start: int, count: int) -> bytes:
    answer = json.dumps([{"Action": "f", "Action_Input": '{"x": 1}'}])
    return lines(
        [
            {"idx": n, "kind": "tooluse", "prompt": f"Call {n}.", "answer": answer, "system": None}
            for n in range(start, start + count)
        ]
    )


def _math(subject: str) -> bytes:
    rows = [("Level 1", r"So \boxed{2}."), ("Level 5", r"So $\fbox{\frac{1}{2}}$.")]
    return parquet(
        [
            {"problem": f"{subject} {level}", "level": level, "type": subject.title(), "solution": solution}
            for level, solution in rows
        ]
    )


def _livecodebench(day: str, name: str) -> dict[str, Any]:
    return {
        "question_title": name,
        "question_content": f"Add two numbers: {name}.",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "abc",
        "contest_date": f"{day}T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(TESTS),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(TESTS)))).decode(),
        "metadata": "{}",
    }


def _mbpp(*numbers: int) -> bytes:
    rows = [
        {
            "source_file": "x",
            "task_id": n,
            "prompt": f"Add {n}.",
            "code": "def add(a, b): return a + b",
            "test_imports": [],
            "test_list": [f"assert add({n}, 1) == {n + 1}"],
        }
        for n in numbers
    ]
    return parquet(rows)


def _deepcoder(name: str, tests: Any) -> bytes:
    return parquet([{"problem": f"Add, {name}.", "tests": json.dumps(tests), "starter_code": None}])


_GPQA = [
    {
        "Record ID": f"rec{n}",
        "Question": f"Which, {n}?\n",
        "Correct Answer": f"right {n} ",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong, 2",
        "Incorrect Answer 3": "wrong 3",
        "High-level domain": "Physics",
        "Writer's Difficulty Estimate": "Hard graduate level",
    }
    for n in range(3)
]
_HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n    '''Double.'''\n",
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
_MMLU = {
    "question_id": 70,
    "question": "Which?",
    "options": [str(n) for n in range(10)],
    "answer": "J",
    "answer_index": 9,
    "cot_content": "",
    "category": "business",
    "src": "x",
}
_MATH_500 = {
    "problem": "1 + 1?",
    "solution": r"\boxed{2}",
    "answer": "2",
    "subject": "Algebra",
    "level": 2,
    "unique_id": "test/algebra/1.json",
}
_AIME = {"id": 60, "problem": "One?", "solution": "x", "answer": "025", "year": "2024"} | {
    "url": "https://artofproblemsolving.com/wiki/index.php/2024_AIME_II_Problems/Problem_4"
}
SUBJECTS = [
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
]
PART = "{}-00000-of-00001.parquet"

FILES: dict[str, dict[str, bytes]] = {
    **{
        f"sciknoweval-{domain}": {
            f"datasets/sciknoweval/{domain}/train.json": _sciknoweval(0, 4),
            f"datasets/sciknoweval/{domain}/test.json": _sciknoweval(100, 2),
        }
        for domain in ("biology", "chemistry", "material", "physics")
    },
    "tooluse": {
        "datasets/tooluse/train.json": _tooluse(0, 3),
        "datasets/tooluse/test.json": _tooluse(10, 2),
    },
    "math": {f"{subject}/{PART.format('train')}": _math(subject) for subject in SUBJECTS},
    "math-500": {"test.jsonl": lines([_MATH_500])},
    "gsm8k": {
        f"main/{PART.format('train')}": parquet([{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}]),
        f"main/{PART.format('test')}": parquet(
            [{"question": "2 + 2?", "answer": "It is 1,000.\n#### 1,000"}]
        ),
    },
    "aime24": {f"data/{PART.format('train')}": parquet([_AIME])},
    "aime25": {"test.jsonl": lines([{"problem": "One?", "answer": "70", "id": "0"}])},
    "livecodebench-v6": {
        "test6.jsonl": lines(
            [
                _livecodebench("2025-01-31", "early"),
                *(_livecodebench("2025-02-01", f"in {n}") for n in range(12)),
                _livecodebench("2025-05-02", "late"),
            ]
        )
    },
    "deepcoder": {
        "primeintellect/train-00000-of-00002.parquet": _deepcoder("one", TESTS),
        "primeintellect/train-00001-of-00002.parquet": _deepcoder("two", TESTS),
        f"taco/{PART.format('train')}": _deepcoder("three", {"inputs": ["1 2\n"], "outputs": ["3\n"]}),
        f"lcbv5/{PART.format('train')}": _deepcoder("four", TESTS),
        f"codeforces/{PART.format('test')}": _deepcoder("one", TESTS),
        f"lcbv5/{PART.format('test')}": _deepcoder("five", TESTS),
    },
    "humaneval": {"data/HumanEval.jsonl.gz": gzip.compress(lines([_HUMANEVAL]))},
    "mbpp": {
        f"sanitized/{PART.format('prompt')}": _mbpp(2, 10),
        f"sanitized/{PART.format('test')}": _mbpp(11, 510),
        f"sanitized/{PART.format('train')}": _mbpp(601, 974),
        f"sanitized/{PART.format('validation')}": _mbpp(511),
    },
    "gpqa": {"gpqa_diamond.csv": table(_GPQA)},
    "mmlu-pro": {
        f"data/{PART.format('test')}": parquet([_MMLU]),
        f"data/{PART.format('validation')}": parquet([_MMLU | {"question_id": 1}]),
    },
}
"""Set -> path as published -> content."""

COUNTS: dict[str, dict[str, int]] = {
    **{f"sciknoweval-{d}": {"train": 4, "test": 2} for d in ("biology", "chemistry", "material", "physics")},
    "tooluse": {"train": 3, "test": 2},
    "math": {"train": 14},
    "math-500": {"test": 1},
    "gsm8k": {"train": 1, "test": 1},
    "aime24": {"test": 1},
    "aime25": {"test": 1},
    "livecodebench-v6": {"all": 12},
    "deepcoder": {"train": 4, "test": 2},
    "humaneval": {"test": 1},
    "mbpp": {"train": 3, "test": 2},
    "gpqa": {"test": 3},
    "mmlu-pro": {"test": 1},
}
LABELS: dict[str, tuple[str | None, str | None]] = {
    **{f"sciknoweval-{d}": (d, None) for d in ("biology", "chemistry", "material", "physics")},
    "math": ("Algebra", "1"),
    "math-500": ("Algebra", "2"),
    "aime24": ("AIME II", None),
    "livecodebench-v6": ("atcoder", "easy"),
    "gpqa": ("Physics", "Hard graduate level"),
    "mmlu-pro": ("business", None),
}
"""Domain and difficulty of the first problem."""


def put(name: str, directory: Path, change: Callable[[bytes], bytes] = lambda content: content) -> Path:
    """Writes the files of a set as its publisher has them."""
    for path, content in FILES[name].items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(change(content))
    return directory
