"""The tools refuse what they could not finish before they begin."""

import json
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


def result(directory: Path, **changes: object) -> Path:
    """A result of the variant `a` under seed 0."""
    content = {
        "variant": "a",
        "seed": 0,
        "config": DEMO,
        "overrides": ["loss.name=grpo"],
        "machine": {"cpu": "x"},
        "curve": [{"step": 0, "minutes": 0.0, "exact_answer_prob": 0.25, "correct": 0.5}],
    }
    path = directory / "a_seed0.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_a_result_of_other_settings_is_not_taken_for_these(tmp_path: Path):
    path = result(tmp_path)
    line = refused(
        *("tools/compare.py", DEMO, "--out", str(tmp_path), "--runs", str(tmp_path / "runs")),
        *("--variant", "a", "loss.alpha=0.5"),
    )
    assert line == (
        f"error: {path} is of other settings than {DEMO} loss.alpha=0.5; give the variant another name, or remove "
        "that file and its run."
    )


def test_a_mistake_in_a_later_variant_ends_before_any_is_trained(tmp_path: Path):
    variants = ("--variant", "a", "loss.name=grpo", "--variant", "b", "loss.alpah=1")
    line = refused(
        "tools/compare.py", DEMO, "--out", str(tmp_path), "--runs", str(tmp_path / "runs"), *variants
    )
    assert (
        line.startswith("error: the variant b: Unknown key 'loss.alpah'") and not (tmp_path / "runs").exists()
    )


def test_results_that_were_measured_otherwise_are_refused(tmp_path: Path):
    path = result(tmp_path, ruler={"server": "SGLang 1"})
    (tmp_path / "b.json").write_text(path.read_text().replace("SGLang 1", "SGLang 2"))
    line = refused("tools/compare.py", DEMO, "--out", str(tmp_path))
    assert "a_seed0.json and b.json were not measured alike, in server: SGLang 1 and SGLang 2" in line


@pytest.mark.parametrize("exact", [0.25, None])
def test_tables_of_results_that_are_there(tmp_path: Path, exact: float | None):
    """Also of a task without canonical answers, and of a run without evaluations."""
    point = {"step": 0, "minutes": 0.0, "exact_answer_prob": exact, "correct": 0.5}
    path = result(tmp_path, curve=[point])
    (tmp_path / "b.json").write_text(path.read_text().replace('"variant": "a"', '"variant": "b"'))
    result(tmp_path, curve=[])
    runs = tmp_path / "runs" / "a_seed0" / "checkpoints"
    runs.mkdir(parents=True)
    done = subprocess.run(
        [
            *(
                sys.executable,
                "tools/compare.py",
                DEMO,
                "--out",
                str(tmp_path),
                "--runs",
                str(tmp_path / "runs"),
            ),
            *("--variant", "a", "loss.name=grpo"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert f"| b | {'' if exact is None else '0.250'} |" in done.stdout
    assert not runs.exists()  # an interruption had left them
