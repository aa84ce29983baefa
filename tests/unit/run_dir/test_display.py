import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sdpo_megatron.run_dir.display import (
    RunDisplay,
    before_after,
    duration,
    print_summary,
    time_split,
    with_suites,
)

ROW = {
    "step": 3,
    "env/all/reward/total": 0.40625,
    "perf/trained_tokens_per_s": 412.3,
    "time/rollout": 10.0,
    "time/learn": 20.0,
    "time/push": 0.04,
    "time/rest": 0.5,
    "time/total": 30.5,
}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=200, highlight=False, soft_wrap=True), text


def test_one_line_per_step_where_there_is_no_terminal():
    screen, text = console(terminal=False)
    display = RunDisplay("demo", 20, 3, screen)
    display.phase(3, "rollout")
    display.row(ROW)
    display.row(ROW | {"step": 4, "test/exact_answer_prob": 0.5, "test/env/all/correct": 0.25})
    display.close()
    assert text.getvalue().splitlines() == [
        "step  3/20  reward 0.406  trained tokens/s 412  30.5 s (learn 20.0, rollout 10.0, rest 0.5)  left 8 min",
        "step  4/20  reward 0.406  held-out accuracy 0.250  exact answer prob 0.500  trained tokens/s 412  "
        "30.5 s (learn 20.0, rollout 10.0, rest 0.5)  left 8 min",
    ]


def test_the_start_of_the_server_comes_once_in_the_time_left():
    screen, text = console(terminal=False)
    slow = {"perf/trained_tokens_per_s": 41.23, "time/server_start": 300.0, "time/total": 330.0}
    RunDisplay("demo", 20, 3, screen).row(ROW | slow)
    assert "trained tokens/s 41.2  330.0 s (server_start 300.0" in text.getvalue()
    assert text.getvalue().rstrip().endswith("left 8 min")


def test_the_final_evaluation_has_no_time_left():
    screen, text = console(terminal=False)
    RunDisplay("demo", 20, 20, screen).row(ROW | {"step": 20})
    assert "left" not in text.getvalue()


def test_a_terminal_shows_step_phase_metrics_and_time_left():
    screen, text = console(terminal=True)
    display = RunDisplay("demo", 20, 3, screen)
    display.row(ROW | {"test/exact_answer_prob": 0.5, "test/env/all/correct": 0.25})
    display.phase(4, "teacher")
    text.truncate(0)
    screen.print(display._render())
    display.close()
    shown = text.getvalue()
    assert "demo" in shown and "step 4/20" in shown and "teacher 0 s" in shown
    assert (
        "reward 0.406   held-out accuracy 0.250   exact answer prob 0.500   trained tokens/s 412   left 8 min"
        in shown
    )


@pytest.mark.parametrize(
    "seconds, text", [(12.4, "12 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


def test_time_split_is_longest_first():
    assert time_split(ROW) == "learn 20.0, rollout 10.0, rest 0.5"


def test_before_and_after_are_the_first_and_last_values(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "test/exact_answer_prob": 0.224, "env/all/correct": 0.2},
        {"step": 1, "env/all/correct": 0.3},
        {"step": 2, "test/exact_answer_prob": 0.5, "env/all/correct": None},
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    screen, text = console(terminal=False)
    print_summary(metrics, screen)
    lines = text.getvalue().splitlines()
    exact = next(line for line in lines if "exact answer" in line)
    assert "0.224 (step 0)" in exact and "0.500 (step 2)" in exact and "+0.276" in exact
    correct = next(line for line in lines if "training: accuracy" in line)
    assert "0.200 (step 0)" in correct and "0.300 (step 1)" in correct
    assert lines[-1] == f"Run directory: {tmp_path}"


def test_a_run_without_rows_has_an_empty_table():
    assert before_after([]).row_count == 0


def test_numbers_are_whole_in_a_narrow_terminal():
    rows = [{"step": 0, "test/exact_answer_prob": 0.224}, {"step": 20, "test/exact_answer_prob": 0.5}]
    text = io.StringIO()
    Console(file=text, width=60).print(before_after(rows))
    assert "0.224 (step 0)" in text.getvalue() and "0.500 (step 20)" in text.getvalue()
    assert "+0.276" in text.getvalue()


def test_a_suites_accuracy_is_shown_by_its_name():
    labels = with_suites(
        {"loss": "loss"}, ["test/env/all/correct", "test_old/env/all/correct", "test_old/avg@1"]
    )
    assert labels == {"loss": "loss", "test_old/env/all/correct": "old accuracy"}
