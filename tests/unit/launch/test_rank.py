"""How one rank's process ends."""

import errno
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdpo_megatron import train
from sdpo_megatron.errors import PeerLost, UserError
from sdpo_megatron.launch import launcher, rank
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.phases import read_ending
from sdpo_megatron.stopping import Stopped, StopRequest

CONFIG = SimpleNamespace(server=SimpleNamespace(urls=["http://127.0.0.1:9"]))
CHECKED = SimpleNamespace(
    device="cpu", directory=RunDirectory(Path("nowhere")), only_check=False, config=CONFIG
)
RANK_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"),
            " to write runs/x/metrics.jsonl",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
    ],
)
def test_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, where: str
):
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(rank, "preflight", fail)
    monkeypatch.setattr(rank, "install_stop_signals", StopRequest)
    for name, value in RANK_VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert rank.run_rank([], lambda run: True) == 1
    assert capsys.readouterr().err == (
        f"stopped: the disk failed{where}: No space left on device. Free space and start the same command again: the "
        "last checkpoint is intact.\n"
    )
    error.errno = errno.EBADF  # a bug of ours
    with pytest.raises(OSError):
        rank.run_rank([], lambda run: True)


def test_ctrl_c_before_anything_was_started(monkeypatch: pytest.MonkeyPatch):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launcher, "launch", interrupted)
    assert train.main([]) == 128 + signal.SIGINT


def test_the_command_escapes_what_the_locale_cannot_show(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launcher, "launch", lambda argv: 0)
    assert train.main([]) == 0
    assert sys.stdout.errors == sys.stderr.errors == "backslashreplace"


class FakeRun:
    def __init__(self, *, main: bool):
        self.parallel = SimpleNamespace(is_main=main)
        self.serving = SimpleNamespace(leave=lambda: None, abandoned_a_call=False)
        self.log = SimpleNamespace(close=lambda: None)
        self.completed, self.steps = 3, 10


def run_one(
    monkeypatch: pytest.MonkeyPatch, train_: Any, *, main: bool = True, signalled: int | None = None
) -> int:
    """`rank.run_rank` of a rank whose checks pass and whose run is a fake."""
    build = ModuleType("sdpo_megatron.build")
    build.build_run = lambda *arguments: FakeRun(main=main)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sdpo_megatron.build", build)
    monkeypatch.setattr(rank, "preflight", lambda *arguments, **keywords: CHECKED)
    monkeypatch.setattr(rank, "claim_run_directory", lambda checked, number: None)
    monkeypatch.setattr(rank, "install_stop_signals", lambda: SimpleNamespace(signal=signalled))
    for name, value in RANK_VARIABLES.items():
        monkeypatch.setenv(name, value)
    return rank.run_rank([], train_)


@pytest.mark.parametrize("number", [15, 2, 1, None])
def test_a_run_that_was_stopped_says_so_in_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int | None
):
    """Where another rank was asked, too: without the launcher nobody else would say that the run is not finished."""
    assert run_one(monkeypatch, lambda run: False, signalled=number) == 128 + (number or 15)
    assert capsys.readouterr().err == (
        "stopped: asked to after 3 of 10 steps, which are saved. The same command goes on from there.\n"
    )
    assert run_one(monkeypatch, lambda run: False, main=False, signalled=number) == 128 + (number or 15)
    assert run_one(monkeypatch, lambda run: True, signalled=number) == 0  # too late to matter
    assert capsys.readouterr().err == ""


def test_a_rank_that_loses_another_one_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def loses(run: Any) -> bool:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1\nmore")

    assert run_one(monkeypatch, loses) == 3
    assert capsys.readouterr().err == (
        "stopped: another rank ended ([gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1); its "
        "own last lines say why.\n"
    )

    def has_a_bug(run: Any) -> bool:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_one(monkeypatch, has_a_bug)


def test_a_rank_lost_with_a_bug_elsewhere_is_not_the_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def loses(run: Any) -> bool:
        raise PeerLost("Rank 1 failed (ValueError: x); its log says more.")

    assert run_one(monkeypatch, loses) == 3
    assert capsys.readouterr().err == "stopped: Rank 1 failed (ValueError: x); its log says more.\n"


@pytest.mark.parametrize("launched", [True, False])
def test_the_launcher_can_read_why_a_rank_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: bool
):
    """Without a launcher the directory may be that of another run, which keeps its files."""

    def fails(run: Any) -> bool:
        raise UserError("mend\nthis", ["end of a log"])

    directory = RunDirectory(tmp_path)
    directory.endings.mkdir()
    monkeypatch.setattr(CHECKED, "directory", directory)
    monkeypatch.setattr(rank, "parent_holds", lambda path: launched and path == tmp_path)
    assert run_one(monkeypatch, fails) == 2
    stated = {"exit_code": 2, "message": "error: mend\\nthis\nend of a log"}
    assert read_ending(directory.ending(0)) == (stated if launched else None)


def test_a_disk_that_does_not_take_the_reason_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(run: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rank, "parent_holds", lambda path: True)
    assert run_one(monkeypatch, fails) == 1
    assert capsys.readouterr().err.startswith("stopped: the disk failed: No space left on device.")


def test_stopped_before_the_first_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def waits(run: Any) -> bool:
        raise Stopped

    assert run_one(monkeypatch, waits, signalled=signal.SIGINT) == 130
    assert capsys.readouterr().err == "stopped: asked to before the first step; nothing is lost.\n"
