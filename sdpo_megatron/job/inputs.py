"""The files that a job reads, as they were when it was submitted: the model's and its teacher's, and the problems'.

Nothing of them is copied: a job that finds another file in the place of one ends, and says which."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import write_atomically
from sdpo_megatron.models.hub import BESIDE_WEIGHTS
from sdpo_megatron.models.weight_files import INDEX, weight_files
from sdpo_megatron.preflight.checked import Checked
from sdpo_megatron.run_dir.checkpoint_files import sha256_of

AT_ONCE = 4
"""Files that are read at the same time."""
AGAIN = "submit the run again, or put the earlier file back"


@dataclass(frozen=True, kw_only=True)
class InputFile:
    path: str
    bytes: int
    mtime_ns: int
    sha256: str

    def is_as_before(self, path: Path) -> bool:
        """Returns whether the file at `path` has this size and time."""
        there = path.stat()
        return (there.st_size, there.st_mtime_ns) == (self.bytes, self.mtime_ns)


def input_files(checked: Checked) -> list[Path]:
    """Returns the absolute paths of what a run reads, each once."""
    config = checked.config
    found: list[Path] = []
    for directory in dict.fromkeys([checked.model_directory, checked.teacher_directory]):
        beside = {
            path for pattern in (*BESIDE_WEIGHTS, "*/*.jinja", INDEX) for path in directory.glob(pattern)
        }
        found += sorted(path for path in beside if path.is_file()) + weight_files(directory)
    tasks = [config.task, *(suite.task for suite in config.eval.suites.values())]
    for task in tasks:
        found += [
            Path(path) for path in map(os.path.expanduser, _texts(task.options)) if os.path.isfile(path)
        ]
    return list(dict.fromkeys(path.absolute() for path in found))


def describe_inputs(
    paths: Sequence[Path], known: Mapping[str, InputFile], announce: Callable[[str], None]
) -> list[InputFile]:
    """Returns what the files are; `known` are those of an earlier time, by path, of which none is read again that has
    kept its size and time."""
    new = [path for path in paths if str(path) not in known or not known[str(path)].is_as_before(path)]
    if new:
        mb = sum(path.stat().st_size for path in new) / 1e6
        size = f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1000:.1f} GB"
        announce(f"Hashing {len(new)} {'file' if len(new) == 1 else 'files'} of model and problems ({size})")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fresh = {file.path: file for file in pool.map(_describe, new)}
    return [fresh.get(str(path)) or known[str(path)] for path in paths]


def write_inputs(file: Path, inputs: Sequence[InputFile]) -> None:
    write_atomically(file, json.dumps([asdict(one) for one in inputs], indent=2) + "\n")


def read_inputs(file: Path) -> dict[str, InputFile]:
    """Returns the files by path; none where `file` is not there. Raises UserError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        return {one["path"]: InputFile(**one) for one in json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; remove it, and submit the run again.") from None


def check_inputs(inputs: Mapping[str, InputFile]) -> None:
    """Raises UserError for the first file that is gone or is another one. One that only its time tells from what it
    was is read."""
    for one in inputs.values():
        path = Path(one.path)
        try:
            if one.is_as_before(path):
                continue
            same = path.stat().st_size == one.bytes and sha256_of(path) == one.sha256
        except OSError as error:
            raise UserError(
                f"{path}, which was there when the run was submitted, cannot be read ({error.strerror}): {AGAIN}."
            ) from None
        if not same:
            raise UserError(f"{path} has changed since the run was submitted: {AGAIN}.")


def _describe(path: Path) -> InputFile:
    # before it is read: a file that changes meanwhile is noticed later
    there = path.stat()
    return InputFile(path=str(path), bytes=there.st_size, mtime_ns=there.st_mtime_ns, sha256=sha256_of(path))


def _texts(options: Any) -> Iterator[str]:
    if isinstance(options, str):
        yield options
    elif isinstance(options, Mapping):
        for value in options.values():
            yield from _texts(value)
    elif isinstance(options, list):
        for value in options:
            yield from _texts(value)
