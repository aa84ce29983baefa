"""The published files through the preparation: as many problems as published, and experiments that can begin."""

import json
import os
from pathlib import Path

import pytest

from sdpo_megatron.config import load_config
from sdpo_megatron.data.prepare import Request, prepare
from sdpo_megatron.data.sets import SETS
from sdpo_megatron.data.sets.base import DataSet
from sdpo_megatron.envs import build_environment
from sdpo_megatron.preflight.settings import check_problem_counts

YAML = Path(__file__).parents[2] / "yaml"
SCIKNOWEVAL = ("biology", "chemistry", "material", "physics")
FILES: dict[str, tuple[str, str | None]] = {
    **{
        f"sciknoweval-{domain}": (f"sciknoweval/{domain}_train.jsonl", f"sciknoweval/{domain}_test.jsonl")
        for domain in SCIKNOWEVAL
    },
    "math-500": ("math/math500.jsonl", None),
    "aime24": ("math/aime24.jsonl", None),
    "humaneval": ("code/HumanEval.jsonl.gz", None),
    "mbpp": ("code/sanitized-mbpp.json", None),
}


def prepared(data: Path, name: str, out: Path) -> dict:
    path, test = FILES[name]
    request = Request(
        name=name, found=SETS[name], path=data / path, test=test and data / test or None, out=out
    )
    return prepare(request)


@pytest.mark.parametrize("name", FILES)
def test_as_many_problems_as_published_and_none_twice(data, name, tmp_path):
    manifest = prepared(data, name, tmp_path / "out")
    counts = manifest["counts"]
    expected = SETS[name].rows or {"train": 163, "test": 257}
    assert {part: counts[part] for part in expected} == expected
    assert "duplicates" not in counts and "unreadable" not in counts
    [overlap] = [o for o in manifest["overlap"] if o["of"] != o["and"]] or [{"exact": 0, "alike": 0}]
    # one question of material stands in both of the paper's files
    assert (overlap["exact"], overlap["alike"]) == (int(name == "sciknoweval-material"), 0)
    labels = json.loads((tmp_path / "out/test.jsonl").open().readline())
    if name.startswith("sciknoweval"):
        assert labels["domain"] == name.partition("-")[2]
    if name == "math-500":
        assert (labels["domain"], labels["difficulty"]) == ("Precalculus", "2")


@pytest.mark.parametrize(
    ("files", "sets"),
    [
        (["sciknoweval_8b.yaml"], ["sciknoweval-chemistry"]),
        *(
            (["sciknoweval_8b.yaml", f"cells/{domain}.yaml"], [f"sciknoweval-{domain}"])
            for domain in SCIKNOWEVAL
            if domain != "chemistry"
        ),
        (["math_8b.yaml", "cells/recipe_sciknoweval.yaml"], ["sciknoweval-chemistry"]),
        (["sciknoweval_cpu.yaml"], ["sciknoweval-physics"]),
        (["mbpp_cpu.yaml"], ["mbpp"]),
    ],
)
def test_the_experiments_read_what_the_command_in_the_readme_makes(data, files, sets, tmp_path, monkeypatch):
    for name in sets:
        prepared(data, name, tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    config, origins = load_config([YAML / name for name in files])
    env = build_environment(config.task, origins)
    check_problem_counts(config.rollout, train=len(env.train_problems()))
    assert len(env.test_problems()) >= config.eval.problems


@pytest.mark.parametrize(
    ("path", "env", "count"),
    [("gsm8k/test.jsonl", "math_answer", 1319), ("tooluse/test.jsonl", "tool_call", 68)],
)
def test_test_files_alone_as_files_of_one_s_own(data, path, env, count, tmp_path):
    found = DataSet(what="own", env=env, files={"all": ("*",)}, split="")
    manifest = prepare(Request(name="own", found=found, path=data / path, out=tmp_path / "out"))
    counts = manifest["counts"]
    assert counts["train"] + counts["test"] == count and 0 < counts["test"] < 0.2 * count
    assert manifest["overlap"][0]["exact"] == 0
    assert os.listdir(tmp_path) == ["out"]
