"""What Slurm says of the cluster before anything is submitted to it, by a stand-in for sinfo."""

import os
from pathlib import Path

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.submission.site import check_site


def test_a_partition_that_the_site_hides_may_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line = "%s|up|infinite|1-infinite|UNLIMITED|4|idle|16|16000|(null)|(null)"
    (tmp_path / "sinfo").write_text(
        f"#!/bin/sh\necho '{line % 'main*'}'\n"
        f"for option; do [ \"$option\" = --all ] && echo '{line % 'own'}'; done; exit 0\n"
    )
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said: list[str] = []
    check_site(HardwareSettings(partition="own"), said.append)
    assert said == []
