"""Programs in Python with tests."""

from typing import Any

from sdpo_megatron.data.sets.base import DataSet, Origin, Split
from sdpo_megatron.envs.data.lines import Line, Row

_FIRST_DAY, _LAST_DAY = "2025-02-01", "2025-05-01"


class _Contest(Row):
    contest_date: str
    platform: str
    difficulty: str


def _livecodebench(line: Line) -> dict[str, Any]:
    return line.values | {"domain": line.fields(_Contest).platform}


def _in_the_papers_contests(line: Line) -> Split | None:
    return "train" if _FIRST_DAY <= line.fields(_Contest).contest_date[:10] <= _LAST_DAY else None


class _Task(Row):
    task_id: int


def _mbpp_part(line: Line) -> Split | None:
    """The set's paper says which numbers are for prompts (1 to 10), tests (to 510), validation and training."""
    number = line.fields(_Task).task_id
    return None if number <= 10 else "test" if number <= 510 else "train"


SETS = {
    "livecodebench-v6": DataSet(
        what="LiveCodeBench, the contests from 2025-02-01 to 2025-05-01",
        env="python_tests",
        options={"format": "livecodebench"},
        origin=Origin(
            "hub", "livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
        ),
        files={"all": ("test6.jsonl",)},
        licence="CC, as the set's page has it",
        row=_livecodebench,
        split="contests of those days",
        part_of=_in_the_papers_contests,
        variants=("paper", "held_out"),
        rows={"all": 131},
        note="split paper trains and evaluates on the same questions, as arXiv 2601.20802 does; held_out does not",
    ),
    "deepcoder": DataSet(
        what="DeepCoder-Preview: PrimeIntellect, TACO, LiveCodeBench v5, Codeforces",
        env="python_tests",
        options={"format": "deepcoder"},
        origin=Origin("hub", "agentica-org/DeepCoder-Preview-Dataset"),
        files={
            "train": ("primeintellect/train-*.parquet", "taco/train-*.parquet", "lcbv5/train-*.parquet"),
            "test": ("codeforces/test-*.parquet", "lcbv5/test-*.parquet"),
        },
        licence="MIT",
        split="the published parts",
        note="its parts come from the same contest sites, so that a question may be in several; see the overlap",
    ),
    "humaneval": DataSet(
        what="HumanEval: functions by their description",
        env="python_tests",
        options={"format": "humaneval"},
        origin=Origin("github", "openai/human-eval", "6d43fb980f9fee3c892a914eda09951f772ad10d"),
        files={"test": ("data/HumanEval.jsonl.gz",)},
        licence="MIT",
        split="all held out",
        rows={"test": 164},
    ),
    "mbpp": DataSet(
        what="MBPP, sanitized: small programs",
        env="python_tests",
        options={"format": "mbpp"},
        origin=Origin("hub", "google-research-datasets/mbpp"),
        files={"all": ("sanitized/*.parquet",)},
        licence="CC-BY-4.0",
        split="by task_id, as the set's paper has it: 1 to 10 left out (prompts), to 510 held out, others to train on",
        part_of=_mbpp_part,
    ),
}
