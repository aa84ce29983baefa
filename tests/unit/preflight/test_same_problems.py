"""A run directory goes on only with the problems that it began with."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs import Environment, build_environment
from sdpo_megatron.errors import UserError
from sdpo_megatron.preflight.same_problems import check_same_problems, problem_digests
from sdpo_megatron.run_dir.checkpoint_files import checkpoint_path, seal, write_manifest
from sdpo_megatron.run_dir.directory import RunDirectory

LINES = [{"id": f"p{k}", "prompt": f"What is {k}?", "answer": str(k), "grader": "exact"} for k in range(3)]


def env_of(file: Path, lines: list[dict[str, Any]]) -> tuple[Environment, dict[str, Any]]:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"train_file": str(file)}
    return build_environment(TaskSettings(env="jsonl", options=options)), options


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "x")
    env, _ = env_of(tmp_path / "t.jsonl", LINES)
    checkpoint = checkpoint_path(directory.checkpoints, 5)
    checkpoint.mkdir(parents=True)
    (checkpoint / "file").write_text("x")
    identity = {"run.seed": 0} | problem_digests(env)
    write_manifest(checkpoint, {"step": 5, "identity": identity}, seal(checkpoint, ["file"]))
    return directory


def test_the_same_problems_go_on_however_their_file_is_written(run: RunDirectory, tmp_path: Path):
    check_same_problems(run, *env_of(tmp_path / "moved.jsonl", LINES))
    other_keys = [dict(reversed(line.items())) for line in LINES]
    check_same_problems(run, *env_of(tmp_path / "t.jsonl", other_keys))


@pytest.mark.parametrize(
    "lines",
    [
        [*LINES[:2], {**LINES[2], "answer": "7"}],
        [*LINES[:2], {**LINES[2], "prompt": "What?"}],
        [LINES[1], LINES[0], LINES[2]],
        [*LINES, {**LINES[0], "id": "p3"}],
    ],
)
def test_others_are_named(run: RunDirectory, tmp_path: Path, lines: list[dict[str, Any]]):
    file = tmp_path / "t.jsonl"
    env, options = env_of(file, lines)
    with pytest.raises(UserError) as caught:
        check_same_problems(run, env, options)
    before, now = (problem_digests(env_of(file, some)[0])["problems.train"] for some in (LINES, lines))
    assert before.startswith("3 with SHA-256 ") and before != now
    assert str(caught.value) == (
        f"{run.path} goes on with the training problems that it began with: they were {before}, now those of "
        f"{file} are {now}; put the earlier ones back, or choose another run.name."
    )


def test_nothing_is_compared_without_a_checkpoint_or_with_one_of_an_earlier_version(tmp_path: Path):
    directory = RunDirectory(tmp_path / "x")
    env, options = env_of(tmp_path / "t.jsonl", LINES)
    check_same_problems(directory, env, options)
    checkpoint = checkpoint_path(directory.checkpoints, 5)
    checkpoint.mkdir(parents=True)
    (checkpoint / "file").write_text("x")
    write_manifest(checkpoint, {"step": 5, "identity": {}}, seal(checkpoint, ["file"]))
    check_same_problems(directory, env, options)
