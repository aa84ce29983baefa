"""Other losses, layouts and servers through the whole command line, on the stand-in."""

import re

from tests.e2e.running import assert_complete, run, start, tiny_settings


def test_grpo_over_two_data_parallel_ranks_with_a_server_of_ones_own(
    a_server, tiny_model, stand_in, tmp_path
):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(f'{{"prompt": "Say {letter}.", "answer": "{letter}"}}\n' for letter in "abcdefgh")
    )
    settings = tiny_settings(
        tiny_model(),
        stand_in,
        tmp_path,
        run={"steps": 2},
        task={"env": "jsonl", "options": {"train_file": str(problems), "test_file": str(problems)}},
        loss={"name": "grpo"},
        server={"urls": [a_server(tiny_model(), "float32")]},
        optimizer={"mini_batches": 2},
        rollout={"problems_per_step": 4},
        parallel={"dp": 2, "share_prefixes": False},
    )
    running = run(settings, tmp_path)
    assert_complete(running, 2)
    assert not (running.directory / "servers" / "0.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, stand_in, tmp_path):
    settings = tiny_settings(tiny_model(), stand_in, tmp_path, optimizer={"lr": 1e30})
    running = start(settings, tmp_path)
    assert running.end() == 1
    out = running.output()
    assert re.search(r"stopped: The (loss|gradient) is (inf|nan) at step \d on rank 0", out), out
    assert "Traceback" not in out
