r"""Mathematics with one answer each, which math-verify compares."""

from typing import Any

from sdpo_megatron.data.sets.base import DataSet, Origin
from sdpo_megatron.envs.data.lines import Line

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _with_subject_and_level(line: Line) -> dict[str, Any]:
    """MATH says `type` and "Level 3" where MATH-500 says `subject` and 3."""
    values = line.values
    domain = values.get("subject", values.get("type"))
    difficulty = str(values.get("level", "")).removeprefix("Level ")
    return values | {"domain": domain, "difficulty": difficulty}


def _with_exam(line: Line) -> dict[str, Any]:
    """The wiki's address of a problem, where the set has it, names its exam: 2024_AIME_I."""
    exam = str(line.values.get("url", "")).rpartition("title=")[2]
    parts = [part for part in ("AIME_II", "AIME_I") if part in exam]
    return line.values | ({"domain": parts[0].replace("_", " ")} if parts else {})


SETS = {
    "math": DataSet(
        what="MATH (Hendrycks et al.), the training problems",
        env="math_answer",
        origin=Origin("hub", "EleutherAI/hendrycks_math"),
        files={"train": tuple(f"{subject}/train-*.parquet" for subject in _SUBJECTS)},
        licence="MIT",
        row=_with_subject_and_level,
        split="the published training part alone: hold out math-500, a part of MATH's test problems",
        rows={"train": 7500},
        note="--against math-500's prepared file shows what they have in common",
    ),
    "math-500": DataSet(
        what="MATH-500 (Lightman et al.)",
        env="math_answer",
        origin=Origin("hub", "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),
        files={"test": ("test.jsonl",)},
        licence="MIT",
        row=_with_subject_and_level,
        split="all held out",
        rows={"test": 500},
    ),
    "gsm8k": DataSet(
        what="GSM8K: word problems of primary school",
        env="math_answer",
        origin=Origin("hub", "openai/gsm8k"),
        files={"train": ("main/train-*.parquet",), "test": ("main/test-*.parquet",)},
        licence="MIT",
        split="the published parts of the configuration main",
        rows={"train": 7473, "test": 1319},
    ),
    "aime24": DataSet(
        what="AIME 2024, I and II",
        env="math_answer",
        origin=Origin("hub", "HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
        files={"test": ("data/train-*.parquet",)},
        licence="not stated; the problems are the Mathematical Association of America's",
        row=_with_exam,
        split="all held out",
        rows={"test": 30},
    ),
    "aime25": DataSet(
        what="AIME 2025, I and II",
        env="math_answer",
        origin=Origin("hub", "math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
        files={"test": ("test.jsonl",)},
        licence="not stated; the problems are the Mathematical Association of America's",
        row=_with_exam,
        split="all held out",
        rows={"test": 30},
    ),
}
