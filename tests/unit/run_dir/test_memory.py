import os
import subprocess
import sys
import time

from sdpo_megatron.run_dir.memory import PeakMemory

MIB = 2**20


def test_a_peak_between_two_looks_is_seen():
    memory = PeakMemory(os.getpid(), interval_s=0.01)
    try:
        base = memory.take()
        block = bytearray(b"x" * (200 * MIB))
        time.sleep(0.2)
        del block
        assert memory.take() > base + 150 * MIB
        time.sleep(0.05)
        assert memory.take() < base + 150 * MIB
    finally:
        memory.close()


def test_descendants_count():
    memory = PeakMemory(os.getpid(), interval_s=0.01)
    base = memory.take()
    source = "b = bytearray(b'x' * (200 << 20)); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert memory.take() > base + 150 * MIB
    finally:
        child.communicate("\n")
        memory.close()


def test_an_ended_root_counts_as_nothing():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    memory = PeakMemory(child.pid)
    child.communicate(b"\n")
    memory.take()
    assert memory.take() == 0
    memory.close()
