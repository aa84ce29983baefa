from pathlib import Path

import pytest

from sdpo_megatron import files
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.files import expand_user, write_atomically


@pytest.mark.parametrize("durable", [True, False])
def test_replaces_the_content(tmp_path: Path, durable: bool):
    file = tmp_path / "a"
    file.write_text("old and longer")
    write_atomically(file, "né\n", durable=durable)
    assert file.read_text(encoding="utf-8") == "né\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a"
    file.write_text("old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_variable_in_a_path_is_no_name_of_a_directory():
    with pytest.raises(ConfigError, match=r"run\.dir is \$HOME/runs: variables are not filled in there"):
        expand_user("$HOME/runs", "run.dir")
