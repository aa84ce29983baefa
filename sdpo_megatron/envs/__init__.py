"""The environments by name. A new one is a file here, a line in ENVS and a test."""

from collections.abc import Mapping
from typing import Any

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs.base import Environment, look_up
from sdpo_megatron.envs.equations import Equations
from sdpo_megatron.envs.graders import GRADERS
from sdpo_megatron.envs.jsonl import JsonlProblems
from sdpo_megatron.strict_yaml.load import parse

__all__ = ["ENVS", "GRADERS", "Environment", "build_environment"]

ENVS: dict[str, type[Environment]] = {"equations": Equations, "jsonl": JsonlProblems}


def build_environment(task: TaskSettings, origins: Mapping[str, str] | None = None) -> Environment:
    """Returns the environment that `task` names, with its problems. `origins` (of strict_yaml) only serves messages.

    Raises UserError for an unknown name, for options that it does not know, and for data that cannot be read.
    """
    environment = look_up("environment (task.env)", task.env, ENVS)
    options: dict[str, Any] = task.options
    return environment(parse(environment.Options, options, origins or {}, "task.options"))
