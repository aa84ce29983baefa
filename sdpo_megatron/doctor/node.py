"""One node of several that are examined together: python -m sdpo_megatron.doctor.node DIRECTORY HOST ...

Slurm starts it on each HOST. DIRECTORY, which all of them see, has subject.json; the answer goes to
nodes/HOST.json in it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from sdpo_megatron.cluster.layout import first_port_of
from sdpo_megatron.doctor.between import CONNECT_S, LINK, MEET_S, Place, link, own_name, shared_files
from sdpo_megatron.doctor.checks import FILES_HANG, GPU_HANGS, OWN_MARGIN_S, RING_S, Subject, checks_of
from sdpo_megatron.doctor.examine import Check, examine
from sdpo_megatron.doctor.findings import Finding, failure, to_json
from sdpo_megatron.doctor.ring import ring_between
from sdpo_megatron.files import write_atomically

TOGETHER_S = 120.0
"""Seconds that what needs several nodes may take."""
MARGIN_S = 10.0
SUBJECT = TypeAdapter(Subject)


def write_subject(directory: Path, subject: Subject) -> None:
    write_atomically(directory / "subject.json", SUBJECT.dump_json(subject).decode())


def read_subject(directory: Path) -> Subject:
    return SUBJECT.validate_json((directory / "subject.json").read_bytes())


def begun(directory: Path, host: str) -> Path:
    """Returns the file that says that a node has begun, and what it has found with the others so far."""
    return directory / "nodes" / f"{host}.begun"


def answer_of_node(directory: Path, host: str) -> Path:
    """Returns the file of what a node has found."""
    return directory / "nodes" / f"{host}.json"


def main(argv: Sequence[str]) -> int:
    directory, hosts = Path(argv[0]), tuple(argv[1:])
    own, count = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_NTASKS"])
    write_atomically(begun(directory, own), to_json([]))
    subject = read_subject(directory)
    findings: list[Finding] = []
    if len(hosts) != count or own not in hosts:
        todo = "have Slurm's programs on PATH on the nodes, such as by a line of hardware.setup"
        findings = [failure("nodes", "scontrol did not name them, and nothing between them was tried", todo)]
    elif count > 1:
        port = first_port_of(int(os.environ["SLURM_JOB_ID"]), 0)
        place = Place(number=hosts.index(own), hosts=hosts, port=port, directory=directory / "nodes")
        findings = between_nodes(place, subject)
    findings = [replace(finding, host=own) for finding in findings]
    # where another node is lost Slurm ends this one too
    write_atomically(begun(directory, own), to_json(findings))
    findings += [replace(finding, host=own) for finding in examine(checks_of(subject))]
    write_atomically(answer_of_node(directory, own), to_json(findings))
    return 0


def between_nodes(place: Place, subject: Subject) -> list[Finding]:
    """Returns what is found with the other nodes; rings are tried only where nodes reach each other."""
    reached = "see why the node waits (dmesg)"
    findings = examine(
        [
            Check(
                name="shared files",
                look=lambda: shared_files(place),
                limit_s=MEET_S + MARGIN_S,
                if_it_hangs=FILES_HANG,
            ),
            Check(name="name among nodes", look=lambda: own_name(place), if_it_hangs="see the DNS"),
            Check(name=LINK, look=lambda: link(place), limit_s=CONNECT_S + MARGIN_S, if_it_hangs=reached),
        ],
        TOGETHER_S,
    )
    if any(finding.name == LINK and finding.status == "failure" for finding in findings):
        return findings
    own_s = RING_S - OWN_MARGIN_S
    rings = [("gloo", "cpu", 1, reached)]
    if subject.device == "cuda":
        rings.append(("nccl", "cuda:0", 2, GPU_HANGS))
    return findings + examine(
        [
            Check(
                name=f"{backend} ring between nodes",
                look=lambda backend=backend, device=device, port=place.port + after: ring_between(
                    backend, device, place.hosts, place.number, port, own_s
                ),
                limit_s=RING_S,
                if_it_hangs=todo,
            )
            for backend, device, after, todo in rings
        ],
        TOGETHER_S,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
