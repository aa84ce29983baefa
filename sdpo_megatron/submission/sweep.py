"""Values to try of some settings, as `--sweep section.key=a,b,c` gives them, and the runs that they make."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdpo_megatron.errors import ConfigError
from sdpo_megatron.strict_yaml.load import parse_yaml

NOT_SWEPT = {"run.name": "each run has a name of its own", "run.dir": "all runs lie side by side"}


@dataclass(frozen=True)
class Combination:
    overrides: tuple[str, ...]
    """section.key=value, one for each setting that is swept."""

    def name(self, base: str) -> str:
        """Returns the run's name: that of the others, and what is its own."""
        own = [re.sub(r"[^A-Za-z0-9._-]+", "_", override) for override in self.overrides]
        return "-".join([base, *own])


def combinations(sweeps: Sequence[str], overrides: Sequence[str] = ()) -> list[Combination]:
    """Returns all combinations of what `sweeps` list, the last setting changing first. `overrides` are those that all
    runs have. Raises ConfigError for a mistake."""
    values: dict[str, list[str]] = {}
    fixed = {override.partition("=")[0] for override in overrides}
    for sweep in sweeps:
        key, given, text = sweep.partition("=")
        if not given or not re.fullmatch(r"\w+(\.\w+)+", key):
            raise ConfigError(f"--sweep {sweep}: write --sweep section.key=a,b,c.")
        if key in NOT_SWEPT:
            raise ConfigError(f"--sweep {key}: {NOT_SWEPT[key]}; leave it out.")
        if key.startswith("hardware."):
            raise ConfigError(f"--sweep {key}: the jobs of one array are alike; submit them one by one.")
        if key in values or key in fixed:
            raise ConfigError(f"--sweep {key}: the setting is given twice; keep one.")
        values[key] = _listed(text)
        # also one that is written in two ways
        meant = {json.dumps(parse_yaml(value, f"--sweep {sweep}")) for value in values[key]}
        if "" in values[key] or len(meant) < len(values[key]):
            raise ConfigError(f"--sweep {sweep}: a value is empty, or is there twice; write a,b,c.")
    pairs = [[f"{key}={value}" for value in listed] for key, listed in values.items()]
    found = [Combination(overrides) for overrides in itertools.product(*pairs)]
    names = [combination.name("x") for combination in found]
    for name in names:
        if names.count(name) > 1:
            alike = [" ".join(one.overrides) for one in found if one.name("x") == name]
            raise ConfigError(
                f"--sweep: the runs of {' and '.join(alike)} would have one name; submit one of them by itself."
            )
    return found


def _listed(text: str) -> list[str]:
    """Returns what stands between commas, but for those inside of a list, a mapping or quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]
