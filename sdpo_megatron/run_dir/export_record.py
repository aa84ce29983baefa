"""What a Hugging Face export says of itself: how many steps its weights were trained."""

import json
from pathlib import Path

FILE = "sdpo_megatron.json"


def record_export(directory: Path, steps: int) -> None:
    (directory / FILE).write_text(json.dumps({"steps": steps}), encoding="utf-8")


def exported_steps(directory: Path) -> int | None:
    """Returns how many steps the exported weights were trained; None where there is no whole export."""
    try:
        return json.loads((directory / FILE).read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
