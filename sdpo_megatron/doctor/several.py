"""What several nodes found, as one list: equal lines once, with the nodes that they are of."""

from collections.abc import Sequence
from dataclasses import replace

from sdpo_megatron.doctor.environments import SERVER, TRAINER
from sdpo_megatron.doctor.findings import Finding, failure

SAME = {
    TRAINER: "install the same packages on all nodes, or name an interpreter that all see",
    SERVER: "install the same packages on all nodes, or name a server.python that all see",
    "GPU": "ask for nodes of one kind (hardware.gpu_type, hardware.constraint)",
}
"""Findings whose figures must be the same on all nodes, and what to do where they are not."""


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Returns a finding for each name, status and thing to do, of all the hosts that have it: what they found in one
    line where it is the same, else in a line for each."""
    groups: dict[str, dict[tuple[str, str], list[Finding]]] = {}
    for finding in findings:
        of_name = groups.setdefault(finding.name, {})
        of_name.setdefault((finding.status, finding.todo), []).append(finding)
    return [_one(alike) for of_name in groups.values() for alike in of_name.values()]


def _one(alike: Sequence[Finding]) -> Finding:
    texts = {finding.found for finding in alike}
    found = alike[0].found
    if len(texts) > 1:
        found = "\n".join(f"{finding.host}: {finding.found}" for finding in alike)
    return replace(alike[0], found=found, host=", ".join(finding.host for finding in alike))


def differences(findings: Sequence[Finding]) -> list[Finding]:
    """Returns a failure for each figure of SAME in which nodes differ."""
    found: list[Finding] = []
    for name, todo in SAME.items():
        of_hosts = {finding.host: finding.figures for finding in findings if finding.name == name}
        for figure in sorted({figure for figures in of_hosts.values() for figure in figures}):
            values = {host: str(figures.get(figure, "none")) for host, figures in of_hosts.items()}
            if len({*values.values()}) > 1:
                said = "differs: " + ", ".join(f"{value} on {host}" for host, value in values.items())
                finding = failure(f"{name}: {figure}", said, todo)
                found.append(replace(finding, host=", ".join(of_hosts)))
    return found
