import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sdpo_megatron.stopping import install_stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_becomes_a_wish(number: signal.Signals):
    stop = install_stop_signals()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and stop.signal == number


def test_who_was_started_to_outlive_a_terminal_does():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = install_stop_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested


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


PATIENT = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(0.5)
print("saved", flush=True)
sys.exit(128 + asked[0])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_is_asked_to_stop_and_waited_for(number: signal.Signals):
    code = "import sys; from sdpo_megatron.stopping import run_until_stopped; sys.exit(run_until_stopped(sys.argv[1:]))"
    command = [sys.executable, "-c", code, sys.executable, "-c", PATIENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        parent.send_signal(number)
        out, err = parent.communicate(timeout=30)
    assert (parent.returncode, out, err) == (128 + number, "saved\n", "")
