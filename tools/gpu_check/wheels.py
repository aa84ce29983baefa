"""What a machine without a network lacks: fetched as wheels where there is one, installed for one check there."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

FROM_HERE = (
    "megatron-core",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
)
"""Packages that are collected in the versions of the environment that collects them."""
BESIDE = ("liger-kernel==0.8.5",)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
MOST_BYTES = 60_000_000


def collect(directory: Path) -> int:
    """Collects wheels for Python 3.12 on x86-64, of exactly these packages, in `directory`."""
    if directory.exists() and any(directory.glob("*.whl")):
        sys.exit(
            f"error: {directory} holds wheels already, and two versions of one would not install; name another."
        )
    try:
        wanted = [f"{name}=={importlib.metadata.version(name)}" for name in FROM_HERE]
    except importlib.metadata.PackageNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed here; use the environment that trains (make .venv).")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--dest",
        str(directory),
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    if subprocess.run([*command, *wanted, *BESIDE]).returncode:
        sys.exit("error: pip could not fetch them; it said why above.")
    size = sum(file.stat().st_size for file in directory.glob("*.whl"))
    print(f"{len(list(directory.glob('*.whl')))} wheels, {size / 1e6:.1f} MB, in {directory}")
    if size > MOST_BYTES:
        sys.exit(f"error: that is more than {MOST_BYTES / 1e6:.0f} MB.")
    return 0


def install(directory: Path, site: Path) -> None:
    """Installs the wheels of `directory` into `site`, which comes first on every part's path."""
    wheels = sorted(map(str, directory.glob("*.whl")))
    if not wheels:
        sys.exit(f"error: {directory} holds no wheels; make them with --collect-wheels {directory}.")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site), *wheels]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip could not install the wheels of {directory}; it said why above.")
    sys.path.insert(0, str(site))
