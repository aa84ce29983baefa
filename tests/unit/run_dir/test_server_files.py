"""A server's key between launcher and rank 0."""

from pathlib import Path

import pytest

from sdpo_megatron.run_dir.server_files import ServerFiles


def test_a_key_is_for_its_owner_and_is_taken_once(tmp_path: Path):
    files = ServerFiles(tmp_path)
    files.give_key(0, "s3cret")
    assert (tmp_path / "0.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):  # nobody can lay a file there that he may read
        files.give_key(0, "s3cret")
    assert files.take_key(0) == "s3cret"
    assert list(tmp_path.iterdir()) == []
    files.remove_key(0)  # harmless
