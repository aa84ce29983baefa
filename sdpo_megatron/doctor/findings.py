"""What a check found: a line for a person, and figures for whoever compares several machines."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from rich.table import Table
from rich.text import Text

from sdpo_megatron.errors import one_line

Status = Literal["ok", "warning", "failure"]
STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    name: str
    status: Status
    found: str
    """What is, in one line."""
    todo: str = ""
    """What to do about it; empty where nothing need be done."""
    figures: dict[str, float | str] = field(default_factory=dict)
    """What the line says, as numbers: bytes and seconds."""
    host: str = field(default_factory=socket.gethostname)


def ok(name: str, found: str, **figures: float | str) -> Finding:
    return Finding(name=name, status="ok", found=one_line(found), figures=figures)


def warning(name: str, found: str, todo: str, **figures: float | str) -> Finding:
    """Something works, but not as well as it could, or is missing that some runs need."""
    return Finding(name=name, status="warning", found=one_line(found), todo=one_line(todo), figures=figures)


def failure(name: str, found: str, todo: str, **figures: float | str) -> Finding:
    """No run, or not the run that was asked about, works with this."""
    return Finding(name=name, status="failure", found=one_line(found), todo=one_line(todo), figures=figures)


def to_json(findings: Sequence[Finding]) -> str:
    return msgspec.json.encode(list(findings)).decode()


def from_json(text: str | bytes) -> list[Finding]:
    """Returns what `to_json` wrote. Raises msgspec.DecodeError for anything else."""
    return msgspec.json.decode(text, type=list[Finding])


def table(findings: Sequence[Finding]) -> Table:
    """Returns a row for each finding, with what to do below it; the host has a column where there are several."""
    several = len({finding.host for finding in findings}) > 1
    shown = Table(box=None, pad_edge=False)
    for column in (*(["host"] if several else []), "", "check"):
        shown.add_column(column)
    shown.add_column("found", overflow="fold", ratio=1)
    for finding in findings:
        style = STYLES[finding.status]
        # text, and not rich's markup: brackets are the machine's own
        found = Text(finding.found)
        if finding.todo:
            found.append(f"\nwhat to do: {finding.todo}", style=style)
        cells = [Text(finding.status, style=style), Text(finding.name), found]
        shown.add_row(*([Text(finding.host)] if several else []), *cells)
    return shown
