"""Whatever is damaged, `--check` ends with 0 or 2, in one line and in time: never in a traceback or a hang."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpo_megatron.preflight import findings
from sdpo_megatron.preflight.same_problems import problem_digests
from sdpo_megatron.run_dir.checkpoint_files import checkpoint_path, seal, write_manifest
from sdpo_megatron.train import main
from tests.fuzz.damage import damage_file, overrides
from tests.unit.launch.launching import ROOT, Project, make_project

SEED = 0
LONGEST_S = 5.0
"""What an answer may take, of processor time: other work is on the machine that tests run on."""
HANGS_S = 60.0


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    cache = tmp_path / "checked"
    monkeypatch.setattr(findings, "_cache", lambda: cache)
    (tmp_path / "p").mkdir()
    project = make_project(tmp_path / "p")
    values = json.loads(project.yaml.read_text())
    values["task"]["options"] = {"train_size": 50, "test_size": 5}
    project.yaml.write_text(json.dumps(values))
    # where tracebacks go
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    # transformers is imported once, before anything is timed
    assert main([str(project.yaml), "--check"]) == 0
    return project


def one_answer(project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit code and what was said, which is a line."""
    capsys.readouterr()
    began, began_s = time.monotonic(), time.process_time()
    code = main([str(project.yaml), "--check", *arguments])
    took = time.process_time() - began_s
    assert time.monotonic() - began < HANGS_S
    said = capsys.readouterr()
    assert code in (0, 2), (code, said)
    assert took < LONGEST_S or "Reading" in said.out, (took, said)
    if code == 2:
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said
    assert "Traceback" not in said.err.replace("Its traceback is in", "")
    return code, said.err


def cases(pytestconfig: pytest.Config, usual: int) -> int:
    return usual * int(pytestconfig.getoption("--fuzz-times") or 1)


def unforeseen(said: list[str]) -> float:
    """The share of lines that the boundary made of what nobody foresaw."""
    return sum("Its traceback is in" in line for line in said) / max(1, len(said))


def test_damaged_settings(project: Project, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config):
    said: list[str] = []
    for k in range(cases(pytestconfig, 2000)):
        arguments = overrides(random.Random(f"settings {SEED} {k}"))
        with naming(f"settings {k}: {arguments}"):
            said.append(one_answer(project, capsys, arguments)[1])
    assert unforeseen(said) < 0.02


def damaged(
    project: Project,
    capsys: pytest.CaptureFixture[str],
    directory: Path,
    count: int,
    name: str,
    arguments: list[str],
) -> list[str]:
    """Damages one or two files of a copy of `directory`, again and again; returns what was said of each."""
    whole = directory.with_name(f"{directory.name}.whole")
    shutil.copytree(directory, whole)
    said: list[str] = []
    for k in range(count):
        shutil.rmtree(directory)
        shutil.copytree(whole, directory)
        rng = random.Random(f"{name} {SEED} {k}")
        done: list[str] = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            files = sorted(path for path in directory.rglob("*") if path.is_file())
            done.append(damage_file(rng, rng.choice(files)))
        with naming(f"{name} {k}: {done}"):
            said.append(one_answer(project, capsys, arguments)[1])
    return said


def test_damaged_model_directories(
    project: Project, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
):
    model = project.path / "model"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    damaged(project, capsys, model, cases(pytestconfig, 500), "model", [])


def test_damaged_run_directories(
    project: Project, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
):
    make_run(project)
    assert one_answer(project, capsys, [])[0] == 0
    said = damaged(project, capsys, project.run, cases(pytestconfig, 300), "run", [])
    assert any("metrics" in line for line in said) and any("config.json" in line for line in said)


def test_by_the_real_command_line(project: Project, pytestconfig: pytest.Config):
    for k in range(cases(pytestconfig, 60)):
        rng = random.Random(f"command {SEED} {k}")
        given = [argument.replace("\0", "") for argument in overrides(rng)]
        arguments = [argument for argument in given if argument.isprintable() and argument]
        done = subprocess.run(
            [sys.executable, "-m", "sdpo_megatron.train", str(project.yaml), "--check", *arguments],
            capture_output=True,
            text=True,
            cwd=project.path,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(project.path / "cache")}
            | {"TMPDIR": str(project.path)},
            timeout=120,
        )
        assert done.returncode in (0, 2) and done.stderr.count("\n") <= 1, (arguments, done)


def make_run(project: Project) -> None:
    """A run directory with two steps and a checkpoint behind it, as the same settings left it."""
    from sdpo_megatron.preflight.checked import claim_run_directory, preflight
    from sdpo_megatron.run_dir.identity import identity

    checked = preflight([str(project.yaml)], world_size=1)
    directory = claim_run_directory(checked)
    directory.close()
    directory.metrics.write_text("".join(json.dumps({"step": k, "loss": 1.0}) + "\n" for k in range(3)))
    checkpoint = checkpoint_path(directory.checkpoints, 2)
    checkpoint.mkdir()
    (checkpoint / "file").write_bytes(b"x" * 100)
    content = {"step": 2, "identity": identity(checked.config.model_dump()) | problem_digests(checked.env)}
    write_manifest(checkpoint, content, seal(checkpoint, ["file"]))


@contextlib.contextmanager
def naming(case: str) -> Iterator[None]:
    """Says which case failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise
