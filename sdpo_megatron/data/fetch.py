"""The files of a set: where they are downloaded to, or lie already."""

import re
from collections.abc import Mapping
from pathlib import Path

from sdpo_megatron.data.sets.base import DataSet, Origin, Patterns
from sdpo_megatron.errors import UserError

Files = Mapping[str, list[Path]]
"""Part of a set -> its files, in the order in which they are read."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(name: str, found: DataSet, into: Path, out: Path) -> tuple[Path, str]:
    """Returns the directory with a set's files, and the revision that they are of. Those of the Hub stay in its cache,
    others in `into`.

    Raises UserError with what to run elsewhere, and then here for `out`, where they cannot be had."""
    origin = found.origin
    assert origin is not None
    try:
        directory = _from_hub(origin, found.files) if origin.kind == "hub" else _from_github(found, into)
    except _Unreachable as reason:
        command = origin.command(found.files)
        raise UserError(
            f"{name} cannot be fetched: {reason}. Where it can be, run: {command}; then here: "
            f"tools/prepare_data.py DIR --as {name} --out {out}"
        ) from None
    revision = directory.name if _COMMIT.fullmatch(directory.name) else origin.revision
    return directory, revision


def given(name: str, found: DataSet, path: Path, test: Path | None) -> Files:
    """Returns a set's files that lie at `path`: a directory that has them under their published names, or the file of
    its only part, or that of its training part, with `test` beside it."""
    for one in (path, test):
        if one is not None and not one.exists():
            raise UserError(f"There is no file {one}: correct its path in the command.")
    parts = list(found.files)
    if path.is_dir() and test is None:
        return in_directory(name, found, path)
    if test is not None and parts != ["train", "test"]:
        raise UserError(f"{name} has one file, and --test names another; leave it away.")
    if test is None and len(parts) > 1:
        raise UserError(
            f"{name} has a file of held-out problems too: name it by --test, or give the directory that has "
            f"{' and '.join(_names(found.files))}."
        )
    return {parts[0]: [path]} | ({"test": [test]} if test is not None else {})


def in_directory(name: str, found: DataSet, directory: Path) -> Files:
    """Returns a set's files in a directory: where the publisher has them, or all beside one another."""
    files: dict[str, list[Path]] = {}
    basenames = [Path(pattern).name for pattern in _names(found.files)]
    for part, patterns in found.files.items():
        files[part] = []
        for pattern in patterns:
            matches = sorted(directory.glob(pattern))
            if not matches and basenames.count(Path(pattern).name) == 1:
                matches = sorted(directory.glob(Path(pattern).name))
            if not matches:
                command = found.origin.command(found.files) if found.origin else ""
                raise UserError(f"{directory} has no {pattern} of {name}; get it by: {command}")
            files[part] += matches
    return files


class _Unreachable(Exception):
    """Says why a set cannot be had."""


def _names(files: Patterns) -> list[str]:
    return [pattern for patterns in files.values() for pattern in patterns]


def _from_hub(origin: Origin, files: Patterns) -> Path:
    import httpx2
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                origin.name, repo_type="dataset", revision=origin.revision, allow_patterns=_names(files)
            )
        )
    except errors.GatedRepoError:
        raise _Unreachable(
            "it is shown to those alone whom its owners admit; ask for that on its page, then run: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise _Unreachable(f"the Hugging Face Hub has no revision '{origin.revision}' of it") from None
    except errors.LocalEntryNotFoundError as error:
        offline = constants.is_offline_mode()
        raise _Unreachable(
            "HF_HUB_OFFLINE is set" if offline else _first_line(error.__cause__ or error)
        ) from None
    # hf_xet, which moves large files, raises RuntimeError
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        raise _Unreachable(_first_line(error)) from None


def _from_github(found: DataSet, into: Path) -> Path:
    import httpx

    origin = found.origin
    assert origin is not None
    for path in _names(found.files):
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                httpx.stream("GET", origin.url(path), follow_redirects=True, timeout=30) as answer,
                target.open("wb") as file,
            ):
                answer.raise_for_status()
                for piece in answer.iter_bytes():
                    file.write(piece)
        except (httpx.HTTPError, OSError) as error:
            raise _Unreachable(f"{origin.url(path)}: {_first_line(error)}") from None
    return into


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
