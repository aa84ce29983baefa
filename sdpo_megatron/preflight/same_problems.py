"""Whether a run directory goes on with the problems that it began with: which of them a step asks is a function of the
step and their number, and its metrics are of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_megatron.envs.base import Environment
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Problem
from sdpo_megatron.run_dir.checkpoint_files import newest_checkpoint, read_manifest
from sdpo_megatron.run_dir.directory import RunDirectory

SHOWN = 12
"""Digits of a SHA-256 that a line has."""


def problem_digests(env: Environment) -> dict[str, str]:
    """Returns, for a checkpoint, how many problems there are to train on and held out, and the SHA-256 of what they
    say and of what is right."""
    return {
        "problems.train": _digest(env.train_problems()),
        "problems.held_out": _digest(env.test_problems()),
    }


def check_same_problems(directory: RunDirectory, env: Environment, options: Mapping[str, Any]) -> None:
    """Raises UserError where the newest checkpoint of a run was made with other problems than those of `env`, which
    `options` describe."""
    newest = newest_checkpoint(directory.checkpoints)
    manifest = None if newest is None else read_manifest(newest)
    if manifest is None:
        return
    before = manifest.get("identity", {})
    for key, now in problem_digests(env).items():
        # a checkpoint of an earlier version says nothing of them
        if before.get(key, now) == now:
            continue
        what, option = {
            "problems.train": ("training problems", "train_file"),
            "problems.held_out": ("held-out problems", "test_file"),
        }[key]
        where = f" of {options[option]}" if options.get(option) else ""
        raise UserError(
            f"{directory.path} goes on with the {what} that it began with: they were {before[key]}, now those{where} "
            f"are {now}; put the earlier ones back, or choose another run.name."
        )


def _digest(problems: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        part = [problem.id, problem.messages, problem.tools, problem.answer, problem.grader]
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return f"{len(problems)} with SHA-256 {digest.hexdigest()[:SHOWN]}..."
