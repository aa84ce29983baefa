"""Compiled code of a job: filled once per node and attempt, kept for the next one, and never a reason to end."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.job import caches as module
from sdpo_megatron.job.caches import (
    Caches,
    cpu_name,
    gpu_name,
    packages_of,
    place_caches,
    versions_of,
)

ROOT = Path(__file__).parents[3]
NAME = "trainer_torch-2_triton-3_GPU.tar"


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Caches]:
    """Gives the caches of a task: of a node and an attempt, with one archive for all."""

    def make(number: int, attempt: str = "7 0", name: str = NAME) -> Caches:
        root = tmp_path / f"node{number}"
        root.mkdir(exist_ok=True)
        (tmp_path / "run").mkdir(exist_ok=True)
        return Caches(root, tmp_path / "run" / "caches" / name, attempt)

    return make


def test_what_one_attempt_compiled_is_there_for_the_next(
    node: Callable[..., Caches], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    node(0).fill()
    assert capsys.readouterr().out == ""
    (tmp_path / "node0/kernel").write_text("code")
    node(0).keep()
    node(1, "7 1").fill()
    assert (tmp_path / "node1/kernel").read_text() == "code"
    assert capsys.readouterr().out == f"Compiled code: 1 files of {NAME} are in {tmp_path}/node1.\n"


def test_one_task_of_a_node_unpacks_in_each_attempt(
    node: Callable[..., Caches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    node(0)
    (tmp_path / "node0/kernel").write_text("code")
    node(0).keep()
    times: list[str] = []

    def slow(archive: Path, root: Path) -> int:
        times.append(root.name)
        time.sleep(0.3)
        (root / "done").touch()
        return 1

    monkeypatch.setattr(module, "unpack", slow)
    seen: list[bool] = []

    def task(number: int, attempt: str) -> None:
        node(number, attempt).fill()
        seen.append((tmp_path / f"node{number}/done").exists())

    for attempt in ("7 0", "7 1"):
        tasks = [threading.Thread(target=task, args=(k % 2, attempt)) for k in range(6)]
        for thread in tasks:
            thread.start()
        for thread in tasks:
            thread.join()
    # each waited for the one that unpacks
    assert seen == [True] * 12 and sorted(times) == ["node0", "node0", "node1", "node1"]


def test_a_task_that_hangs_or_is_killed_while_it_unpacks_is_not_waited_for_long(
    node: Callable[..., Caches],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(module, "WAIT_S", 0.3)
    caches = node(0)
    code = f"import fcntl, time; f = open({str(tmp_path / 'node0/.filling.lock')!r}, 'ab'); "
    code += "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    caches.fill()
    assert "another task has not unpacked it within 0.3 s" in capsys.readouterr().out
    assert not (tmp_path / "node0/.filled").exists()
    holder.kill()
    holder.wait()
    caches.fill()
    assert (tmp_path / "node0/.filled").read_text() == "7 0"


def test_a_damaged_or_foreign_archive_is_ignored_in_one_line(
    node: Callable[..., Caches], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    node(0)
    folder = tmp_path / "run" / "caches"
    folder.mkdir()
    (folder / NAME).write_text("<html>")
    node(0).fill()
    out = capsys.readouterr().out
    assert out.startswith(f"Compiled code: {folder / NAME} is damaged (") and out.count("\n") == 1
    node(1, name="trainer_torch-3_GPU.tar").fill()
    assert f"of other versions or devices ({NAME}): compiled anew" in capsys.readouterr().out
    # a damaged one is replaced as soon as there is something
    (tmp_path / "node0/kernel").write_text("code")
    node(0).keep()
    node(2).fill()
    assert (tmp_path / "node2/kernel").read_text() == "code"


def test_it_is_kept_once_nothing_is_added_any_more(
    node: Callable[..., Caches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written: list[set[str]] = []
    pack = module.pack
    monkeypatch.setattr(
        module, "pack", lambda root, now, *rest: (written.append({*now}), pack(root, now, *rest))
    )
    caches = node(0)
    caches.keep(settled=True)
    (tmp_path / "node0/a").write_text("a")
    caches.keep(settled=True)
    assert written == []
    for _ in range(3):
        caches.keep(settled=True)
    (tmp_path / "node0/b").write_text("b")
    caches.keep()
    # another process finds the same
    node(0).keep()
    assert written == [{"a"}, {"a", "b"}]


def test_it_is_kept_while_a_job_goes_on(
    node: Callable[..., Caches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "KEEP_EVERY_S", 0.05)
    caches = node(0)
    caches.keep_from_now_on()
    (tmp_path / "node0/kernel").write_text("code")
    end = time.monotonic() + 10
    while not (tmp_path / "run/caches" / NAME).exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "run/caches" / NAME).exists()


def test_what_cannot_be_kept_or_filled_is_said_once_and_ends_nothing(
    node: Callable[..., Caches], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    caches = node(0)
    (tmp_path / "node0/kernel").write_text("code")
    (tmp_path / "run/caches").write_text("a file is in the way")
    for _ in range(2):
        caches.keep()
    out = capsys.readouterr().out
    assert "it is not kept in " in out and out.count("\n") == 1
    gone = Caches(tmp_path / "gone", tmp_path / "run" / NAME, "7 0")
    gone.fill()
    gone.keep()
    assert (
        f"{tmp_path}/gone/.filling.lock cannot be used (No such file or directory)" in capsys.readouterr().out
    )


# Whose they are, and what for


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"TRITON_CACHE_DIR": str(tmp_path / "sdpo_0" / "triton"), "SLURM_JOB_ID": "7"}


def test_libraries_are_led_to_the_directory_of_their_part(tmp_path: Path, environment: dict[str, str]):
    caches = place_caches("trainer", 0, tmp_path / "run", sys.executable, environment, on_gpus=False)
    assert caches is not None
    assert environment["TRITON_CACHE_DIR"] == f"{tmp_path}/sdpo_0/trainer/triton"
    assert environment["SGLANG_CACHE_DIR"] == f"{tmp_path}/sdpo_0/trainer/sglang"
    assert (tmp_path / "sdpo_0/trainer").stat().st_mode & 0o777 == 0o700
    (tmp_path / "sdpo_0/trainer/kernel").write_text("code")
    (tmp_path / "run").mkdir()
    caches.keep()
    (kept,) = os.listdir(tmp_path / "run/caches")
    assert (
        kept.startswith("trainer_torch-2.") and kept.endswith(f"_{cpu_name()}.tar") and "_triton-3." in kept
    )


def test_outside_of_a_job_nothing_is_placed(tmp_path: Path, environment: dict[str, str]):
    for missing in environment:
        given = {key: value for key, value in environment.items() if key != missing}
        before = dict(given)
        assert place_caches("trainer", 0, tmp_path, sys.executable, given, on_gpus=False) is None
        assert given == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_elses_is_refused(tmp_path: Path, environment: dict[str, str]):
    (tmp_path / "sdpo_0").mkdir()
    os.chown(tmp_path / "sdpo_0", 12345, 12345)
    with pytest.raises(UserError, match="sdpo_0 on .* is somebody else's, .* set hardware.scratch"):
        place_caches("trainer", 0, tmp_path, sys.executable, environment, on_gpus=False)
    (tmp_path / "sdpo_0").rmdir()
    (tmp_path / "sdpo_0").symlink_to("/etc")
    with pytest.raises(UserError, match="somebody else's"):
        place_caches("trainer", 0, tmp_path, sys.executable, environment, on_gpus=False)


def test_scratch_that_is_not_there(tmp_path: Path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "none" / "sdpo_0" / "triton"), "SLURM_JOB_ID": "7"}
    with pytest.raises(RunFailed, match="cannot be made .No such file or directory.: set hardware.scratch"):
        place_caches("server", 0, tmp_path, sys.executable, environment, on_gpus=False)


def test_the_servers_versions_are_known_without_starting_it(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    packages = tmp_path / "venv/lib/python3.11/site-packages"
    for name, version in {"sglang": "0.5.9", "torch": "2.9.1+cu128", "flashinfer_python": "0.6"}.items():
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        (packages / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (tmp_path / "venv/bin").mkdir()
    python = tmp_path / "venv/bin/python"
    python.symlink_to(sys.executable)
    assert packages_of(str(python)) == [str(packages)]
    found = versions_of([str(packages)], ["sglang", "torch", "triton", "flashinfer-python"])
    assert found == ["sglang-0.5.9", "torch-2.9.1+cu128", "flashinfer-python-0.6"]
    assert packages_of("no-such-python") == [] == versions_of([], ["sglang", "torch"])
    monkeypatch.setattr(module, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    caches = place_caches("server", 0, tmp_path / "run", str(python), environment, on_gpus=True)
    assert caches is not None and caches._archive is not None
    assert caches._archive.name == (
        "server_sglang-0.5.9_torch-2.9.1+cu128_flashinfer-python-0.6_NVIDIA-H100-80GB-HBM3.tar"
    )


def test_of_unknown_versions_or_devices_nothing_is_kept(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "gpu_name", lambda: "")
    for python, on_gpus in (("no-such-python", False), (sys.executable, True)):
        caches = place_caches("trainer", 0, tmp_path / "run", python, {**environment}, on_gpus=on_gpus)
        assert caches is not None
        (tmp_path / "sdpo_0/trainer/kernel").write_text("code")
        caches.keep()
    assert not (tmp_path / "run").exists()


def test_gpus_by_their_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GPUS", tmp_path / "gpus")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_name() == ""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA A100\necho NVIDIA A100\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu_name() == "NVIDIA A100"
    (tmp_path / "gpus/0000:1b").mkdir(parents=True)
    (tmp_path / "gpus/0000:1b/information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   42\n")
    assert gpu_name() == "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(("rank_", "code", "kept"), [("0", 0, True), ("1", 0, False), ("0", 143, False)])
def test_a_rank_compiles_below_the_jobs_scratch_and_rank_0_keeps_it_at_its_end(
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    rank_: str,
    code: int,
    kept: bool,
):
    from sdpo_megatron import train
    from sdpo_megatron.job import rank

    monkeypatch.setattr(os, "environ", dict(os.environ))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for key, value in {"PROCID": rank_, "LOCALID": rank_, "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    (tmp_path / "x.yaml").write_text(
        f"run: {{name: x, steps: 1, dir: {tmp_path}/runs}}\nmodel: {{path: m}}\ntask: {{env: equations}}\n"
    )
    (tmp_path / "runs/x").mkdir(parents=True)

    def compile_something(arguments: list[str]) -> int:
        place = Path(os.environ["TRITON_CACHE_DIR"])
        place.mkdir()
        (place / "kernel").write_text("code")
        return code

    monkeypatch.setattr(train, "main", compile_something)
    monkeypatch.setattr(rank, "end_with_attempt", lambda *_: None)
    monkeypatch.setattr(rank.signal, "signal", lambda *_: None)
    assert rank.main([str(tmp_path / "begun"), "0", "host", "15000", "-", str(tmp_path / "x.yaml")]) == code
    assert (tmp_path / "sdpo_0/trainer/triton/kernel").exists()
    assert (tmp_path / "runs/x/caches").exists() == kept


@pytest.mark.parametrize(("log", "keeps"), [("server0.log", True), ("server1.log", False)])
def test_a_server_compiles_there_too_and_the_first_one_keeps_it(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, log: str, keeps: bool
):
    from sdpo_megatron.job import server

    monkeypatch.setattr(os, "environ", dict(os.environ))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "key").write_text("secret")
    checked = SimpleNamespace(
        config=SimpleNamespace(server=SimpleNamespace(python=sys.executable)),
        directory=SimpleNamespace(path=tmp_path / "run"),
    )
    monkeypatch.setattr(server, "end_with_attempt", lambda *_: None)
    monkeypatch.setattr(server, "preflight", lambda *_, **__: checked)
    monkeypatch.setattr(server, "memory_of_server", lambda *_, **__: "memory")
    monkeypatch.setattr(server, "server_process", lambda *_, **__: None)
    keeping: list[Caches] = []
    monkeypatch.setattr(Caches, "keep_from_now_on", lambda caches: keeping.append(caches))
    served: list[str] = []
    monkeypatch.setattr(server, "serve", lambda _: served.append(os.environ["SGLANG_JIT_CACHE_DIR"]) or 0)
    files = [str(tmp_path / name) for name in ("key", log)]
    assert server.main([str(tmp_path / "begun"), "0", "host", "1", "-", *files, "1", "nobody", "x.yaml"]) == 0
    assert served == [f"{tmp_path}/sdpo_0/server/sglang_jit"] and (len(keeping) == 1) == keeps
