"""One rank of a job."""

import os
import sys
from types import SimpleNamespace

import pytest

from sdpo_megatron.job.rank import run_task

SLURMS = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}


@pytest.mark.parametrize(
    ("gpus", "site", "threads"), [("-", {}, "1"), ("-", {"OMP_NUM_THREADS": "4"}, "4"), ("0", {}, None)]
)
def test_ranks_on_cpus_have_one_thread_where_the_site_does_not_say(
    monkeypatch: pytest.MonkeyPatch, gpus: str, site: dict[str, str], threads: str | None
):
    given = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "SLURM_"))}
    monkeypatch.setattr(os, "environ", given | SLURMS | site)
    seen: dict[str, str] = {}

    def train(arguments: list[str]) -> int:
        seen.update(os.environ)
        return 0

    monkeypatch.setitem(sys.modules, "sdpo_megatron.train", SimpleNamespace(main=train))
    assert run_task(0, "n1", "15000", gpus, arguments=["yaml/demo_cpu.yaml"]) == 0
    assert seen.get("OMP_NUM_THREADS") == threads and seen["MASTER_ADDR"] == "n1"
