"""The tools refuse what they could not finish before they begin."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = "yaml/demo_cpu.yaml"


def refused(*arguments: str) -> str:
    """The last line."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("tool", "option"),
    [
        (["tools/bench_step.py", DEMO], "--out"),
        (["tools/bench_kernels.py", "--tokens", "8", "--vocab", "8"], "--json"),
        (["tools/aot_kernels.py"], "--json"),
    ],
)
@pytest.mark.parametrize("place", ["nowhere/x.json", "."])
def test_a_result_that_could_not_be_written(tool: list[str], option: str, place: str, tmp_path: Path):
    line = refused(*tool, option, str(tmp_path / place))
    assert line.endswith(f"{tmp_path / place} cannot be written; name a file in a directory that exists")


def test_compare(tmp_path: Path):
    assert refused("tools/compare.py", "no.yaml", "--out", str(tmp_path)).endswith("there is no file no.yaml")
    (tmp_path / "x.json").write_text("{}")
    line = refused("tools/compare.py", DEMO, "--out", str(tmp_path / "x.json"))
    assert line.endswith("x.json cannot be a directory: File exists")
    line = refused("tools/compare.py", DEMO, "--out", str(tmp_path))
    assert line == f"error: a file in {tmp_path} is not a result of this tool: KeyError('curve')"
