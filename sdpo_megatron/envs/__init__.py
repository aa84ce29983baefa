"""The environments by name. A new one is a file here, a line in ENVS and a test; or a class of somebody else's, named
by its import path."""

import importlib
import inspect
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs.base import Environment, look_up
from sdpo_megatron.envs.graders import GRADERS
from sdpo_megatron.errors import ConfigError, ReportedError, quoted
from sdpo_megatron.records import Problem
from sdpo_megatron.strict_yaml.load import parse
from sdpo_megatron.strict_yaml.section import Section

__all__ = ["ENVS", "GRADERS", "Environment", "build_environment", "environment_class"]

ENVS = {
    "equations": "sdpo_megatron.envs.equations:Equations",
    "jsonl": "sdpo_megatron.envs.jsonl:JsonlProblems",
    "math_answer": "sdpo_megatron.envs.math_answer:MathAnswer",
    "multiple_choice": "sdpo_megatron.envs.multiple_choice:MultipleChoice",
    "reasoning_gym": "sdpo_megatron.envs.reasoning_gym:ReasoningGym",
    "tool_call": "sdpo_megatron.envs.tool_call:ToolCall",
    "python_tests": "sdpo_megatron.envs.python_tests:PythonTests",
}
"""Imported only where it is named: some need libraries that take seconds."""


def build_environment(
    task: TaskSettings, origins: Mapping[str, str] | None = None, key: str = "task"
) -> Environment:
    """Returns the environment that `task` names, with its problems. `origins` (of strict_yaml) and `key`, the section
    that `task` is, only serve messages.

    Raises UserError for an unknown name or import path, for options that it does not know, and for data that cannot be
    read.
    """
    environment = environment_class(task.env)
    options: dict[str, Any] = task.options
    settings = parse(environment.Options, options, origins or {}, f"{key}.options")
    try:
        env = environment(settings)
        for name in ("train_problems", "test_problems"):
            if wrong := what_is_wrong_with(getattr(env, name)()):
                raise ConfigError(f"task.env={task.env}: {name} {wrong}.")
    except ReportedError:
        raise
    except Exception as error:
        # one of our own is a bug of ours
        if task.env in ENVS:
            raise
        raise ConfigError(f"task.env={task.env} cannot be built from its options: {_said(error)}.") from None
    return env


def what_is_wrong_with(problems: Any) -> str:
    """Returns what of a set of problems is not as `Problem` says, as the end of a sentence; empty where all is well."""
    if not isinstance(problems, Sequence) or isinstance(problems, str):
        return f"returned {type(problems).__name__}; return a list of Problem"
    ids: set[str] = set()
    for place, problem in enumerate(problems):
        if not isinstance(problem, Problem):
            return f"holds {type(problem).__name__} at place {place}; return a list of Problem"
        if not isinstance(problem.id, str) or not isinstance(problem.answer, str):
            return f"holds a problem at place {place} whose id or answer is no text: {quoted(problem.id)}"
        if problem.id in ids:
            return f"holds two problems whose id is {quoted(problem.id)}; give each its own"
        ids.add(problem.id)
        turns = problem.messages
        if not isinstance(turns, list) or not turns or not all(map(_is_message, turns)):
            return (
                f"holds problem {quoted(problem.id)} whose messages are no list of {{role, content}} of text"
            )
    return ""


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def environment_class(name: str) -> type[Environment]:
    """Returns the class that has this name in ENVS, or this import path, `package.module:Class`. Raises ConfigError."""
    if "." in name and ":" not in name:
        raise ConfigError(f"task.env is {name}; write the import path of a class as package.module:Class.")
    module_name, colon, class_name = (
        name if ":" in name else look_up("environment (task.env)", name, ENVS)
    ).partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        what = "there is no such module; start the run where it can be imported" if missing else _said(error)
        raise ConfigError(f"task.env={name}: {module_name} cannot be imported: {what}.") from None
    found = getattr(module, class_name, None)
    if not (colon and inspect.isclass(found) and issubclass(found, Environment)):
        own = sorted(
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, Environment) and value is not Environment
        )
        has = f"it has {', '.join(own)}" if own else "it has none"
        raise ConfigError(
            f"task.env={name}: {class_name or 'nothing'} in {module_name} is no class that derives from "
            f"sdpo_megatron.envs.base.Environment; {has}."
        )
    lacks = ", ".join(sorted(found.__abstractmethods__))
    if lacks:
        raise ConfigError(f"task.env={name}: {class_name} lacks {lacks}; write what Environment says of it.")
    options = getattr(found, "Options", None)
    if not (inspect.isclass(options) and issubclass(options, Section)):
        raise ConfigError(
            f"task.env={name}: {class_name}.Options must be a class that derives from sdpo_megatron.config.Section; "
            "an empty one will do."
        )
    return found


def _said(error: Exception) -> str:
    """The exception in a line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
