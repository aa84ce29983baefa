"""Directories whose weights are in megatron-core's format beside their model's config.json and tokenizer, as
tools/convert_checkpoint.py makes them: converted once to safetensors, which trainer and server read."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sdpo_megatron.errors import EXIT_USER_ERROR, RunFailed, UserError
from sdpo_megatron.models.bin_weights import state_of
from sdpo_megatron.models.converted import convert_once, is_converted, models_cache
from sdpo_megatron.models.weight_files import INDEX, SINGLE

METADATA = ".metadata"
"""Where torch says which tensors such a directory has."""
CONVERTER = 1
"""Part of the converted directory's name: raise it when the conversion changes what it writes."""


def from_megatron(
    directory: Path,
    cache: Path | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Path:
    """Returns `directory`, or where it has its weights in megatron-core's format alone, a converted copy of it.

    The copy lies in `cache`, by default the user's, and is made again where the original has changed. `announce` is
    told, in one line, before a conversion. Raises UserError or RunFailed where it cannot be converted."""
    if not (directory / METADATA).is_file() or any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return directory
    files = sorted(path for path in directory.iterdir() if path.is_file())
    converted = (cache or models_cache()) / f"{directory.name}-{state_of(files)}-v{CONVERTER}"

    def convert(target: Path) -> None:
        made = target / "made"
        convert_in_process(["megatron-to-hf", str(directory), str(made)])
        for path in made.iterdir():
            path.rename(target / path.name)
        made.rmdir()

    if not is_converted(converted):
        announce(f"Converting the megatron-core checkpoint {directory} to safetensors (once): {converted}")
        convert_once(converted, convert)
    return converted


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
