"""The sandbox's table with few programs; and a backend that is none."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench_sandbox(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "tools/bench_sandbox.py", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_every_backend_is_measured(tmp_path: Path):
    out = tmp_path / "sandbox.json"
    done = bench_sandbox("--programs", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "| sandlock | " in done.stdout and "Sandbox: bubblewrap, with /" in done.stdout
    figures = json.loads(out.read_text())
    assert list(figures) == ["bubblewrap", "sandlock", "unsafe_subprocess"]
    assert all(0 < of["plain_ms"] and 0 < of["programs_per_s"] < 1000 for of in figures.values())


def test_a_backend_that_is_none():
    done = bench_sandbox("--backends", "docker")
    assert done.returncode == 2 and "'docker'" in done.stderr and "Traceback" not in done.stderr
