"""What is refused of the settings of inference servers."""

import glob
import ipaddress
import os
import re
import shutil
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import ConfigError, quoted
from sdpo_megatron.models.shape import ModelShape

SERVER_ARGUMENTS = {
    "--model-path": "model.path",
    "--dtype": "model.dtype",
    "--device": "run.device",
    "--host": "server.host",
    "--port": "",
    "--api-key": "",
    "--tp-size": "server.tp",
    "--tensor-parallel-size": "server.tp",
    "--mem-fraction-static": "server.memory_fraction",
    "--enable-memory-saver": "server.release_memory",
    "--weight-version": "",
}
"""What a server is started with that nobody else may decide, and the setting to use; empty: there is none."""


SECRET_ARGUMENTS = ("--config", "--admin-api-key", "--ssl-keyfile-password")
"""What would bring a secret to where others see it."""

LONGEST_KEY = 4096

CPU_MULTIPLE = 32
"""SGLang's, for each tensor-parallel rank."""


def check_server(server: ServerSettings) -> None:
    """Raises ConfigError unless there are either URLs of running servers, or what is needed to start one."""
    for url in server.urls:
        if not _is_server_url(url):
            raise ConfigError(f"server.urls holds {_without_password(url)!r}; write it as http://HOST:PORT.")
    places = [_place(url) for url in server.urls]
    for url, place in zip(server.urls, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"server.urls names the server {url} more than once; give each server once.")
    _check_server_arguments(server.args)
    if server.urls:
        read_api_key(server)
        return
    if server.api_key_file is not None:
        raise ConfigError(
            "server.api_key_file holds the key of the servers in server.urls, and there are none: leave it out (a "
            "server that the launcher starts has a key of its own), or give server.urls."
        )
    _check_host(server.host)
    if shutil.which(os.path.expanduser(server.python)) is None:
        raise ConfigError(
            f"server.python: there is no program {server.python} in this directory or on PATH; run: make .venv-sglang, "
            "or give the path of one that is elsewhere, or server.urls of running servers."
        )


def check_released_memory(server: ServerSettings, *, on_gpus: bool) -> None:
    """Raises ConfigError where servers are to release memory of GPUs, and there are none."""
    if server.release_memory and not on_gpus:
        raise ConfigError(
            "server.release_memory is true, but only on GPUs can a server release its memory, and this run is on the "
            "CPU; set server.release_memory=false."
        )


def read_api_key(server: ServerSettings) -> str | None:
    """Returns the key of the servers that run already; None where they need none. Raises ConfigError where its file
    cannot be read, may be read by others, or holds no key."""
    if server.api_key_file is None:
        return None
    path = os.path.expanduser(server.api_key_file)
    named = f"server.api_key_file: {server.api_key_file}"
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{named} is no regular file; name one that holds the key.")
        if status.st_mode & 0o077:
            raise ConfigError(f"{named} may be read by others; run: chmod 600 {server.api_key_file}")
        with open(path, "rb") as file:
            content = file.read(LONGEST_KEY + 1)
    except OSError as error:
        raise ConfigError(
            f"{named} cannot be read: {error.strerror}; correct that, or name another."
        ) from None
    key = content.decode(errors="replace").rstrip("\r\n")
    if not re.fullmatch("[!-~]+", key) or len(content) > LONGEST_KEY:
        raise ConfigError(
            f"{named} is empty, longer than {LONGEST_KEY} bytes, or holds something else than one line of visible "
            "ASCII characters, which no HTTP header takes; write the key alone into it."
        )
    return key


def _is_server_url(url: str) -> bool:
    """Says whether `url` can be a server's. It may have a path, that of a proxy in front of the server."""
    try:
        parts = urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    # urlsplit raises it for a port that is none
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not host or not _can_be_a_host(host):
        return False
    return re.fullmatch("[!-~]+", url) is not None and not re.search("[@?#]", url)


def _can_be_a_host(host: str) -> bool:
    """Says whether `host` can be a name or an address: what has digits and dots alone, or colons, is an address."""
    if not re.fullmatch(r"[0-9.]+|.*:.*", host):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_host(host: str) -> None:
    """Raises ConfigError unless a server can be started at `host`."""
    try:
        if _can_be_a_host(host):
            socket.getaddrinfo(host, None)
            return
    except (OSError, UnicodeError):
        pass
    raise ConfigError(
        f"server.host is {quoted(host)}, which is no address or name known here; set server.host=127.0.0.1."
    )


def _place(url: str) -> tuple[str, int | None, str]:
    """Returns where `url` leads, the same for the ways to write it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return ("127.0.0.1" if host == "localhost" else host), port, parts.path.rstrip("/")


def _without_password(url: str) -> str:
    return re.sub("//.*@", "//...@", url)


def _check_server_arguments(arguments: list[str]) -> None:
    """SGLang's parser takes a beginning of an option for the option."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if len(name) > len("--") and any(option.startswith(name) for option in SECRET_ARGUMENTS):
            raise ConfigError(
                f"server.args holds {name}, but arguments are shown to all users of the machine and stored in "
                "config.json; remove it."
            )
        for option, key in SERVER_ARGUMENTS.items():
            if len(name) > len("--") and option.startswith(name):
                what = f"set {key} instead" if key else "remove it"
                raise ConfigError(f"server.args holds {name}, which the trainer sets itself; {what}.")


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach `host`, a name or an address, as far as it can be told without asking
    for it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    # a name, which may resolve to anything
    except ValueError:
        return False


def are_on_loopback(server: ServerSettings) -> bool:
    """Returns whether only this machine can reach the servers."""
    return all(is_loopback(urlsplit(url).hostname or "") for url in server.urls) and (
        bool(server.urls) or is_loopback(server.host)
    )


def check_feed_forward(server: ServerSettings, shape: ModelShape, *, on_gpus: bool) -> None:
    """Raises ConfigError where a server that we start on CPUs would fill up the feed-forward networks of the model
    (SGLang 0.5.23: `configs/update_config.py`): its hashes are then not those of what a push sends."""
    multiple = CPU_MULTIPLE * server.tp
    if not (on_gpus or server.urls) and shape.columns % multiple:
        raise ConfigError(
            f"The model's feed-forward networks have {shape.columns} columns, which SGLang on a CPU fills up to a "
            f"multiple of {multiple}: no push could be proved. Take a model with such a multiple, or a machine with "
            "GPUs."
        )


def check_server_layout(server: ServerSettings, shape: ModelShape) -> None:
    """Raises ConfigError where a server that we start could not split the attention heads; it repeats key-value heads
    where there are too few."""
    if not server.urls and shape.heads % server.tp:
        raise ConfigError(
            f"server.tp={server.tp} does not divide the model's {shape.heads} attention heads; "
            f"set server.tp to {divisors(shape.heads)}."
        )


def divisors(number: int) -> str:
    """Returns the divisors of a number as a message lists them: 1, 2 or 4."""
    *most, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return f"{', '.join(most)} or {last}" if most else last


def check_model_path(server: ServerSettings, directory: Path) -> None:
    """Raises ConfigError where a server that we start would take the path of the model's weights for a pattern
    (SGLang 0.5.23: `model_loader/loader.py`), and find none."""
    if not server.urls and glob.has_magic(str(directory)):
        raise ConfigError(
            f"SGLang cannot read a model in {directory}: it takes a path with [, * or ? for a pattern. Move the "
            "model, or give the path of a symbolic link to it."
        )
