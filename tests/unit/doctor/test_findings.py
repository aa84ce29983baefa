"""Findings as a table and as JSON."""

import io
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from sdpo_megatron.doctor.findings import Finding, failure, from_json, ok, table, to_json, warning

FINDINGS = [
    ok("clock", "noon", wall_time=1.5),
    warning("caches", "[red]on[/red] NFS\x1b[2J", "move\nthem"),
    failure("run directory", "it is not there", "make it"),
]


def shown(findings: list[Finding], width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table(findings))
    return out.getvalue()


def test_json_comes_back_as_it_was():
    assert from_json(to_json(FINDINGS)) == FINDINGS
    with pytest.raises(msgspec.DecodeError):
        from_json('[{"name": "x", "status": "good", "found": ""}]')


def test_what_is_to_be_done_stands_below_what_is():
    lines = [line.rstrip() for line in shown(FINDINGS).splitlines()]
    assert [line.split() for line in lines[:2]] == [["check", "found"], ["ok", "clock", "noon"]]
    assert r"[red]on[/red] NFS\x1b[2J" in lines[2]
    assert lines[3].strip() == r"what to do: move\nthem"
    assert lines[5].strip() == "what to do: make it" and len(lines) == 6


def test_narrow_it_loses_no_word():
    words = {word for finding in FINDINGS for word in f"{finding.name} {finding.status}".split()}
    assert words <= set(shown(FINDINGS, 60).split())


def test_hosts_have_a_column_where_there_are_several():
    assert "host" not in shown(FINDINGS).split()
    several = [replace(FINDINGS[0], host="node1"), replace(FINDINGS[2], host="node2")]
    lines = shown(several).splitlines()
    assert lines[0].split()[0] == "host"
    assert lines[1].split()[:3] == ["node1", "ok", "clock"] and lines[2].split()[0] == "node2"
