"""What a preflight found in order, remembered by content in the user's cache: it need not look again."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs

from sdpo_megatron.config import SuiteSettings
from sdpo_megatron.models.hub import BESIDE_WEIGHTS
from sdpo_megatron.records import Problem

KEPT = 500
"""Findings that the cache keeps."""
CODE = ("chat.py", "models/resolved.py", "preflight/conversations.py", "preflight/findings.py")
"""The files of this package that look."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Problems of one task."""

    key: str
    """The section of settings that names the task."""
    problems: Sequence[Problem]
    exact: Sequence[Problem] = ()
    """Those whose canonical answer is measured, so that it has to fit behind its prompt."""
    suite: SuiteSettings | None = None
    """The suite that they are evaluated in, whose system prompt is its own."""


def digest_of(directory: Path, settings: list[Any], asked: Sequence[Asked]) -> str:
    """Returns the SHA-256 of all that a finding follows from: the model's files beside its weights, settings, problems,
    and the code that looks."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        # JSON has no line break of its own
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")

    package = Path(__file__).parents[1]
    beside = {path for pattern in (*BESIDE_WEIGHTS, "*/*.jinja") for path in directory.glob(pattern)}
    for path in [*(package / name for name in CODE), *sorted(beside)]:
        if path.is_file():
            with path.open("rb") as file:
                add([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    add([version(name) for name in LIBRARIES])
    add(settings)
    for a in asked:
        add([a.key, len(a.problems), len(a.exact)])
        for problem in (*a.problems, *a.exact):
            add([problem.id, problem.messages, problem.tools, problem.answer])
    return digest.hexdigest()


def is_known(digest: str) -> bool:
    return (_cache() / digest).is_file()


def remember(digest: str) -> None:
    # without it the next start looks once more
    with suppress(OSError):
        cache = _cache()
        cache.mkdir(parents=True, exist_ok=True)
        (cache / digest).touch()
        oldest_first = sorted(cache.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[:-KEPT]:
            path.unlink(missing_ok=True)


def _cache() -> Path:
    return platformdirs.user_cache_path("sdpo_megatron") / "checked"
