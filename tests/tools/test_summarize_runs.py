"""tools/summarize_runs.py: runs side by side from their files alone, and only what was measured alike."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.run_dir.evaluations_file import Evaluation, EvaluationsFile

ROOT = Path(__file__).parents[2]
RULER = {"sampling": "8 responses", "server": "SGLang 1"}


def a_run(
    path: Path, values: dict[int, float], loss: str = "divergence", ruler: Any = RULER, step_s: float = 1800.0
) -> Path:
    """Evaluated by step; each step takes half an hour and samples 1,000 tokens."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"values": {"loss": {"name": loss}}}))
    rows = [
        {
            "step": step,
            "time/learn": step_s,
            "time/eval": 999.0,
            "time/total": 9e9,
            "perf/response_tokens": 1000.0,
        }
        for step in range(max(values) + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    file = EvaluationsFile(path / "evaluations.jsonl")
    for step, value in values.items():
        file.append(evaluation(step, value, ruler))
    return path


def evaluation(step: int | None, value: float, ruler: Any = RULER) -> Evaluation:
    metrics = {"avg@8": value, "avg@8/low": value - 0.1, "avg@8/high": value + 0.1, "pass@8": 1.0}
    return Evaluation(suite="test", step=step, subject={"name": "x"}, ruler=ruler, metrics=metrics)


def summarize(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/summarize_runs.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_by_step_hour_token_and_the_best_within_a_budget(tmp_path: Path):
    one = a_run(tmp_path / "one", {0: 0.1, 2: 0.5, 4: 0.3, 12: 0.8})
    two = a_run(tmp_path / "two", {0: 0.1, 4: 0.2}, loss="grpo")
    done = summarize(one, two, "--plot", tmp_path / "curves.svg")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\n\n")
    assert "| test avg@8, by step | 0 | 2 | 4 | 12 |" in shown[0]
    assert "| one (SDPO, divergence) | 0.100 | 0.500 | 0.300 | 0.800 |" in shown[0]
    assert "| two (GRPO) | 0.100 |  | 0.200 |  |" in shown[0]
    # half an hour a step: one reached its sixth hour, two its second; between evaluations the value is on the line
    assert "| test avg@8, by hour of training | 1 | 2 | 3 | 4 | 5 | 6 |" in shown[1]
    assert "| one (SDPO, divergence) | 0.500 | 0.300 | 0.425 | 0.550 | 0.675 | 0.800 |" in shown[1]
    assert "| two (GRPO) | 0.150 | 0.200 |  |  |  |  |" in shown[1]
    assert "| test avg@8, by generated token | 2,000 | 4,000 | 6,000 | 8,000 | 10,000 | 12,000 |" in shown[2]
    assert "| one (SDPO, divergence) | 0.500 (step 2) | 0.500 (step 2) |" in shown[3]
    assert "| two (GRPO) | 0.100 (step 0) | 0.200 (step 4; 2 h so far) |" in shown[3]
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_what_was_measured_otherwise_is_refused_by_name_or_marked(tmp_path: Path):
    one = a_run(tmp_path / "one", {0: 0.1})
    two = a_run(tmp_path / "two", {0: 0.1}, ruler=RULER | {"sampling": "1 response"})
    refused = summarize(one, two)
    assert refused.returncode == 2 and "sampling: 8 responses and 1 response" in refused.stderr
    marked = summarize(one, two, "--anyway")
    assert marked.returncode == 0 and "| two (SDPO, divergence) \\* | 0.100 |" in marked.stdout
    assert "\\* two (SDPO, divergence): measured otherwise than one" in marked.stdout


def test_evaluations_alone_have_a_table_of_their_own(tmp_path: Path):
    alone = tmp_path / "alone"
    alone.mkdir()
    file = EvaluationsFile(alone / "evaluations.jsonl")
    file.append(evaluation(None, 0.2))
    file.append(evaluation(None, 0.4))
    done = summarize(a_run(tmp_path / "one", {0: 0.1}), alone)
    assert "| evaluated alone | avg@8 | pass@8 |" in done.stdout, done.stderr
    assert "| alone | 0.400 [0.300, 0.500] | 1.000 |" in done.stdout


@pytest.mark.parametrize(
    "change,arguments,message",
    [
        ("", ["--suite", "math"], "no evaluation of the suite 'math'; it has: test"),
        ("", ["--measure", "maj"], "no run has a metric that begins with 'maj'"),
        ("metrics.jsonl evaluations.jsonl", [], "is no directory of a run that has begun"),
        ("evaluations.jsonl", [], "no evaluation of the suite 'test'; it has: none"),
    ],
)
def test_bad_input_in_a_line(tmp_path: Path, change: str, arguments: list[str], message: str):
    run = a_run(tmp_path / "one", {0: 0.1})
    for name in change.split():
        (run / name).unlink()
    done = summarize(run, *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
