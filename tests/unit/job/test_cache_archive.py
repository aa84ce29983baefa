"""Compiled code as one file: it comes back as it was, or not at all."""

import hashlib
import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from sdpo_megatron.job import cache_archive as module
from sdpo_megatron.job.cache_archive import DAMAGES, NotKept, contents_in, contents_of, pack, unpack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "scratch" / "trainer"
    for name, content in {
        "triton/AB/kernel.cubin": b"\0machine code" * 99,
        "flashinfer/.cache/flashinfer/90/.ninja_log": b"# ninja log v5\n",
        "inductor/xy/graph.py": b"print()\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def archive(root: Path, tmp_path: Path) -> Path:
    archive = tmp_path / "run" / "caches" / "trainer.tar"
    archive.parent.parent.mkdir()
    pack(root, contents_of(root), archive, 10)
    return archive


def files_in(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    other = tmp_path / "other"
    other.mkdir()
    return other


def test_what_is_kept_comes_back_with_its_times(root: Path, archive: Path, other: Path):
    assert unpack(archive, other) == 3
    assert files_in(other) == files_in(root) and contents_in(archive) == contents_of(other)
    # a build by ninja compares times
    kernel = "triton/AB/kernel.cubin"
    assert abs((other / kernel).stat().st_mtime - (root / kernel).stat().st_mtime) < 1e-3


def test_what_is_there_already_stays(archive: Path, other: Path):
    (other / "inductor/xy").mkdir(parents=True)
    (other / "inductor/xy/graph.py").write_text("newer")
    assert unpack(archive, other) == 3
    assert (other / "inductor/xy/graph.py").read_text() == "newer"
    assert (other / "triton/AB/kernel.cubin").is_file()


def test_locks_and_what_is_half_written_are_left_out(root: Path):
    before = contents_of(root)
    for name in (
        "torch_extensions/x/lock",
        "triton/AB/kernel.lock",
        "triton/AB/tmp.pid_1_2/kernel.cubin",
        ".unpacking-1/x",
        ".filled",
        ".filling.lock",
        "sglang/gpu_p2p_access_cache_for_0,1.json",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "link").symlink_to("/etc/passwd")
    assert contents_of(root) == before and len(before) == 3


def test_a_cut_archive_adds_nothing(archive: Path, other: Path):
    content = archive.read_bytes()
    for length in (0, 100, 511, 512, 1024, 2000, 3000):
        archive.write_bytes(content[:length])
        try:
            assert unpack(archive, other) < 3
        except DAMAGES:
            assert files_in(other) == {}
    archive.write_text("<html>not found</html>")
    with pytest.raises(DAMAGES):
        unpack(archive, other)
    assert contents_in(archive) == {} == contents_in(archive.with_name("none"))


def test_a_changed_byte_anywhere_changes_nothing_that_is_unpacked(root: Path, archive: Path, tmp_path: Path):
    content, right, drawn = archive.read_bytes(), set(files_in(root).values()), random.Random(0)
    for number in range(300):
        changed = bytearray(content)
        changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        archive.write_bytes(changed)
        target = tmp_path / f"target-{number}"
        target.mkdir()
        try:
            unpack(archive, target)
        except DAMAGES:
            assert list(target.iterdir()) == []
        assert set(files_in(target).values()) <= right
        assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("target")) == [
            "run",
            "scratch",
        ]


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside/__grp__x.json", "a/../../outside"])
def test_an_archive_that_would_write_elsewhere_writes_nothing(name: str, other: Path, tmp_path: Path):
    content = b"x"
    member = tarfile.TarInfo(name)
    member.size = 1
    member.pax_headers = {module.CHECKSUM: hashlib.sha256(content).hexdigest()}
    with tarfile.open(tmp_path / "evil.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DAMAGES):
        unpack(tmp_path / "evil.tar", other)
    assert list(other.iterdir()) == [] and not (tmp_path / "outside").exists()


def test_links_and_devices_are_refused(other: Path, tmp_path: Path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        member = tarfile.TarInfo("x")
        member.type, member.linkname = kind, "/etc/passwd"
        with tarfile.open(tmp_path / "evil.tar", "w") as tar:
            tar.addfile(member)
        with pytest.raises(ValueError, match="x is no file below it"):
            unpack(tmp_path / "evil.tar", other)
    assert list(other.iterdir()) == []


def test_what_is_too_large_or_slow_or_changes_leaves_the_last_archive(
    root: Path, archive: Path, other: Path, monkeypatch: pytest.MonkeyPatch
):
    before = archive.read_bytes()
    (root / "more").write_text("more")
    with pytest.raises(NotKept, match="more changes meanwhile"):
        pack(root, contents_of(root) | {"more": 99}, archive, 10)
    with pytest.raises(NotKept, match="takes longer than 0 s"):
        pack(root, contents_of(root), archive, 0)
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(NotKept, match="at most 0 are kept"):
        pack(root, contents_of(root), archive, 10)
    with pytest.raises(ValueError, match="it has more than"):
        unpack(archive, other)
    assert archive.read_bytes() == before and os.listdir(archive.parent) == [archive.name]


def test_what_a_killed_writer_left_is_removed(root: Path, archive: Path):
    (archive.parent / f".{archive.name}.0123").write_text("half")
    pack(root, contents_of(root), archive, 10)
    assert os.listdir(archive.parent) == [archive.name]


def test_tritons_own_lists_hold_in_another_directory(
    tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
):
    from triton.runtime.cache import FileCacheManager

    root = tmp_path / "scratch"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(root / "triton"))
    manager = FileCacheManager("KEY")
    manager.put_group("kernel.json", {"kernel.cubin": manager.put(b"code", "kernel.cubin")})
    (tmp_path / "run").mkdir()
    pack(root, contents_of(root), tmp_path / "run" / "a.tar", 10)
    unpack(tmp_path / "run" / "a.tar", other)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(other / "triton"))
    found = FileCacheManager("KEY").get_group("kernel.json")
    assert found == {"kernel.cubin": str(other / "triton/KEY/kernel.cubin")}
