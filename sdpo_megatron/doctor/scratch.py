"""Node-local scratch, and where compilers and libraries keep what they have made."""

import getpass
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sdpo_megatron.doctor.file_systems import file_system_of, nearest_existing
from sdpo_megatron.doctor.findings import Finding, failure, ok, warning

SCRATCH_BYTES = 5 << 30


def scratch(environment: Mapping[str, str]) -> list[Finding]:
    """Looks at $SLURM_TMPDIR, else $TMPDIR, else /tmp."""
    variable = next((name for name in ("SLURM_TMPDIR", "TMPDIR") if environment.get(name)), "")
    path = Path(environment[variable] if variable else "/tmp")
    named = f"{path} (${variable})" if variable else str(path)
    todo = "set TMPDIR to a directory of this machine's own disk that can be written"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as own:
            (Path(own) / "file").write_bytes(b"x")
    except OSError as error:
        return [failure("scratch", f"{named} cannot be written: {error.strerror or error}", todo)]
    system, free = file_system_of(path), shutil.disk_usage(path).free
    found = f"{named} is on {system}, {free / 2**30:.1f} GiB free"
    if system.place == "network":
        return [warning("scratch", found, f"{todo}: this one is slow, and shared", bytes_free=free)]
    if free < SCRATCH_BYTES:
        return [warning("scratch", found, f"free space there, or {todo}", bytes_free=free)]
    return [ok("scratch", found, bytes_free=free)]


def cache_directories(environment: Mapping[str, str]) -> dict[str, tuple[Path, str]]:
    """Returns where each library keeps what it has made, by its own rules, and the variable that moves it."""
    home = Path(environment.get("HOME") or Path.home())
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    temporary = Path(environment.get("TMPDIR") or "/tmp")
    triton = Path(environment.get("TRITON_HOME") or home) / ".triton/cache"
    hub = Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    places = {
        "Triton": ("TRITON_CACHE_DIR", triton),
        "Inductor": ("TORCHINDUCTOR_CACHE_DIR", temporary / f"torchinductor_{_user()}"),
        "SGLang": ("SGLANG_CACHE_DIR", home / ".cache/sglang"),
        "Hugging Face": ("HF_HUB_CACHE", hub),
    }
    return {
        name: (Path(environment.get(variable) or default), variable)
        for name, (variable, default) in places.items()
    }


def _user() -> str:
    try:
        return getpass.getuser()
    # in a container a user may have a number alone
    except (KeyError, OSError):
        return f"uid_{os.getuid()}"


def caches(environment: Mapping[str, str]) -> list[Finding]:
    """Warns of a cache on a network file system: a start that took a minute takes many there."""
    return [_cache(name, *place) for name, place in cache_directories(environment).items()]


def _cache(library: str, path: Path, variable: str) -> Finding:
    name, system = f"cache of {library}", file_system_of(path)
    found = f"{path} is on {system}"
    here = f"set {variable} to a directory on this machine's own disk"
    if system.place == "network":
        if library == "Hugging Face":
            here += ", or name a copy there as model.path: weights are read through the network at each start"
        else:
            here += ": what is compiled is many small files, which all ranks open"
        return warning(name, found, here)
    if not os.access(nearest_existing(path), os.W_OK):
        return warning(name, f"{found}, and cannot be written", here)
    if library != "Hugging Face" and "noexec" in system.options:
        return warning(name, f"{found}, which is mounted noexec", f"{here}: compiled code is loaded from it")
    return ok(name, found)
