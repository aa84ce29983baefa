"""A set of problems, row by row, into files that an environment reads, and a manifest that says how they came about."""

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpo_megatron.data.check import Checked, Checker, checker
from sdpo_megatron.data.fetch import Files, download, given, in_directory
from sdpo_megatron.data.seen import Seen, fingerprint, normalised
from sdpo_megatron.data.sets.base import DataSet
from sdpo_megatron.envs.data.files import read_lines
from sdpo_megatron.envs.data.lines import Named
from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.files import sync_directory, write_atomically

NAMED = Named("the command", "--fields")
_REASONS = 5
"""Unreadable rows of which the manifest says what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for."""

    name: str
    """Of the set, or of one's own file."""
    found: DataSet
    out: Path
    path: Path | None = None
    """Where the set's files lie; None: download them."""
    test: Path | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    variant: str = ""
    share: float = 0.1
    """Of the problems that are held out, where the set does not say which are."""
    seed: int = 0
    leave_out_unreadable: bool = False
    against: tuple[Path, ...] = ()
    command: str = ""


def prepare(request: Request) -> dict[str, Any]:
    """Writes `request.out`, a directory that must not be there, and returns its manifest. Until all is there nothing
    is. Raises UserError for whatever the user has to mend."""
    out = request.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it, or name another directory by --out.")
    check = checker(request.found.env, request.found.options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.unfinished-"))
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}); name another directory."
        ) from None
    try:
        result = work / "result"
        result.mkdir()
        manifest = _prepared(request, check, work, result)
        write_atomically(result / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        os.replace(result, out)
        sync_directory(out.parent)
    except (OSError, sqlite3.OperationalError) as error:
        raise UserError(
            f"--out {out} cannot be written ({error}); make room, or name another place."
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _prepared(request: Request, check: Checker, work: Path, result: Path) -> dict[str, Any]:
    found = request.found
    root, revision = Path(), "as given"
    if request.path is None:
        root, revision = download(request.name, found, work / "fetched", request.out)
        files = in_directory(request.name, found, root)
    else:
        files = given(request.name, found, request.path, request.test)
    with closing(Seen(work / "seen.sqlite")) as seen:
        sorted_rows = _Sorted(request, check, seen)
        with _writers(result) as write:
            sorted_rows.read(files, root, write)
        made = sorted(result.iterdir())
        parts = [path.stem for path in made]
        sorted_rows.complain_of_nothing(parts)
        for path in made:
            _read_back(path, check, seen)
        overlaps = _overlaps(request, parts, check, seen)
    source: dict[str, Any] = {"files": sorted_rows.sources}
    if found.origin:
        source |= {"kind": found.origin.kind, "name": found.origin.name, "revision": revision}
    return {
        "set": request.name,
        "env": found.env,
        "options": _options(request, parts),
        "source": source,
        "licence": found.licence,
        "split": sorted_rows.rule,
        "counts": sorted_rows.counts,
        "unreadable": sorted_rows.reasons,
        "overlap": overlaps,
        "note": found.note,
        "files": {path.name: {"rows": sorted_rows.counts[path.stem], **_described(path)} for path in made},
        "command": request.command,
    }


class _Sorted:
    """The rows of a set's files, each once, in the part where it belongs."""

    def __init__(self, request: Request, check: Checker, seen: Seen) -> None:
        self.counts: Counter[str] = Counter()
        self.sources: list[dict[str, Any]] = []
        self.reasons: list[str] = []
        self._request, self._check, self._seen = request, check, seen
        found = request.found
        self._variant = request.variant or (found.variants[0] if found.variants else "")
        self._by_share = "all" in found.files and (found.part_of is None or self._variant == "held_out")
        rules = [found.split]
        if self._variant == "paper":
            rules.append("train and test are the same questions (task.options.split=paper)")
        elif self._by_share:
            rules.append(
                f"a share of {request.share:g} is held out, by the hash of seed {request.seed} and the problem's "
                "normalised text"
            )
        self.rule = "; ".join(filter(None, rules))

    def read(self, files: Files, root: Path, write: Any) -> None:
        for part, paths in files.items():
            for path in paths:
                kept = 0
                for to, row in self._rows(part, path):
                    write(to, row)
                    kept += 1
                shown = str(path.relative_to(root)) if root.is_absolute() else str(path)
                self.sources.append({"path": shown, "part": part, "kept": kept, **_described(path)})

    def _rows(self, part: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        found = self._request.found
        for line in read_lines(path, self._request.fields, "a row", NAMED):
            self.counts["read"] += 1
            try:
                to = part if found.part_of is None or part != "all" else found.part_of(line)
                if to is None:
                    self.counts["left out by the split rule"] += 1
                    continue
                checked = self._check(line if found.row is None else line.with_values(found.row(line)))
            except UserError as error:
                if not self._request.leave_out_unreadable:
                    raise
                self.counts["unreadable"] += 1
                self.reasons += [str(error)] if len(self.reasons) < _REASONS else []
                continue
            to = self._part(to, checked)
            outcome = self._seen.add(to, checked)
            self.counts[to if outcome == "new" else outcome] += 1
            if outcome == "new":
                yield to, checked.row

    def _part(self, part: str, checked: Checked) -> str:
        if self._variant == "paper":
            return "all"
        if not self._by_share:
            return part
        # by the normalised text: what is alike stays together, so that nothing held out is trained on
        place = int.from_bytes(fingerprint(f"{self._request.seed} {normalised(checked.text)}")[:8]) / 2**64
        return "test" if place < self._request.share else "train"

    def complain_of_nothing(self, made: list[str]) -> None:
        """Raises UserError where a part that should have problems has none."""
        wanted = ["all"] if self._variant == "paper" else [p for p in self._request.found.files if p != "all"]
        if self._by_share:
            wanted = ["train", "test"] if self._request.share else ["train"]
        for part in wanted:
            if part not in made:
                what = {"train": "to train on", "test": "held out"}.get(part, "in these files")
                counts = ", ".join(f"{count} {name}" for name, count in self.counts.items()) or "0 read"
                change = "; change --share" if self._by_share and self.counts["read"] > 1 else ""
                raise UserError(
                    f"{self._request.name}: the split leaves no problem {what} ({counts}){change}."
                )


@contextmanager
def _writers(directory: Path) -> Iterator[Any]:
    """Yields what adds a row to the file of a part."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def write(part: str, row: dict[str, Any]) -> None:
            if part not in files:
                files[part] = stack.enter_context((directory / f"{part}.jsonl").open("w", encoding="utf-8"))
            files[part].write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _read_back(path: Path, check: Checker, seen: Seen) -> None:
    """Raises UserError where a run could not load the file: two rows with one id."""
    for line in read_lines(path, {}, "a row", NAMED):
        name = check(line).id
        if not seen.add_name(path.name, name):
            raise UserError(
                f"Two different problems of {path.stem} have the id {quoted(name)}; give each its own, or map another "
                "column to id."
            )


def _options(request: Request, parts: list[str]) -> dict[str, Any]:
    """What task.options has to hold."""
    paths = {f"{part}_file": str(request.out / f"{part}.jsonl") for part in parts}
    if "all_file" in paths:
        paths = {"train_file": paths["all_file"], "split": "paper"}
    return {**paths, **request.found.options}


def _overlaps(request: Request, parts: list[str], check: Checker, seen: Seen) -> list[dict[str, Any]]:
    pairs = [("train", "test")] if {"train", "test"} <= {*parts} else []
    for path in request.against:
        for line in read_lines(path, {}, "a row", NAMED):
            seen.add(str(path), check(line))
        pairs += [(part, str(path)) for part in parts]
    return [{"of": first, "and": second, **seen.overlap(first, second)} for first, second in pairs] + [
        {"of": part, "and": part, "alike": count} for part in parts if (count := seen.alike(part))
    ]


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
