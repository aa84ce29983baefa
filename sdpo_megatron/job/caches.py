"""Compiled code of a job: on each node's own disk, and next to the checkpoints for the next attempt.

The first task of a part (the trainer, a server) on a node unpacks what was kept while the node's other tasks wait. One
task of the part keeps what was compiled. Without either a run only takes longer to start: nothing here ends one, but
for a directory that is somebody else's, whose code would be run."""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

from sdpo_megatron.cluster.setup import cache_variables
from sdpo_megatron.errors import RunFailed, UserError, one_line
from sdpo_megatron.files import write_atomically
from sdpo_megatron.job.cache_archive import DAMAGES, OWN, NotKept, contents_in, contents_of, pack, unpack
from sdpo_megatron.launch.processes import wait_until
from sdpo_megatron.run_dir.directory import CACHES, try_lock
from sdpo_megatron.terminal import tell

Part = Literal["trainer", "server"]
PACKAGES: Mapping[Part, tuple[str, ...]] = {
    "trainer": ("torch", "triton"),
    "server": ("sglang", "torch", "triton", "flashinfer-python"),
}
"""What compiles: code of other versions is of no use."""
WAIT_S = 300.0
"""How long a task waits for the one that unpacks."""
KEEP_EVERY_S, KEEP_LIMIT_S = 60.0, 30.0
"""How often a task looks whether there is something new, and how long keeping it may take."""
GPUS = Path("/proc/driver/nvidia/gpus")
NAME_LIMIT_S = 20.0


class Caches:
    """What one part of a job compiles on this node."""

    def __init__(self, root: Path, archive: Path | None, attempt: str) -> None:
        """`root` is on this node's disk, `archive` the file that is kept, None where nobody could say for which
        versions and devices it would be; `attempt` differs from attempt to attempt."""
        self._root, self._archive, self._attempt = root, archive, attempt
        self._seen: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._said = ""
        self._keeping = threading.Lock()

    def fill(self) -> None:
        """Unpacks what was kept, unless another task of this node and attempt has; waits for one that does."""
        try:
            with (self._root / OWN[0]).open("ab") as lock:
                # the lock is gone with its process
                if not wait_until(lambda: try_lock(lock.fileno()), WAIT_S):
                    self._say(f"another task has not unpacked it within {WAIT_S:g} s, and is not waited for")
                    return
                mark = self._root / OWN[1]
                if not mark.is_file() or mark.read_text(encoding="utf-8") != self._attempt:
                    self._unpack()
                    write_atomically(mark, self._attempt, durable=False)
        except OSError as error:
            self._say(
                f"{error.filename or self._root} cannot be used ({error.strerror}), and it is compiled anew"
            )

    def _unpack(self) -> None:
        if self._archive is None:
            return
        if not self._archive.is_file():
            part = self._archive.name.partition("_")[0]
            others = sorted(path.name for path in self._archive.parent.glob(f"{part}_*.tar"))
            if others:
                self._say(
                    f"what is kept is of other versions or devices ({', '.join(others)}): compiled anew"
                )
            return
        try:
            count = unpack(self._archive, self._root)
        except OSError as error:
            self._say(f"{self._archive} cannot be unpacked ({error.strerror}): compiled anew")
        except DAMAGES as error:
            self._say(f"{self._archive} is damaged ({one_line(str(error))}), and ignored")
        else:
            self._say(f"{count} files of {self._archive.name} are in {self._root}")

    def keep_from_now_on(self) -> None:
        """Keeps now and then what was compiled, until this process ends: a job that loses a node has no end of its
        own."""

        def look() -> None:
            while True:
                time.sleep(KEEP_EVERY_S)
                self.keep(settled=True)

        threading.Thread(target=look, name="caches", daemon=True).start()

    def keep(self, settled: bool = False) -> None:
        """Writes the archive where it lacks something. `settled`: only if nothing was added since the last call."""
        if self._archive is None:
            return
        with self._keeping:
            try:
                now, before = contents_of(self._root), self._seen
                self._seen = now
                if now == self._done or (settled and now != before):
                    return
                # what cannot be kept is not tried again until there is more
                self._done = now
                if now.items() - contents_in(self._archive).items():
                    pack(self._root, now, self._archive, KEEP_LIMIT_S)
            except (NotKept, OSError) as error:
                self._say(f"it is not kept in {self._archive}: {error}")

    def _say(self, what: str) -> None:
        """Says the same only once."""
        if what != self._said:
            tell(f"Compiled code: {what}.")
        self._said = what


def place_caches(
    part: Part, attempt: int, run: Path, python: str, environment: MutableMapping[str, str], *, on_gpus: bool
) -> Caches | None:
    """Fills the caches of a task of a job, leads libraries to them by `environment`, and returns them; None where the
    job's first lines did not place them. `python` is the interpreter that compiles, `run` the run directory.

    Raises UserError where their directory is somebody else's, RunFailed where it cannot be made."""
    common = environment.get("TRITON_CACHE_DIR")
    if common is None or "SLURM_JOB_ID" not in environment:
        return None
    root = Path(common).parent / part
    for directory in (root.parent, root):
        _own(directory)
    versions = versions_of(packages_of(python), PACKAGES[part])
    device = gpu_name() if on_gpus else cpu_name()
    archive = None
    if versions and device:
        name = re.sub(r"[^\w.+-]+", "-", "_".join([part, *versions, device]))
        archive = run / CACHES / f"{name}.tar"
    caches = Caches(root, archive, f"{environment['SLURM_JOB_ID']} {attempt}")
    caches.fill()
    environment.update(cache_variables(str(root)))
    return caches


def _own(directory: Path) -> None:
    """Makes a directory that nobody else can write in."""
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise UserError(
                f"{directory} on {platform.node()} is somebody else's, and code that lies there would be run: set "
                "hardware.scratch to a directory where you alone can write."
            )
        directory.chmod(0o700)
    except OSError as error:
        raise RunFailed(
            f"{directory} on {platform.node()} cannot be made ({error.strerror}): set hardware.scratch to a directory "
            "of each node's own disk."
        ) from None


# What compiled code is for


def packages_of(python: str) -> list[str]:
    """Returns where an interpreter has its packages, without starting it."""
    if python == sys.executable:
        return sys.path
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        return []
    prefix = Path(found).absolute().parent.parent
    patterns = (
        "lib/python3*/site-packages",
        "lib/python3*/dist-packages",
        "local/lib/python3*/dist-packages",
    )
    return [str(path) for pattern in patterns for path in sorted(prefix.glob(pattern))]


def versions_of(path: Sequence[str], packages: Sequence[str]) -> list[str]:
    """Returns name and version of those of `packages` that are there; nothing where the first one is not."""
    found = {
        package: f"{package}-{distribution.version}"
        for package in packages
        for distribution in distributions(name=package, path=list(path))
    }
    return [found[package] for package in packages if package in found] if packages[0] in found else []


def cpu_name() -> str:
    """Returns what a compiler asks of the processor: its kind, and a digest of the instructions that it has."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def gpu_name() -> str:
    """Returns the model of this node's GPUs; empty where nobody says."""
    for file in sorted(GPUS.glob("*/information")):
        if model := re.search(r"^Model:\s*(.+?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE):
            return model[1]
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=NAME_LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else ""
