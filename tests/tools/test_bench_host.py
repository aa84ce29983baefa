"""The host's table at a tiny size; and sizes that cannot be measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench_host(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "tools/bench_host.py", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.distributed
def test_a_tiny_step_is_measured_on_both_ranks(tiny_model, tmp_path: Path):
    model, out = tiny_model("qwen3", tie_embeddings=True), tmp_path / "host.json"
    done = bench_host("--sizes", "16x8", "--model", str(model), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "| record |" in done.stdout and "On disk: " in done.stdout
    ranks = json.loads(out.read_text())["16x8"]
    assert len(ranks) == 2 and ranks[0]["tokens"] == ranks[1]["tokens"] > 0
    assert list(ranks[0]["parts"]) == list(ranks[1]["parts"])
    assert ranks[0]["parts"]["plan, send, micro-batches"]["bytes_per_token"] > 0
    assert ranks[0]["disk"] > 0


@pytest.mark.parametrize("sizes", ["512", "8x64", "16x1", "0x8", "16x8,axb"])
def test_sizes_that_are_none(sizes: str):
    done = bench_host("--sizes", sizes)
    assert done.returncode == 2 and "should be RESPONSESxTOKENS" in done.stderr
    assert "Traceback" not in done.stderr
