"""An all-reduce over real ranks, and ranks that fail or hang."""

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sdpo_megatron.doctor import ring as module
from sdpo_megatron.doctor.findings import Finding
from sdpo_megatron.doctor.ring import gloo_ring, nccl_ring, ring, ring_between
from sdpo_megatron.launch.server import free_port

Started = Callable[[], list[psutil.Process]]

GOOD = json.dumps({"small_s": 0.0002, "large_s": 0.016, "large_bytes": 16 << 20})


def test_two_real_ranks(started_here: Started):
    (finding,) = gloo_ring(60)
    assert finding.status == "ok" and finding.found.startswith("2 ranks on this machine: ")
    assert 0 < float(finding.figures["small_s"]) < 1 and finding.figures["large_bytes"] == 16 << 20
    # nothing listens once nobody is there
    assert not started_here()


def test_what_ranks_say(python):
    finding = ring("gloo", ["cpu"] * 2, 10, "todo", python(f"echo noise; echo '{GOOD}'"))
    assert finding.found == "2 ranks on this machine: 0.2 ms for one number, 1000 MiB/s for 16 MiB"
    slow = GOOD.replace("0.0002", "0.5")
    finding = ring("gloo", ["cpu"] * 2, 10, "todo", python(f"echo '{slow}'"))
    assert finding.status == "warning" and "top" in finding.todo


def test_one_that_fails_is_named_and_the_other_not_waited_for(python, started_here: Started):
    script = "[ $5 = 1 ] || exec sleep 600; echo first >&2; echo 'RuntimeError: no route' >&2; exit 1"
    start = time.monotonic()
    finding = ring("gloo", ["cpu"] * 2, 60, "todo", python(script))
    assert (finding.name, finding.status, finding.todo) == ("gloo ring", "failure", "todo")
    assert finding.found == "rank 0 of 2 is not done in time; rank 1 of 2 ends: RuntimeError: no route"
    assert time.monotonic() - start < 30 and not started_here()


def test_a_sum_that_is_wrong_is_told(python, tmp_path: Path):
    patch = "import torch.distributed as dist\ndist.all_reduce = lambda numbers: None\n"
    (tmp_path / "sitecustomize.py").write_text(patch)
    finding = ring(
        "gloo",
        ["cpu"] * 2,
        60,
        "todo",
        python(f'PYTHONPATH={tmp_path} exec {shlex.quote(sys.executable)} "$@"'),
    )
    assert finding.status == "failure"
    assert "rank 0 of 2 ends: rank 0: the sum of 1 to 2 came to 1" in finding.found
    assert "rank 1 of 2 ends: rank 1: the sum of 1 to 2 came to 2" in finding.found


def test_ranks_that_hang(python, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LAST_WORDS_S", 0.1)
    finding = ring("nccl", ["cuda:0"], 0.3, "todo", python("sleep 600"))
    assert finding.status == "failure" and finding.found == "rank 0 of 1 is not done in time"


def test_a_rank_gets_its_device_and_the_size(python, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "count_gpus", lambda: 0)
    assert nccl_ring(1) == []
    monkeypatch.setattr(module, "count_gpus", lambda: 8)
    asked = []
    monkeypatch.setattr(module, "ring", lambda *arguments: asked.append(arguments))
    nccl_ring(30)
    assert asked[0][:3] == ("nccl", ["cuda:0", "cuda:1"], 30)
    script = 'shift; echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $1 $2 ${3%%:*} $5 $6" >&2; exit 1'
    monkeypatch.undo()
    finding = ring("nccl", ["cuda:0"], 9, "todo", python(script))
    assert finding.found == "rank 0 of 1 ends: lo lo nccl cuda:0 file 1 9"


def test_ranks_of_two_nodes_measure_once(started_here: Started):
    port, found = free_port("127.0.0.1"), dict[int, list[Finding]]()

    def node(number: int) -> None:
        found[number] = ring_between("gloo", "cpu", ["127.0.0.1", "n2"], number, port, 60)

    nodes = [threading.Thread(target=node, args=(number,)) for number in (0, 1)]
    for thread in nodes:
        thread.start()
    for thread in nodes:
        thread.join()
    (finding,) = found[0]
    assert (finding.name, finding.status, found[1]) == ("gloo ring between nodes", "ok", [])
    assert finding.found.startswith("2 nodes: ") and float(finding.figures["large_s"]) > 0
    assert not started_here()


def test_a_ring_between_nodes_that_hangs_or_fails(python, started_here: Started):
    start = time.monotonic()
    (finding,) = ring_between("nccl", "cuda:0", ["n1", "n2"], 1, 15001, 0.5, python("exec sleep 600"))
    assert (finding.name, finding.status) == ("nccl ring between nodes", "failure")
    assert finding.found == "rank 1 of 2 is not done in time" and "export NCCL_SOCKET_IFNAME" in finding.todo
    assert time.monotonic() - start < 20 and not started_here()
    script = 'shift; echo "$GLOO_SOCKET_IFNAME $1 $2 $3 $4 $5 $6" >&2; exit 1'
    (finding,) = ring_between("gloo", "cpu", ["n1", "n2"], 1, 15001, 35, python(script))
    assert finding.found == "rank 1 of 2 ends:  gloo cpu tcp://n1:15001 1 2 25.0".replace("  ", " ")


def test_a_node_that_nobody_meets_says_so_itself(started_here: Started):
    (finding,) = ring_between("gloo", "cpu", ["127.0.0.1", "n2"], 0, free_port("127.0.0.1"), 13)
    assert finding.status == "failure" and "rank 0 of 2 ends: " in finding.found
    assert "imed out" in finding.found and not started_here()
