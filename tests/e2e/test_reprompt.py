"""A run with another preset than the default: what its teacher reads, and what is said of it."""

import json
from typing import Any

from tests.e2e.running import assert_complete, run, tiny_settings
from tests.thinking_model import make_thinking_model, thinking_tokenizer

CLOSING = (
    "<|im_start|>user\nNow solve the original question correctly.<|im_end|>\n<|im_start|>assistant\n<think>\n"
)
OFTEN_RIGHT = {"</think>": 0.3, "4": 0.3, "<|im_end|>": 0.3, "7": 0.05, "\n": 0.05}


def test_the_recipe_with_random_demonstrations_and_attempts(stand_in, tmp_path):
    model = make_thinking_model(tmp_path / "model", thinking_tokenizer(special=True), OFTEN_RIGHT)
    problems = tmp_path / "problems.jsonl"
    lines = [{"prompt": f"What is {k} - {k - 4}?", "answer": "4"} for k in range(10, 18)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = tiny_settings(
        model,
        stand_in,
        tmp_path,
        run={"steps": 2},
        task={"env": "jsonl", "options": {"train_file": str(problems)}},
        # some of so many are right, however the server's dice fall
        rollout={"problems_per_step": 8, "group_size": 16, "max_tokens": 8},
        reprompt={"preset": "recipe", "solution": "random", "show_attempt": True},
        parallel={"tp": 2},
    )
    running = run(settings, tmp_path)
    assert_complete(running, 2)
    kinds = {"solution": 0, "both": 0, "feedback": 0}
    for response in [*running.responses(0), *running.responses(1)]:
        told = response.teacher_prompt
        if told is None:
            continue
        question, _, behind = told.partition("<|im_end|>\n<|im_start|>assistant\n")
        assert question.endswith("?") and behind.endswith(CLOSING)
        solution, feedback = "Correct solution:\n\n4" in behind, "feedback:" in behind
        assert solution or feedback
        assert feedback == (response.reward == 0)
        attempt = "That attempt was:\n\n" in behind
        # a response that ended in its thought has no answer to show
        assert attempt == (feedback and bool(response.response.strip()))
        kinds["both" if solution and feedback else "solution" if solution else "feedback"] += 1
    assert kinds["solution"] and kinds["both"], kinds
    first: dict[str, Any] = running.rows()[0]
    assert 0 <= first["teacher/unreached/all"] <= 1
    assert first["sdpo/teacher_shortened_count"] == first["sdpo/teacher_no_room_count"] == 0
    origins = json.loads((running.directory / "config.json").read_text())["origins"]
    assert origins["reprompt.own_success"] == "reprompt.preset"
    assert origins["reprompt.solution"].endswith("tiny.yaml")
