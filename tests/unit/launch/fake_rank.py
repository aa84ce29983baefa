"""Stands in for a training rank under the launcher: does what one of the functions below says, without torch.

python fake_rank.py '{"0": "finish", "1": "crash"}' RUN_DIRECTORY [what the launcher adds]
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

DEADLINE_S = 60
RANK = int(os.environ["RANK"])
DIRECTORY = Path(sys.argv[2])
SERVER = DIRECTORY / "servers" / "0.json"


def finish() -> None:
    pass


def crash() -> None:
    print("Traceback: something is odd", file=sys.stderr)
    sys.exit(3)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def user_error() -> None:
    print("noise before", file=sys.stderr)
    sys.exit(state("error: mend this.", 2))


def failed() -> None:
    sys.exit(state("stopped: the loss is not finite.", 1))


def crash_late() -> None:
    time.sleep(0.5)
    sys.exit(say("Traceback: something is odd", 1))


def peer_lost() -> None:
    sys.exit(state("stopped: another rank ended.", 3))


def failed_late() -> None:
    time.sleep(1)
    sys.exit(state("stopped: rank 0 says so.", 1))


def killed_with_a_reason() -> None:
    state("stopped: not the cause.", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    """Until SIGTERM, then saves for a moment."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    note("ready")
    until(lambda: bool(asked))
    time.sleep(0.3)
    note(f"saved after {len(asked)}; server up: {well() is not None}")


def fail_to_save() -> None:
    wait()
    failed()


def stopped() -> None:
    """By somebody's SIGSTOP, in a phase of step 3; saves when it is asked to."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    enter(3, "learn", longest_s=1.0)
    note("ready")
    os.kill(os.getpid(), signal.SIGSTOP)
    until(lambda: bool(asked))
    note("saved")
    sys.exit(143)


def stopped_for_a_moment() -> None:
    enter(3, "learn", longest_s=1.0)
    note("ready")
    os.kill(os.getpid(), signal.SIGSTOP)


def silent() -> None:
    """Makes no progress, waiting for nobody, and does not leave."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    enter(3, "learn", longest_s=0.1)
    write_stacks()
    note("ready")
    time.sleep(DEADLINE_S)


def waiting() -> None:
    """Waits for others, as the innermost call says."""
    enter(3, "learn", longest_s=0.1)
    write_stacks()
    note("ready")
    source = f"import time\ndef all_reduce():\n    time.sleep({DEADLINE_S})\nall_reduce()"
    exec(compile(source, "/x/torch/distributed/distributed_c10d.py", "exec"), {})


def enter(step: int, phase: str, longest_s: float) -> None:
    """As run_dir/phases.py writes it."""
    now = time.time()
    entered = {
        "rank": RANK,
        "step": step,
        "phase": phase,
        "since": now,
        "progress": now,
        "longest_s": longest_s,
    }
    (DIRECTORY / "phases" / f"rank_{RANK}.json").write_text(json.dumps(entered))


def write_stacks() -> None:
    file = (DIRECTORY / "phases" / f"rank_{RANK}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def stubborn() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("ready")
    time.sleep(DEADLINE_S)


def defenceless() -> None:
    note("ready")
    time.sleep(DEADLINE_S)


def parent() -> None:
    """Has a child in its process group."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({DEADLINE_S})"])
    note(f"ready {child.pid}")
    time.sleep(DEADLINE_S)


def server_dies() -> None:
    record = until(well)
    time.sleep(1)  # the launcher sees that it is up, too
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: well(starts=2))


def server_hangs() -> None:
    record = until(well)
    os.kill(record["pid"], signal.SIGSTOP)
    ask_for_restart(record["starts"])
    until(lambda: well(starts=2))
    note(f"old server gone: {not Path('/proc', str(record['pid'])).exists()}")
    assert not SERVER.with_suffix(".restart").exists()


def server_killed_and_reported() -> None:
    record = until(well)
    time.sleep(1)
    # its connections break before it has ended
    ask_for_restart(record["starts"])
    time.sleep(0.3)
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: well(starts=2))


def stale_request() -> None:
    until(well)
    ask_for_restart(7)
    until(lambda: not SERVER.with_suffix(".restart").exists())
    time.sleep(0.5)
    assert well(starts=1)


def undisturbed() -> None:
    until(well)
    time.sleep(1)
    assert well(starts=1)


def say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def state(message: str, code: int) -> int:
    """As run_dir/phases.py writes it."""
    path = DIRECTORY / "endings" / f"rank_{RANK}.json"
    path.with_suffix(".new").write_text(json.dumps({"exit_code": code, "message": message}))
    path.with_suffix(".new").rename(path)
    return say(f"{message}\nnoise after" if RANK else message, code)


def note(text: str) -> None:
    path = DIRECTORY / f"note{RANK}"
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def ask_for_restart(starts: int) -> None:
    temporary = DIRECTORY / "request"
    temporary.write_text(f"{starts}\n")
    temporary.rename(SERVER.with_suffix(".restart"))


def well(starts: int | None = None) -> dict | None:
    """The server's record, if it answers and was started that often."""
    if not SERVER.exists():
        return None
    record = json.loads(SERVER.read_text())
    try:
        with urllib.request.urlopen(f"{record['url']}/health", timeout=1):
            return record if starts in (None, record["starts"]) else None
    except OSError:  # refused, reset, timed out
        return None


def until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


if __name__ == "__main__":
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    names += ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    seen = {name: os.environ.get(name) for name in names}
    facts = {"environment": seen, "arguments": sys.argv[3:], "pid": os.getpid(), "parent": os.getppid()}
    (DIRECTORY / f"rank{RANK}.json").write_text(json.dumps(facts))
    until(lambda: len(list(DIRECTORY.glob("rank*.json"))) >= int(os.environ["WORLD_SIZE"]))
    globals()[json.loads(sys.argv[1])[str(RANK)]]()
