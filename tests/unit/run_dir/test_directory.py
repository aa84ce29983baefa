import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.files import follow_umask, write_atomically, write_private
from sdpo_megatron.run_dir.checkpoint_files import checkpoint_path, seal, write_manifest
from sdpo_megatron.run_dir.directory import RunDirectory, code_revision, lock_owner, open_run

VALUES = {
    "run": {"name": "x", "seed": 0, "steps": 20},
    "model": {"path": "p", "dtype": "float32"},
    "task": {"env": "equations", "options": {"digits": 2}},
    "loss": {"name": "divergence", "alpha": 1.0},
    "parallel": {"pp": 2, "logits_chunk_tokens": 256},
    "checkpoint": {"every": 5},
    "server": {"tp": 1},
}


def changed(key: str, value) -> dict:
    values = json.loads(json.dumps(VALUES))
    *path, last = key.split(".")
    section = values
    for part in path:
        section = section[part]
    section[last] = value
    return values


def with_rows(directory: RunDirectory, count: int) -> RunDirectory:
    directory.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(count)))
    return directory


def opened(path: Path, values=VALUES) -> RunDirectory:
    directory = open_run(path, values, {"run.name": "default"})
    directory.close()
    return directory


def test_a_new_run(tmp_path: Path):
    directory = opened(tmp_path / "runs" / "x")
    stored = json.loads(directory.config.read_text())
    assert stored["values"] == VALUES
    assert stored["origins"] == {"run.name": "default"}
    assert stored["packages"]["torch"]
    assert set(stored["code"]) == {"commit", "modified"}
    for path in (directory.checkpoints, directory.logs, directory.phases):
        assert path.is_dir()
    for split in ("train", "eval"):
        assert directory.rollouts(split, 12).name == "000012.jsonl"


@pytest.mark.parametrize(
    "key, value",
    [("parallel.pp", 1), ("run.steps", 30), ("parallel.logits_chunk_tokens", 8)],
)
def test_the_same_experiment_goes_on(tmp_path: Path, key: str, value):
    opened(tmp_path / "x")
    stored = json.loads(opened(tmp_path / "x", changed(key, value)).config.read_text())
    section, name = key.split(".")
    assert stored["values"][section][name] == value


@pytest.mark.parametrize(
    "key, value, before",
    [
        ("model.path", "q", "p"),
        ("model.dtype", "bfloat16", "float32"),
        ("task.env", "jsonl", "equations"),
        ("task.options.digits", 3, "2"),
        ("task.options.operators", ["-"], "(not set)"),
        ("loss.name", "grpo", "divergence"),
        ("run.seed", 1, "0"),
    ],
)
def test_another_experiment_is_refused(tmp_path: Path, key: str, value, before: str):
    with_rows(opened(tmp_path / "x"), 1)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "x", changed(key, value), {})
    assert str(caught.value) == (
        f"{tmp_path / 'x'} belongs to another experiment: it was started with {key}={before}, now "
        f"{key}={value if isinstance(value, str) else json.dumps(value)}; "
        "choose another run.name or go back to that value."
    )


def test_all_that_differs_is_said_in_one_line(tmp_path: Path):
    with_rows(opened(tmp_path / "x"), 1)
    values = changed("run.seed", 1)
    values["model"] |= {"path": "q"}
    values["loss"] = {"name": "grpo", "epsilon": 0.2}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "x", values, {})
    # a loss of another name has other keys
    assert str(caught.value) == (
        f"{tmp_path / 'x'} belongs to another experiment: it was started with loss.name=divergence, now "
        "loss.name=grpo; with model.path=p, now model.path=q; with run.seed=0, now run.seed=1; choose another run.name "
        "or go back to those values."
    )


def test_the_owner_of_a_lock(tmp_path: Path):
    directory = RunDirectory(tmp_path / "x")
    assert lock_owner(directory) is None
    held = open_run(tmp_path / "x", VALUES, {})
    assert lock_owner(directory) == str(os.getpid())
    held.close()
    assert lock_owner(directory) is None


def test_a_start_that_left_nothing_binds_the_directory_to_nothing(tmp_path: Path):
    opened(tmp_path / "x")
    stored = json.loads(opened(tmp_path / "x", changed("run.seed", 1)).config.read_text())
    assert stored["values"]["run"]["seed"] == 1
    checkpoint_path(with_rows(opened(tmp_path / "x"), 0).checkpoints, 5).mkdir()
    with pytest.raises(UserError, match="belongs to another experiment"):
        opened(tmp_path / "x", changed("run.seed", 1))


