"""Which file system a path is on, by mounts as other machines have them."""

from pathlib import Path

import pytest

from sdpo_megatron.doctor import file_systems
from sdpo_megatron.doctor.file_systems import FileSystem, file_system_of, nearest_existing


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mounts at directories of tmp_path, which are made: `mounts("home nfs4 rw", ...)`."""

    def make(*lines: str) -> Path:
        text = "/dev/vda / ext4 rw,relatime 0 0\n"
        for line in lines:
            point, kind, options = line.split(" ")
            (tmp_path / point.replace("\\040", " ")).mkdir(parents=True, exist_ok=True)
            text += f"source {tmp_path}/{point} {kind} {options} 0 0\n"
        (tmp_path / "mounts").write_text(text)
        monkeypatch.setattr(file_systems, "MOUNTS", tmp_path / "mounts")
        return tmp_path

    return make


def test_the_innermost_and_last_mount_counts(mounts):
    root = mounts(
        "home nfs4 rw", "home/scratch xfs rw,noexec", "hom tmpfs rw", "over ext4 rw", "over lustre rw"
    )
    (root / "homely").mkdir()
    assert file_system_of(root / "home/me/runs") == FileSystem(
        point=f"{root}/home", kind="nfs4", options=("rw",)
    )
    assert file_system_of(root / "home/scratch").options == ("rw", "noexec")
    # the name of a mount is no prefix of another directory's
    assert file_system_of(root / "homely").point == "/"
    assert file_system_of(root / "over/x").kind == "lustre"


def test_links_are_followed_and_spaces_read(mounts):
    root = mounts("with\\040space beegfs rw")
    (root / "link").symlink_to(root / "with space")
    assert file_system_of(root / "link/runs").point == f"{root}/with space"
    assert nearest_existing(root / "link/a/b") == root / "with space"


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("ext4", "local"),
        ("xfs", "local"),
        ("overlay", "local"),
        ("fuseblk", "local"),
        ("tmpfs", "memory"),
        ("nfs", "network"),
        ("gpfs", "network"),
        ("lustre", "network"),
        ("fuse.sshfs", "network"),
        ("fuse", "network"),
    ],
)
def test_kinds(kind, place):
    assert FileSystem(point="/", kind=kind, options=()).place == place


def test_this_machines_own():
    assert file_system_of(Path("/proc/self")).kind == "proc"
    assert file_system_of(Path("/no/such/place")).kind != "unknown"
