from pathlib import Path

from sdpo_megatron.run_dir.endings import clear_endings, read_ending, write_ending


def test_what_a_rank_stated_is_read_back_until_it_is_cleared(tmp_path: Path):
    path = tmp_path / "rank_0.json"
    assert read_ending(path) is None
    write_ending(path, 1, "stopped: first")
    write_ending(path, 2, "error: ü\nlog")
    assert read_ending(path) == {"exit_code": 2, "message": "error: ü\nlog"}
    assert list(tmp_path.iterdir()) == [path]
    clear_endings(tmp_path)
    assert read_ending(path) is None
