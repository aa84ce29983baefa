import os
import signal
from collections.abc import Iterator

import pytest

from sdpo_megatron.stopping import install_stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_wish(number: signal.Signals):
    stop = install_stop_signals()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and stop.signal == number


def test_a_signal_cuts_short_what_says_how():
    stop = install_stop_signals()
    calls: list[str] = []
    with stop.interrupting(lambda: calls.append("now")):
        assert calls == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == ["now"]
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["now"]


def test_a_signal_that_came_just_before_counts():
    stop = install_stop_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    calls: list[str] = []
    with stop.interrupting(lambda: calls.append("now")):
        pass
    assert calls == ["now"]
