"""Ten steps of a model that thinks: what was graded, shown, recorded and learned from."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.running import Running, assert_complete, run, tiny_settings
from tests.thinking_model import make_thinking_model, thinking_tokenizer

STEPS = 10


def ten_steps(model: Path, server_python: Path, directory: Path, **sections) -> Running:
    problems = directory / "problems.jsonl"
    lines = [{"prompt": f"What is {k} - {k - 4}?", "answer": "4", "canonical": True} for k in range(10, 18)]
    problems.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = tiny_settings(
        model,
        server_python,
        directory,
        run={"steps": STEPS},
        task={"env": "jsonl", "options": {"train_file": str(problems), "test_file": str(problems)}},
        rollout={"group_size": 8, "max_tokens": 8},
        optimizer={"lr": 1e-5},
        eval={"every": 5, "problems": 4},
        checkpoint={"every": STEPS},
        **sections,
    )
    return run(settings, directory)


def expected(text: str) -> tuple[str, bool]:
    """The answer in `text`, which has the marker that the prompt may have opened, and whether it is one."""
    behind = re.sub("<think>.*?</think>", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    return ("", False) if "<think>" in behind else (behind.strip(), True)


def check(running: Running, model: Path) -> dict[str, int]:
    """Compares every record with what its ids say; counts what there was."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    counts = {"right": 0, "wrong": 0, "thinking": 0, "shown": 0, "told": 0}
    for step in range(STEPS):
        responses = running.responses(step)
        for response in responses:
            assert response.prompt_ids is not None and response.response_ids_T is not None
            prompt, ids = response.prompt_ids.tolist(), response.response_ids_T.tolist()
            opened = tokenizer.decode(prompt).endswith("<think>\n")
            tokens = len(ids)
            if ids[-1] == tokenizer.eos_token_id:
                ids.pop()
            answer, finished = expected("<think>" * opened + tokenizer.decode(ids))
            assert response.response.strip() == answer
            assert response.reward == float(answer == "4")
            assert (response.finish_reason == "thinking") == (not finished)
            assert "<think>" not in response.thought and "</think>" not in response.thought
            counts["right" if response.reward else "wrong" if finished else "thinking"] += 1
            if not finished:
                said = f"No answer came: the response ended after {tokens} tokens, inside its thought."
                assert response.feedback == said
            # the whole response is learned from
            assert response.loss_mask_T is not None and response.loss_mask_T.tolist() == [1] * tokens
            told = response.teacher_prompt
            if told is None:
                continue
            assert response.teacher_logprobs_T is not None and response.teacher_prompt_ids is not None
            assert len(response.teacher_logprobs_T) == tokens == response.teacher_tokens
            assert told == tokenizer.decode(response.teacher_prompt_ids.tolist())
            assert tokenizer.decode(prompt).endswith("<think>\n") == told.endswith("<think>\n")
            if "Correct solution" in told:
                counts["shown"] += 1
                assert "Correct solution:\n\n4\n\n" in told
            else:
                counts["told"] += 1
                assert response.feedback in told
        assert running.rows()[step]["optim/grad_norm"] > 0
        unfinished = sum(r.finish_reason == "thinking" for r in responses) / len(responses)
        assert running.rows()[step]["env/all/unfinished_thought_fraction"] == pytest.approx(unfinished)
    return counts


def test_ten_steps_with_a_template_that_opens_the_thought(stand_in, tmp_path):
    model = make_thinking_model(tmp_path / "model", thinking_tokenizer(special=True))
    running = ten_steps(model, stand_in, tmp_path)
    assert_complete(running, STEPS)
    counts = check(running, model)
    assert sum(counts[name] for name in ("right", "wrong", "thinking")) == STEPS * 2 * 8
    assert min(counts.values()) > 0, counts
    first = running.rows()[0]
    assert 0 < first["test/env/all/unfinished_thought_fraction"] < 1
    # where the prompt began a thought, an answer right behind it is none
    assert "test/exact_answer_prob" not in first