def test_rows_whose_checkpoints_were_removed_are_not_thrown_away(tmp_path: Path):
    directory = with_rows(opened(tmp_path / "x"), 5)  # rows 0 to 4: killed before step 5 was saved
    opened(tmp_path / "x")
    with_rows(directory, 6)
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "x")
    assert str(caught.value) == (
        f"{directory.metrics} has the steps up to 5, but {directory.checkpoints} has no whole checkpoint to go "
        "on from: put it back, choose another run.name, or remove the directory."
    )
    checkpoint = checkpoint_path(directory.checkpoints, 5)
    checkpoint.mkdir()  # what is left of a damaged one
    with pytest.raises(UserError, match="has no whole checkpoint"):
        opened(tmp_path / "x")
    (checkpoint / "file").touch()
    write_manifest(checkpoint, {}, seal(checkpoint, ["file"]))
    opened(tmp_path / "x")


def test_what_is_no_run_directory_is_left_alone(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="is a file, where the run directory should be; choose another run.name"
    ):
        opened(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UserError, match="exists, but is no run directory"):
        opened(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]


def test_a_damaged_config_is_named(tmp_path: Path):
    with_rows(opened(tmp_path / "x"), 1).config.write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        opened(tmp_path / "x")


def test_a_directory_that_a_crash_left_empty_is_used(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".config.json.abc").touch()
    assert opened(tmp_path / "x").config.is_file()


def test_a_start_forgets_what_an_earlier_one_said(tmp_path: Path):
    RunDirectory(tmp_path / "not made yet").forget_earlier_start()
    directory = opened(tmp_path / "x")
    kept = {path for path in directory.path.rglob("*") if path.is_dir()} | {directory.config}
    for path in (directory.phase(0), directory.stacks(0), directory.ending(1), directory.servers / "0.json"):
        path.touch()
    directory.rendezvous.touch()
    directory.forget_earlier_start()
    assert set(directory.path.rglob("*")) == kept | {directory.path / ".lock"}


def test_one_process_at_a_time(tmp_path: Path):
    """Also when the holder is killed, the next one gets in."""
    source = (
        "import sys, time; from pathlib import Path; from sdpo_megatron.run_dir.directory import open_run; "
        "open_run(Path(sys.argv[1]), {}, {}); print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid}; stop that run first"):
            opened(tmp_path / "x", {})
    finally:
        holder.kill()
        holder.communicate()
    opened(tmp_path / "x", {})


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022])
def test_files_follow_the_umask(tmp_path: Path, umask: int):
    """Whatever this process has written before, and also what a library makes for its owner alone."""
    before = os.umask(umask)
    try:
        directory = opened(tmp_path / "x")
        write_atomically(directory.metrics, "")
        os.close(os.open(tmp_path / "x" / "library", os.O_CREAT, 0o600))
        follow_umask(tmp_path / "x" / "library")
        write_private(tmp_path / "x" / "key", "k")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in [directory.path, *directory.path.iterdir()]}
    assert modes.pop(directory.path / "key") == 0o600
    assert modes.pop(directory.path / ".lock") == 0o644 & ~umask
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_private_run_lets_nobody_in(tmp_path: Path):
    assert opened(tmp_path / "x").path.stat().st_mode & 0o077
    values = changed("run.private", True)
    assert opened(tmp_path / "x", values).path.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; set run.dir"):
        opened(tmp_path / "file" / "x")


def test_code_revision(tmp_path: Path):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert code_revision(tmp_path) == {"commit": None, "modified": None}
    git("init")
    (tmp_path / "a").touch()
    assert code_revision(tmp_path) == {"commit": None, "modified": None}
    git("add", "a")
    git("commit", "-m", "a")
    assert code_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    (tmp_path / "a").write_text("b")
    assert code_revision(tmp_path)["modified"] is True


def test_a_lock_counts_while_the_launcher_holds_it(tmp_path: Path):
    """Its number alone would not do: in a container the launcher and, later, torchrun are both process 1."""
    code = (
        "import sys; from pathlib import Path; from sdpo_megatron.run_dir.directory import parent_holds\n"
        "print(parent_holds(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]

    def asked_by_a_child() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert asked_by_a_child() == "False\n"
    directory = open_run(tmp_path / "x", VALUES, {})
    assert asked_by_a_child() == "True\n"
    directory.close()
    assert (tmp_path / "x" / ".lock").read_text() == f"{os.getpid()}\n"
    assert asked_by_a_child() == "False\n"
    opened(tmp_path / "x")  # nobody who asked has kept it
