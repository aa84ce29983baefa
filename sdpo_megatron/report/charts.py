"""Which numbers of metrics.jsonl the trends show."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_STACKED = "Time of a step"
_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward", "", ("env/all/reward/total", "env/all/correct")),
    ("Held-out accuracy", "", (r"test[^/]*/avg@\d+", r"test[^/]*/exact_answer_prob")),
    ("Divergence, student and teacher", "nats", (r"sdpo/divergence/(mean|p50|p95)",)),
    ("Held-out, the best and the commonest of several", "", (r"test[^/]*/(pass|maj)@\d+",)),
    ("Entropy", "nats", ("policy/entropy",)),
    ("Response length", "tokens", (r"(test[^/]*/)?env/all/response_length/mean",)),
    ("Cut off at the longest", "share", (r"(test[^/]*/)?env/all/truncated_fraction",)),
    ("Gradient norm", "", ("optim/grad_norm",)),
    ("Gap of server and trainer", "nats", (r"rollout_gap/(mean|max)",)),
    ("Loss", "", ("loss",)),
    (_STACKED, "s", (r"time/(?!total$).*",)),
    ("Memory", "GiB", (r"memory/.*",)),
)
"""Title, unit, and the keys, as regular expressions for whole keys."""


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Returns the numbers of all rows by key, in six digits; None where a row has none."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def charts(keys: Sequence[str]) -> list[dict[str, Any]]:
    """Returns title, unit and keys of each chart that these keys have numbers for."""
    found = []
    for title, unit, patterns in _CHARTS:
        of = [key for pattern in patterns for key in keys if re.fullmatch(pattern, key)]
        if of:
            found.append({"title": title, "unit": unit, "keys": of, "stacked": title == _STACKED})
    return found


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """Returns step and name of every warning that held."""
    return [
        (row["step"], key.removeprefix("warning/"))
        for row in rows
        for key, value in row.items()
        if key.startswith("warning/") and value
    ]


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) else None
