"""What a job reads is what was there when it was submitted."""

import json
import os
from pathlib import Path

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.job import inputs
from sdpo_megatron.job.inputs import (
    check_inputs,
    describe_inputs,
    input_files,
    read_inputs,
    write_inputs,
)
from sdpo_megatron.preflight.checked import preflight
from tests.unit.launch.launching import make_project

HASH_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("abc")
    return path


def test_what_is_described_and_kept(file: Path, tmp_path: Path):
    said: list[str] = []
    found = describe_inputs([file], {}, said.append)
    assert [(one.path, one.bytes, one.sha256) for one in found] == [(str(file), 3, HASH_OF_ABC)]
    assert said == ["Hashing 1 file of model and problems (0 MB)"]
    write_inputs(tmp_path / "inputs.json", found)
    assert read_inputs(tmp_path / "inputs.json") == {str(file): found[0]}
    check_inputs(read_inputs(tmp_path / "inputs.json"))
    assert read_inputs(tmp_path / "none.json") == {}


def test_what_was_hashed_before_is_not_read_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    other.write_text("x")
    known = {one.path: one for one in describe_inputs([file, other], {}, lambda line: None)}
    other.write_text("other")
    read: list[Path] = []
    monkeypatch.setattr(inputs, "sha256_of", lambda path: read.append(path) or "new")
    assert [one.sha256 for one in describe_inputs([file, other], known, lambda line: None)] == [
        HASH_OF_ABC,
        "new",
    ]
    assert read == [other]


def test_a_file_that_was_touched_is_read_and_one_that_changed_is_named(file: Path):
    (found,) = describe_inputs([file], {}, lambda line: None)
    os.utime(file, (1, 1))
    check_inputs({found.path: found})
    file.write_text("abd")
    with pytest.raises(UserError) as caught:
        check_inputs({found.path: found})
    assert str(caught.value) == (
        f"{file} has changed since the run was submitted: submit the run again, or put the earlier file back."
    )
    file.unlink()
    with pytest.raises(
        UserError, match=r"cannot be read \(No such file or directory\): submit the run again"
    ):
        check_inputs({found.path: found})


@pytest.mark.parametrize("text", ["{", "[1]", '[{"path": "x"}]'])
def test_a_damaged_list(tmp_path: Path, text: str):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json is damaged; remove it, and submit the run again"):
        read_inputs(tmp_path / "inputs.json")


def test_the_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "p").mkdir()
    project = make_project(tmp_path / "p")
    lines = "".join(json.dumps({"prompt": f"{n}?", "answer": "1"}) + "\n" for n in range(50))
    for name in ("train.jsonl", "suite.jsonl"):
        (tmp_path / name).write_text(lines)
    values = json.loads(project.yaml.read_text())
    values["task"] = {
        "env": "jsonl",
        "options": {"train_file": str(tmp_path / "train.jsonl"), "grader": "exact"},
    }
    suite = {"env": "jsonl", "options": {"test_file": str(tmp_path / "suite.jsonl"), "grader": "exact"}}
    values["eval"] = {"suites": {"other": {"task": suite}}}
    project.yaml.write_text(json.dumps(values))
    checked = preflight([str(project.yaml)], world_size=1, rank=0, gpus=0)
    found = input_files(checked)
    names = [path.name for path in found]
    assert {"config.json", "tokenizer.json", "model.safetensors", "train.jsonl", "suite.jsonl"} <= set(names)
    assert len(set(found)) == len(found) and all(path.is_absolute() for path in found)
