import json
from pathlib import Path

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.metrics_file import MetricsFile, read_rows


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(3):
        file.append({"step": step, "a": step / 2})
    return path


def test_rows_are_on_the_disk_at_once(path: Path):
    assert read_rows(path) == [{"step": 0, "a": 0.0}, {"step": 1, "a": 0.5}, {"step": 2, "a": 1.0}]


def test_before_the_first_row_there_is_no_file(tmp_path: Path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_resumed_run_replaces_the_rows_it_makes_again(path: Path):
    file = MetricsFile(path, 1)
    assert steps(path) == [0]
    file.append({"step": 1, "a": 9})
    assert read_rows(path)[1] == {"step": 1, "a": 9}
    MetricsFile(path, 0)
    assert steps(path) == []


def test_a_torn_last_line_is_dropped(path: Path):
    with path.open("a") as file:
        file.write('{"step": 3, "a"')
    MetricsFile(path, 3).append({"step": 3})
    assert steps(path) == [0, 1, 2, 3]
    path.write_text(
        path.read_text()[:-1]
    )  # complete but for its newline: the crash came before fsync returned
    MetricsFile(path, 3)
    assert steps(path) == [0, 1, 2]


def test_every_step_once_in_order(path: Path):
    file = MetricsFile(path, 3)
    for wrong in (2, 4):
        with pytest.raises(ValueError, match=f"row of step {wrong}, but step 3 comes next"):
            file.append({"step": wrong})
    with pytest.raises(
        UserError, match=r"must hold the steps 0 to 3 once each, in order, to go on from step 4; rest"
    ):
        MetricsFile(path, 4)
    path.write_text(path.read_text() + json.dumps({"step": 2}) + "\n")
    with pytest.raises(UserError, match="must hold the steps 0 to 2 once each"):
        MetricsFile(path, 3)


def test_damage_is_named(path: Path):
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is damaged; restore it, or remove"):
        MetricsFile(path, 0)


def test_numbers_that_json_does_not_have(path: Path):
    MetricsFile(path, 3).append({"step": 3, "a": float("nan"), "b": float("-inf")})
    assert read_rows(path)[3] == {"step": 3, "a": None, "b": None}
    assert "NaN" not in path.read_text()
