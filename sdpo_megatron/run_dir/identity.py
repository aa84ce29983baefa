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
    differ = _unlike(before, now)
    # what a section is comes first, and stands for its other keys, which follow from it
    kinds = {key for key in differ if key.endswith(KINDS)}
    of_kinds = {_section(key) for key in kinds}
    others = {key for key in differ if _section(key) not in of_kinds}
    return [_both(key, before, now) for key in [*sorted(kinds), *sorted(others)]]


def changes(stored: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Returns what is not as it was among the settings that an experiment may go on with, each with the value before
    and now. One that only one of them has is left out: another version of the program may have added it."""
    before, now = dict(flatten(stored)), dict(flatten(values))
    both = before.keys() & now.keys() - identity(stored).keys()
    return [_both(key, before, now) for key in sorted(_unlike(before, now) & both)]


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    return {key for key in before.keys() | now.keys() if before.get(key, ABSENT) != now.get(key, ABSENT)}


def _both(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{key}={_written(before.get(key, ABSENT))}, now {key}={_written(now.get(key, ABSENT))}"


def _section(key: str) -> str:
    return key.partition(".")[0]


def _written(value: Any) -> str:
    """Returns the value as it would be written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
