"""How one rank's process ends."""

import errno
import signal

import pytest

from sdpo_megatron import launch, rank, train


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
    monkeypatch.setattr(rank, "install_stop_signals", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank.run_rank([], lambda run: None) == 1
    assert capsys.readouterr().err == (
        f"stopped: the disk failed{where}: No space left on device. Free space and start the same command again: the "
        "last checkpoint is intact.\n"
    )
    error.errno = errno.EBADF  # a bug of ours
    with pytest.raises(OSError):
        rank.run_rank([], lambda run: None)


def test_ctrl_c_before_anything_was_started(monkeypatch: pytest.MonkeyPatch):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "launch", interrupted)
    assert train.main([]) == 128 + signal.SIGINT
