"""What the weights of a converted directory are, byte by byte, in the file that `sha256sum --check` reads."""

import re
from collections.abc import Callable
from pathlib import Path

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.run_dir.checkpoint_files import damaged, sha256_of

SUMS = "SHA256SUMS"


def write_sums(directory: Path) -> None:
    """Writes SUMS, of all files that are in `directory` by now."""
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in sorted(directory.iterdir())]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path, announce: Callable[[str], None]) -> None:
    """Raises RunFailed where a file in `directory` is not what its SUMS, where it has one, says. `announce` is told in
    one line, because it takes a while."""
    file = directory / SUMS
    if not file.is_file():
        return
    announce(f"Checking {directory} against its SHA-256")
    text = file.read_text(encoding="utf-8", errors="replace")
    said = {name: digest for digest, name in re.findall("(?m)^([0-9a-f]{64})  (.+)$", text)}
    if not said or len(said) < len(text.splitlines()):
        raise RunFailed(
            f"{directory} is damaged: {file.name} is no list of SHA-256. Put it back from a copy."
        )
    if names := damaged(directory, {"sha256": said}, sorted(said)):
        raise RunFailed(f"{directory} is damaged: {', '.join(names)}. Put it back from a copy.")
