"""`python -m sdpo_megatron.evaluate`: the figures that training has, of a directory, a checkpoint, an export, a server;
and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.evaluate import main
from sdpo_megatron.models.weight_files import weights_sha256
from sdpo_megatron.run_dir.evaluations_file import Evaluation, read_evaluations
from sdpo_megatron.run_dir.records_file import read_record
from tests.e2e.running import REPOSITORY, Running, run, tiny_settings

# the likeliest token each time: what is sampled otherwise is other responses each time
GREEDY: dict[str, Any] = {
    "every": 1,
    "problems": 3,
    "temperature": 0.0,
    "suites": {"harder": {"task": {"env": "equations", "options": {"digits": 3}}, "samples": 2}},
}


def evaluate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "sdpo_megatron.evaluate", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def evaluations(path: Path) -> dict[str, Evaluation]:
    """The last evaluation of each suite."""
    return {one.suite: one for one in read_evaluations(path / "evaluations.jsonl")}


def assert_same(alone: Path, running: Running, step: int) -> None:
    """The numbers, what they were measured with, and every word."""
    in_training = {
        one.suite: one
        for one in read_evaluations(running.directory / "evaluations.jsonl")
        if one.step == step
    }
    own = evaluations(alone)
    assert set(own) == set(in_training) == {"test", "harder"}
    for suite, one in own.items():
        assert one.ruler == in_training[suite].ruler
        assert one.metrics == pytest.approx(dict(in_training[suite].metrics), rel=1e-3)
        assert one.problems == in_training[suite].problems
    for split in ("eval", "eval_harder"):
        mine = read_record(alone / "rollouts" / split / "000000.jsonl")
        assert [r.response for r in mine] == [r.response for r in running.responses(step, split)] and mine


@pytest.fixture(scope="module")
def trained(tiny_model, stand_in, tmp_path_factory) -> Running:
    directory = tmp_path_factory.mktemp("trained")
    settings = tiny_settings(
        tiny_model("llama"),
        stand_in,
        directory,
        run={"steps": 1},
        eval=GREEDY,
        parallel={"pp": 2},
        checkpoint={"export_hf": True},
    )
    return run(settings, directory)


@pytest.fixture(scope="module")
def yaml_file(trained: Running) -> str:
    return str(trained.directory.parents[1] / "tiny.yaml")


def test_the_figures_before_training_are_those_of_the_directory(trained, yaml_file, tmp_path):
    done = evaluate(yaml_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [out] = (tmp_path / "evaluations").iterdir()
    assert out.name == "model"
    assert_same(out, trained, 0)
    assert "test (3 problems): avg@1" in done.stdout and "harder (3 problems): avg@2" in done.stdout


def test_those_after_it_are_those_of_the_checkpoint_and_of_the_export(trained, yaml_file, tmp_path):
    done = evaluate(yaml_file, "--checkpoint", str(trained.directory), "--out", "checkpoint", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "checkpoint", trained, 1)
    assert not (tmp_path / "checkpoint" / ".weights").exists()
    export = trained.directory / "hf"
    done = evaluate(yaml_file, f"model.path={export}", "--out", "export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "export", trained, 1)
    subjects = [evaluations(tmp_path / name)["test"].subject for name in ("checkpoint", "export")]
    assert [subject["weights"] for subject in subjects] == [weights_sha256(export)] * 2
    assert [subject["name"] for subject in subjects] == ["tiny after 1 steps", "hf"]


def test_a_server_that_runs_is_asked_as_it_is_and_a_second_evaluation_stands_beside(
    trained, yaml_file, a_server, tiny_model, tmp_path
):
    url = a_server(tiny_model("llama"), "float32")
    arguments = [yaml_file, f"server.urls=[{url}]", "--out", "served"]
    for _ in range(2):
        done = evaluate(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "served", trained, 0)
    found = read_evaluations(tmp_path / "served" / "evaluations.jsonl")
    assert [one.subject["number"] for one in found] == ["0", "0", "1", "1"]
    assert (tmp_path / "served" / "rollouts" / "eval" / "000001.jsonl").is_file()
    assert found[0].subject["served"].startswith(str(tiny_model("llama")))


def test_what_cannot_be_evaluated_is_refused_in_a_line(
    trained, yaml_file, a_server, tiny_model, tmp_path, capsys, monkeypatch
):
    other, run_path = tiny_model("qwen3"), str(trained.directory)
    (tmp_path / "file").touch()
    url = a_server(other, "float32")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for arguments, message in [
        (["--checkpoint", run_path, f"model.path={other}"], "was trained from model.path="),
        (["--checkpoint", str(tmp_path)], "holds no complete checkpoint: name a run directory"),
        (["--checkpoint", run_path, f"server.urls=[{url}]"], "are two things to evaluate: leave one out"),
        ([f"server.urls=[{url}]"], "but that of model.path is"),
        (["server.urls=['http://127.0.0.1:9']"], "no server answers at http://127.0.0.1:9"),
        (["--out", run_path], "is the directory of a run"),
        (["--out", str(tmp_path / "file")], "is a file; name a directory"),
        (["eval.suites.harder.task.options.digitz=3"], "eval.suites.harder.task.options.digitz"),
        (["eval.suites.harder.sample=3"], "Did you mean 'eval.suites.harder.samples'?"),
        (["--outt", "x"], "unknown option --outt"),
    ]:
        assert main([yaml_file, *arguments]) == 2
        shown = capsys.readouterr().err
        assert message in shown and len(shown.splitlines()) == 1, (arguments, shown)
