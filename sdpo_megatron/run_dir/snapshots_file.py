"""Which directory an id of the Hugging Face Hub meant when the run began: `main` moves, a run must not.

The launcher asks the Hub; ranks and later starts of the same run read the answer here."""

import json
from pathlib import Path

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import read_text, write_atomically


def read_snapshots(file: Path) -> dict[str, str]:
    """Returns the directories by id and revision, as `models.hub.fetch` keeps them; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{file} is damaged; remove it, and the models are looked up again.")
    return values


def write_snapshots(file: Path, snapshots: dict[str, str]) -> None:
    if snapshots:
        write_atomically(file, json.dumps(snapshots, indent=2) + "\n")
