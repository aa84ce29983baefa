"""The newest examination of each partition, and the offer of one."""

import json
import os
from pathlib import Path

import pytest

from sdpo_megatron.doctor.findings import ok
from sdpo_megatron.submission.examined import cluster_name, offer, report_of, write_report
from sdpo_megatron.terminal import script


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "scontrol"
    path.write_text("#!/bin/sh\necho 'Configuration data'\necho 'ClusterName             = our/big one'\n")
    path.chmod(0o755)
    return path


def test_it_is_offered_until_there_is_a_report_of_the_partition(scontrol: Path, tmp_path: Path):
    assert offer("gpu", ["yaml/hardware/a.yaml", "hardware.nodes=4"]) == (
        "This partition has not been examined yet: "
        f"{script('slurm/doctor.py', 'yaml/hardware/a.yaml', 'hardware.nodes=4')} (two minutes)"
    )
    path = write_report("gpu", [ok("cores", "8")])
    assert path == tmp_path / "cache/sdpo_megatron/doctor/our-big_gpu.json"
    assert json.loads(path.read_text())["findings"][0]["name"] == "cores"
    assert offer("gpu", []) == "" and offer("other", []) and offer(None, [])
    write_report(None, [])
    assert offer(None, []) == "" and report_of(None).name == "our-big_default.json"


def test_a_cluster_that_does_not_say_its_name(scontrol: Path):
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    assert cluster_name() == "cluster"
    scontrol.write_text("#!/bin/sh\necho nothing\n")
    assert cluster_name() == "cluster"
