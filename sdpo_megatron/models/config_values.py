"""Numbers out of a config.json, or one line that says what is wrong with them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.families.base import Field


def value_of(values: Mapping[str, Any], field: Field) -> Any:
    """Returns what `values` say, or what a missing or null key means."""
    value = values.get(field.key)
    if value is None and field.also is not None:
        value = values.get(field.also)
    return field.default if value is None else value


def whole(values: Mapping[str, Any], field: Field, file: Path) -> int:
    """Returns a positive whole number. Raises ConfigError, in the name of `file`, where it is none."""
    value = value_of(values, field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive whole number.")
    return value


def positive(values: Mapping[str, Any], field: Field, file: Path) -> float:
    """Returns a positive number. Raises ConfigError, in the name of `file`, where it is none."""
    value = value_of(values, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value <= sys.float_info.max):
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive number.")
    return float(value)
