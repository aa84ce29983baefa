"""What a Hugging Face export says of itself: how many steps its weights were trained, and from which."""

import json
from pathlib import Path
from typing import Any

FILE = "sdpo_megatron.json"


def record_export(directory: Path, steps: int, base: str) -> None:
    """`base` is the SHA-256 of the weights that training began with (evaluation/ruler.py)."""
    (directory / FILE).write_text(json.dumps({"steps": steps, "base": base}), encoding="utf-8")


def exported_steps(directory: Path) -> int | None:
    """Returns how many steps the exported weights were trained; None where there is no whole export."""
    return _record(directory).get("steps")


def exported_base(directory: Path) -> str | None:
    """Returns the SHA-256 of the weights that training began with; None where the directory is no export."""
    return _record(directory).get("base")


def _record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
