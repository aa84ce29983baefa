"""Directories whose weights are in megatron-core's format beside their model's config.json and tokenizer, as
tools/convert_checkpoint.py makes them."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdpo_megatron.errors import EXIT_USER_ERROR, RunFailed, UserError

METADATA = ".metadata"
"""Where torch says which tensors such a directory has."""


def convert_megatron(directory: Path, target: Path) -> None:
    """Fills `target`. Raises UserError or RunFailed where `directory` cannot be converted."""
    made = target / "made"
    convert_in_process(["megatron-to-hf", str(directory), str(made)])
    for path in made.iterdir():
        path.rename(target / path.name)
    made.rmdir()


def convert_in_process(arguments: Sequence[str], log: Path | None = None) -> None:
    """Runs `python -m sdpo_megatron.conversion` with these arguments, in a process of its own, which gives its memory
    back; what it prints goes into the file `log`. Raises UserError or RunFailed with its words."""
    command = [sys.executable, "-m", "sdpo_megatron.conversion", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="backslashreplace")
    if log is not None:
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = [line for line in lines if line.startswith("error: ")] or lines
        kind = UserError if done.returncode == EXIT_USER_ERROR else RunFailed
        raise kind(said[-1].removeprefix("error: "))
