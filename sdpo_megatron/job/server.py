"""One server of a job: python -m sdpo_megatron.job.server BEGUN ATTEMPT HOST PORT GPUS KEY_FILE LOG WORLD_SIZE
BESIDE, and the arguments of sdpo_megatron.train. It serves until it is asked to stop, or ends."""

import os
import sys
import time
from pathlib import Path

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.job.caches import place_caches
from sdpo_megatron.job.fence import end_with_attempt
from sdpo_megatron.job.task import device_variables
from sdpo_megatron.launch.launcher import memory_of_server, server_process
from sdpo_megatron.launch.server import ServerProcess
from sdpo_megatron.preflight.checked import preflight
from sdpo_megatron.stopping import install_stop_signals
from sdpo_megatron.terminal import reported, tell

POLL_S = 0.5


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 asked to stop, 1 the server ended, 2 the user's to mend."""
    begun, number, *argv = argv
    end_with_attempt(Path(begun), int(number))
    return reported(lambda: run_server(int(number), *argv[:7], arguments=argv[7:]))


def run_server(
    attempt: int,
    host: str,
    port: str,
    gpus: str,
    key_file: str,
    log: str,
    world_size: str,
    beside: str,
    *,
    arguments: list[str],
) -> int:
    """`beside` is "trainer" where the trainer's ranks share its memory, else "nobody"."""
    os.environ |= device_variables(os.environ, gpus)
    checked = preflight([*arguments, f"server.host={host}"], world_size=int(world_size), rank=1)
    memory = memory_of_server(checked, beside_trainer=beside == "trainer")
    # no server.urls are given
    assert memory is not None
    key = Path(key_file).read_text(encoding="utf-8").strip()
    python, run = checked.config.server.python, checked.directory.path
    caches = place_caches("server", attempt, run, python, os.environ, on_gpus=gpus != "-")
    if caches is not None and Path(log).stem == "server0":
        caches.keep_from_now_on()
    return serve(server_process(checked, memory, Path(log), port=int(port), api_key=key))


def serve(server: ServerProcess) -> int:
    """Returns 0 once it was asked to stop. Raises UserError where the server does not come up, RunFailed where it ends
    later."""
    stop = install_stop_signals()
    server.start()
    try:
        up = False
        while not stop.requested:
            if not up and (up := server.came_up()):
                tell(f"The server at {server.url} is up.")
            if up and not server.alive():
                raise RunFailed(f"The server at {server.url} ended; see its log.")
            time.sleep(POLL_S)
        return 0
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
