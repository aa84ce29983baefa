"""Examinations with lettered options, which are held out as a whole."""

import random
from typing import Any

from pydantic import Field

from sdpo_megatron.data.sets.base import DataSet, Origin
from sdpo_megatron.envs.data.lines import Line, Row


class _Gpqa(Row):
    name: str = Field(alias="Record ID")
    question: str = Field(alias="Question")
    right: str = Field(alias="Correct Answer")
    wrong_1: str = Field(alias="Incorrect Answer 1")
    wrong_2: str = Field(alias="Incorrect Answer 2")
    wrong_3: str = Field(alias="Incorrect Answer 3")
    domain: str = Field(alias="High-level domain")
    difficulty: str | None = Field(default=None, alias="Writer's Difficulty Estimate")


def _gpqa(line: Line) -> dict[str, Any]:
    """The file has the right answer first: options are shuffled, in the same way each time."""
    row = line.fields(_Gpqa)
    right, *wrong = (text.strip() for text in (row.right, row.wrong_1, row.wrong_2, row.wrong_3))
    options = [right, *wrong]
    random.Random(f"gpqa {row.question}").shuffle(options)
    made = {
        "id": row.name,
        "question": row.question.strip(),
        "options": options,
        "answer": "ABCD"[options.index(right)],
        "domain": row.domain,
    }
    return made | ({"difficulty": row.difficulty} if row.difficulty else {})


class _MmluPro(Row):
    question_id: int
    question: str
    options: list[str]
    answer: str
    category: str


def _mmlu_pro(line: Line) -> dict[str, Any]:
    row = line.fields(_MmluPro)
    return {
        "id": str(row.question_id),
        "question": row.question,
        "options": row.options,
        "answer": row.answer,
        "domain": row.category,
    }


SETS = {
    "gpqa": DataSet(
        what="GPQA Diamond: questions of doctoral level",
        env="multiple_choice",
        origin=Origin("hub", "Idavidrein/gpqa"),
        files={"test": ("gpqa_diamond.csv",)},
        licence="CC-BY-4.0",
        row=_gpqa,
        split="all held out; options in a shuffled order that depends on the question alone",
        rows={"test": 198},
        note="its owners admit readers on its page, and ask not to publish its questions: keep the result to yourself",
    ),
    "mmlu-pro": DataSet(
        what="MMLU-Pro: questions of many fields with up to ten options",
        env="multiple_choice",
        origin=Origin("hub", "TIGER-Lab/MMLU-Pro"),
        files={"test": ("data/test-*.parquet",)},
        licence="MIT",
        row=_mmlu_pro,
        split="all held out; the 70 questions for prompts are left away",
        rows={"test": 12032},
    ),
}
