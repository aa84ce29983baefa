"""What is refused of the settings of inference servers."""

import ipaddress
import os
import re
import shutil
from urllib.parse import urlsplit

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.preflight.numbers import divisors, either

SERVER_ARGUMENTS = {
    "--model-path": "model.path",
    "--dtype": "model.dtype",
    "--device": "run.device",
    "--host": "server.host",
    "--port": "",
    "--api-key": "server.api_key",
    "--tp-size": "server.tp",
    "--tensor-parallel-size": "server.tp",
    "--mem-fraction-static": "server.memory_fraction",
    "--weight-version": "",
}
"""What a server is started with that nobody else may decide, and the setting to use; empty: there is none."""


def check_server(server: ServerSettings) -> None:
    """Raises ConfigError unless there are either URLs of running servers, or what is needed to start one."""
    for url in server.urls:
        if not _is_server_url(url):
            raise ConfigError(f"server.urls holds {_without_password(url)!r}; write it as http://HOST:PORT.")
    places = [_place(url) for url in server.urls]
    for url, place in zip(server.urls, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"server.urls names the server {url} more than once; give each server once.")
    if server.api_key is not None and not re.fullmatch("[!-~]+", server.api_key):
        raise ConfigError(
            "server.api_key is empty or holds something else than visible ASCII characters, which no HTTP header "
            "takes; give another key."
        )
    _check_server_arguments(server.args)
    if server.urls:
        return
    if not _is_loopback(server.host) and not server.api_key:
        raise ConfigError(
            f"server.host is {server.host}, which other machines can reach; set server.api_key, or "
            "server.host=127.0.0.1."
        )
    if shutil.which(os.path.expanduser(server.python)) is None:
        raise ConfigError(
            f"server.python: there is no program {server.python} in this directory or on PATH; run: make "
            ".venv-sglang (or give server.urls of running servers)."
        )


def _is_server_url(url: str) -> bool:
    """Says whether `url` can be a server's. It may have a path, that of a proxy in front of the server."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    # urlsplit raises it for a port that is none
    except ValueError:
        return False
    return named and re.fullmatch("[!-~]+", url) is not None and not re.search("[@?#]", url)


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
        for option, key in SERVER_ARGUMENTS.items():
            if len(name) > len("--") and option.startswith(name):
                what = f"set {key} instead" if key else "remove it"
                raise ConfigError(f"server.args holds {name}, which the trainer sets itself; {what}.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    # a name, which may resolve to anything
    except ValueError:
        return False


def check_server_layout(server: ServerSettings, shape: ModelShape) -> None:
    """Raises ConfigError where a server that we start could not split the attention heads; it repeats key-value heads
    where there are too few."""
    if not server.urls and shape.heads % server.tp:
        raise ConfigError(
            f"server.tp={server.tp} does not divide the model's {shape.heads} attention heads; "
            f"set server.tp to {either(divisors(shape.heads))}."
        )
