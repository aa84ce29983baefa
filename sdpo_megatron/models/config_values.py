"""Numbers out of a config.json, or one line that says what is wrong with them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.families.base import Field

LARGEST_BITS = 1000
"""Of a whole number that a float can be."""


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
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive number.")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ConfigError(f"{file}: {field.key} is {quoted(value)}; it must be a positive number.")
    return float(value)


def is_one(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 1
