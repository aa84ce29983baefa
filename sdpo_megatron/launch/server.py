"""An SGLang server as a child process: its command line, and whether it came up.

SGLang reads its key from a `--config` file, which is there only while it starts, and prints it into its log, from which
it is taken before the log is written."""

import contextlib
import os
import random
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdpo_megatron.cluster.layout import FIRST_PORT
from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.files import write_private
from sdpo_megatron.launch.processes import ON_LOOPBACK, ChildProcess, Guard, kept_temporary_files
from sdpo_megatron.launch.verdict import exit_in_words
from sdpo_megatron.preflight.memory import ServerMemory
from sdpo_megatron.preflight.server import is_loopback
from sdpo_megatron.rollout.client import Client

SGLANG_ON_CPU = Path(__file__).with_name("sglang_on_cpu.py")
BATCHED_ATTENTION = "batched_sdpa"
"""The name under which batched_attention.py, which imports SGLang, makes itself known."""

CONTEXT_MARGIN = 8
"""SGLang keeps up to 7 positions of its context length to itself; ours counts what a request may really
use."""

PRIVATE_SETTINGS = "settings.yaml"
MEMORY_OPTION = "--mem-fraction-static"
TERM_GRACE_S = 5.0
POLL_S = 0.2
PORTS_TRIED = 100

CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # a compilation in the middle of a request takes half a minute
    "TORCHDYNAMO_DISABLE": "1",
    # threads that wait by spinning starve the trainer on shared cores
    "OMP_WAIT_POLICY": "passive",
}
ENVIRONMENT = {
    # a model is a directory on this machine
    "HF_HUB_OFFLINE": "1",
    # for CONTEXT_MARGIN; config.py bounds the real length
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    # /health answers at once, even if paused
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    "PYTHONUNBUFFERED": "1",
}
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
DROPPED_ENVIRONMENT = (
    # the server's packages are not the trainer's
    "PYTHONPATH",
    "PYTHONHOME",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server is started with, beyond its ServerSettings."""

    path: Path
    """A Hugging Face directory."""
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    context_length: int
    """Tokens of prompt plus response that one request may use."""
    max_responses: int
    """Responses sampled at once; more wait on the server."""
    memory: ServerMemory
    seed: int


class ServerProcess:
    """One server, on a port that stays the same over restarts.

    The server and all its children die with the thread that called `start`, however that ends."""

    def __init__(
        self,
        settings: ServerSettings,
        model: ServedModel,
        log_path: Path,
        port: int | None = None,
        api_key: str | None = None,
    ):
        """By default it has a free port, and a key that no server had before."""
        self._settings = settings
        self._model = model
        self._log_path = log_path
        self._port = free_port(settings.host) if port is None else port
        self._child: ChildProcess | None = None
        self.api_key = api_key or secrets.token_hex(32)
        """What a call to it must bring; the same over restarts."""
        self._client = Client(self.url, self.api_key)
        self._private: Path | None = None
        """A directory that nobody else may enter, for one start: settings, sockets and its process group's store."""
        self._deadline = 0.0

    @property
    def url(self) -> str:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The id of the main process, which leads the process group of all of them; None before `start` and after
        `stop`."""
        return None if self._child is None else self._child.pid

    def start(self, guard: Guard | None = None) -> None:
        """Starts loading the model; `wait_healthy` waits for that. The `guard` watches it until `stop`."""
        assert self._child is None
        # where temporary files lie, since the name of a socket holds no more than 107 bytes
        self._private = Path(tempfile.mkdtemp(prefix="sdpo_server_"))
        private_settings = self._private / PRIVATE_SETTINGS
        write_private(private_settings, f"api-key: '{self.api_key}'\n")
        command = server_command(self._settings, self._model, self._port, private_settings)
        environment = server_environment(os.environ, self._model.device, self._settings.host, self._private)
        self._child = ChildProcess(
            command, environment, self._log_path, secret=self.api_key, guard=guard, directory=self._private
        )
        self._deadline = time.monotonic() + self._settings.start_timeout_s

    def came_up(self) -> bool:
        """Returns whether the server answers by now. Raises UserError, with the end of its log, if it has ended or
        takes longer than `server.start_timeout_s`."""
        if self._client.healthy():
            if self._private is not None:
                # it has read them
                (self._private / PRIVATE_SETTINGS).unlink(missing_ok=True)
            return True
        assert self._child is not None
        code = self._child.exit_code()
        if code is not None:
            raise self._not_up(self._child, f"{exit_in_words(code)} while starting")
        if time.monotonic() > self._deadline:
            limit = self._settings.start_timeout_s
            raise self._not_up(self._child, f"was not up after server.start_timeout_s={limit:g} seconds")
        return False

    def wait_healthy(self) -> None:
        """Returns once the server answers. Raises what `came_up` raises."""
        while not self.came_up():
            time.sleep(POLL_S)

    def alive(self) -> bool:
        """Whether the main process runs. It may still be loading, or hang: that shows in the calls to it."""
        return self._child is not None and not self._child.ended()

    def stop(self) -> None:
        """Ends the server and all its children: SIGTERM, and SIGKILL after a few seconds. Harmless if it is
        gone."""
        if self._child is not None:
            child, self._child = self._child, None
            child.end(TERM_GRACE_S)
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def _not_up(self, child: ChildProcess, what: str) -> UserError:
        lines = child.log_end()
        where = f"the end of its log {self._log_path}:" if lines else f"its log {self._log_path} is empty"
        return UserError(f"the SGLang server {what}{reason_in(lines)}; {where}", lines)


def reason_in(log_end: Sequence[str]) -> str:
    """Returns what to add to a message: the last error that the end of a log names, if it does."""
    errors = [line for line in log_end if re.match(r"[\w.]+(Error|Exception): ", line)]
    if not errors:
        return ""
    setting = " (the setting is server.memory_fraction)" if MEMORY_OPTION in errors[-1] else ""
    return f": {errors[-1]}{setting}"


def free_port(host: str) -> int:
    """Returns a TCP port that nothing listened on a moment ago.

    A server takes seconds until it listens itself. So the port is none of those that the system hands out meanwhile,
    to connections and to whoever asks for any port."""
    others = range(FIRST_PORT, _first_handed_out())
    for port in [*random.SystemRandom().sample(others, min(PORTS_TRIED, len(others))), 0]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return probe.getsockname()[1]
    raise RunFailed(f"No TCP port is free on {host}.")


def _first_handed_out() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        # Linux's default
        return 32768


def server_command(
    settings: ServerSettings, model: ServedModel, port: int, private_settings: Path
) -> list[str]:
    """Returns the command line; `server.args` come last and so win over ours. What others must not see is in the file
    `private_settings`."""
    on_cpu = model.device == "cpu"
    program = [str(SGLANG_ON_CPU)] if on_cpu else ["-m", "sglang.launch_server"]
    options: dict[str, str | int | float] = {
        "--config": str(private_settings),
        "--model-path": str(model.path),
        "--device": model.device,
        "--dtype": model.dtype,
        "--context-length": model.context_length + CONTEXT_MARGIN,
        "--max-running-requests": model.max_responses,
        "--random-seed": model.seed,
        "--weight-version": 0,
        "--tp-size": settings.tp,
        MEMORY_OPTION: model.memory.fraction,
        "--host": settings.host,
        "--port": port,
    }
    if model.memory.cache_tokens is not None:
        options["--max-total-tokens"] = model.memory.cache_tokens
    if on_cpu:
        options["--attention-backend"] = BATCHED_ATTENTION
    command = [os.path.expanduser(settings.python), *program]
    for name, value in options.items():
        command += [name, str(value)]
    command.append("--sleep-on-idle")
    if settings.release_memory:
        command.append("--enable-memory-saver")
    if on_cpu:
        command.append("--skip-server-warmup")
    return command + settings.args


def server_environment(
    base: Mapping[str, str],
    device: Literal["cpu", "cuda"],
    host: str,
    private: Path,
) -> dict[str, str]:
    """Returns the switches of SGLang and torch that have no command-line option, on top of our own environment; `host`
    is the server's, which is never asked through a proxy; `private` is a directory for sockets and the like."""
    environment = {
        name: value for name, value in base.items() if name not in DROPPED_ENVIRONMENT
    } | ENVIRONMENT
    environment |= kept_temporary_files(private) | {
        # torch's own store would listen on all interfaces, whatever its host says
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{private}/store",
    }
    if is_loopback(host):
        environment |= ON_LOOPBACK
    # a server asks itself whether it is healthy, which a proxy cannot answer
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join([*filter(None, [base.get(name)]), *OWN_HOSTS, host])
    if device == "cpu":
        # all cores: while the server samples, the ranks wait. On two of them a rollout of the demo's shape took 11.4 s
        # with two threads and 14.6 s with one.
        environment |= CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return environment
