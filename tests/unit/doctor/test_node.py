"""One node of several: what it is told, what it looks at with the others, and what is left where it is ended."""

from pathlib import Path

import pytest

from sdpo_megatron.config import RolloutSettings, ServerSettings
from sdpo_megatron.doctor import node as module
from sdpo_megatron.doctor.checks import Subject
from sdpo_megatron.doctor.examine import Check
from sdpo_megatron.doctor.findings import Finding, failure, from_json, ok
from sdpo_megatron.doctor.node import answer_of_node, begun, main, read_subject, write_subject


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nodes").mkdir()
    write_subject(tmp_path, subject())
    for name, value in {"SLURMD_NODENAME": "n2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        module, "checks_of", lambda subject: [Check(name="x", look=lambda: [ok("x", "there")])]
    )
    return tmp_path


def subject(device: str = "cuda") -> Subject:
    server = ServerSettings(python="/p", args=["--x"])
    return Subject(
        server=server,
        rollout=RolloutSettings(),
        run_directory=Path("/r"),
        device=device,  # pyright: ignore[reportArgumentType]
    )


def test_the_subject_comes_to_the_nodes_as_it_was(directory: Path):
    assert read_subject(directory) == subject()


def test_a_node_answers_under_the_name_that_the_job_gives_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[module.Place] = []

    def together(place: module.Place, subject: Subject) -> list[Finding]:
        asked.append(place)
        assert from_json(begun(directory, "n2").read_bytes()) == []
        return [ok("link", "there")]

    monkeypatch.setattr(module, "between_nodes", together)
    assert main([str(directory), "n1", "n2"]) == 0
    assert (asked[0].own, asked[0].others) == ("n2", ["n1"]) and 15000 <= asked[0].port < 31000
    found = from_json(answer_of_node(directory, "n2").read_bytes())
    assert [(finding.host, finding.name) for finding in found] == [("n2", "link"), ("n2", "x")]
    # what is left of a node that Slurm ends now
    assert [finding.name for finding in from_json(begun(directory, "n2").read_bytes())] == ["link"]


def test_one_node_alone_has_nothing_between(directory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main([str(directory), "n1"]) == 0
    assert [finding.name for finding in from_json(answer_of_node(directory, "n1").read_bytes())] == ["x"]


def test_without_scontrol_on_the_nodes(directory: Path):
    assert main([str(directory), "n1"]) == 0
    found = from_json(answer_of_node(directory, "n2").read_bytes())
    assert [(finding.name, finding.status) for finding in found] == [("nodes", "failure"), ("x", "ok")]
    assert "hardware.setup" in found[0].todo


@pytest.mark.parametrize(
    ("reached", "device", "rings"),
    [
        (True, "cpu", [("gloo", "cpu", 101)]),
        (True, "cuda", [("gloo", "cpu", 101), ("nccl", "cuda:0", 102)]),
        (False, "cuda", []),
    ],
)
def test_rings_are_tried_where_nodes_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reached: bool, device: str, rings: list
):
    found = ok(module.LINK, "x") if reached else failure(module.LINK, "x", "y")
    for name in ("shared_files", "own_name"):
        monkeypatch.setattr(module, name, lambda place: [])
    monkeypatch.setattr(module, "link", lambda place: [found])
    monkeypatch.setattr(
        module,
        "ring_between",
        lambda backend, device, hosts, number, port, limit_s: [
            ok("ring", f"{backend} {device} {port} {limit_s}")
        ],
    )
    place = module.Place(number=0, hosts=("n1", "n2"), port=100, directory=tmp_path)
    findings = module.between_nodes(place, subject(device))
    assert [finding.found for finding in findings[1:]] == [f"{b} {d} {p} 35.0" for b, d, p in rings]
