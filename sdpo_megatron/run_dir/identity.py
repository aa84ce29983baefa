"""Which settings make an experiment: a run directory continues only with the same ones."""

import json
from collections.abc import Mapping
from typing import Any

from sdpo_megatron.strict_yaml.load import flatten

IDENTITY = (
    "model.path",
    "model.revision",
    "model.dtype",
    "task",
    "run.seed",
    "loss.name",
    "loss",
    "teacher.name",
    "teacher.path",
    "teacher.revision",
)
"""Keys, or sections."""
KINDS = (".name", ".env")
"""The ends of keys that say which others their section has."""
ABSENT = "(not set)"


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that make the experiment, by dotted key; `values` is `Config.model_dump()`."""
    return {
        key: value
        for key, value in flatten(values)
        if value not in ({}, None) and any(key == part or key.startswith(f"{part}.") for part in IDENTITY)
    }


def differences(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Returns what makes two experiments of them, each with the value before and now."""
    before, now = identity(stored), identity(values)
    differ = {key for key in before.keys() | now.keys() if before.get(key, ABSENT) != now.get(key, ABSENT)}
    # what a section is comes first, and stands for its other keys, which follow from it
    kinds = {key for key in differ if key.endswith(KINDS)}
    of_kinds = {_section(key) for key in kinds}
    others = {key for key in differ if _section(key) not in of_kinds}
    return [
        f"{key}={_written(before.get(key, ABSENT))}, now {key}={_written(now.get(key, ABSENT))}"
        for key in [*sorted(kinds), *sorted(others)]
    ]


def _section(key: str) -> str:
    return key.partition(".")[0]


def _written(value: Any) -> str:
    """Returns the value as it would be written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
