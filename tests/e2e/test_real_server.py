"""Two real steps: launcher, two pipeline ranks, real SGLang, real weight pushes; then what stays behind the run."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import yaml
from tests.e2e.running import REPOSITORY, assert_complete, run, tiny_settings


@pytest.mark.parametrize("family", ["olmo3", "qwen3_moe"])
def test_two_steps_and_what_they_leave_behind(family, tiny_model, tmp_path):
    server_python = REPOSITORY / ".venv-sglang/bin/python"
    assert server_python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    settings = tiny_settings(
        tiny_model(family, tie_embeddings=False),
        server_python,
        tmp_path,
        run={"steps": 2},
        server={"start_timeout_s": 240.0},
        parallel={"pp": 2},
        checkpoint={"every": 2, "export_hf": True},
        log={"tensorboard": True, "wandb": "offline"},
    )
    running = run(settings, tmp_path)
    assert_complete(running, 2)
    rows = running.rows()
    for row in rows[:2]:
        assert (
            row["push/canary_gap/high"] < 1e-4 and row["push/proven"] == 1 and row["rollout_gap/max"] < 2e-3
        )
        assert row["perf/trained_tokens"] > 0 and row["optim/grad_norm"] > 0
        phases = {key for key in row if key.startswith("time/")}
        assert phases >= {f"time/{p}" for p in ("rollout", "teacher", "learn", "push", "rest", "total")}
    assert rows[0]["test/exact_answer_prob"] != rows[2]["test/exact_answer_prob"]

    for step in range(2):
        responses = running.responses(step)
        assert len(responses) == 4
        for response in responses:
            assert response.response_ids_T is not None
            tokens = len(response.response_ids_T)
            assert {span.version for span in response.weight_spans} == {step}
            assert "Feedback" in str(response.teacher_prompt)
            for name in ("rollout", "student", "teacher"):
                assert len(getattr(response, f"{name}_logprobs_T")) == tokens
            taught_T, said_T, gaps_T = (
                np.asarray(getattr(response, f"{name}_T"))
                for name in ("teacher_logprobs", "student_logprobs", "advantages")
            )
            np.testing.assert_allclose(taught_T - said_T, gaps_T, atol=1e-6)
    assert len(running.responses(2, "eval")) == 2

    config = json.loads((running.directory / "config.json").read_text())
    assert config["origins"]["parallel.pp"] == str(tmp_path / "tiny.yaml")
    assert config["origins"]["loss.clip_low"] == "default"
    assert list((running.directory / "tensorboard").iterdir())
    assert yaml.safe_load((tmp_path / "tiny.yaml").read_text()) == settings

    exported = AutoModelForCausalLM.from_pretrained(running.directory / "hf", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32)
    assert not torch.equal(exported.lm_head.weight, before.lm_head.weight)
    # the log-probabilities that the server gave for the last rollouts are not those of the initial weights
    response = running.responses(1)[0]
    assert response.prompt_ids is not None and response.response_ids_T is not None
    ids = torch.tensor([[*response.prompt_ids.tolist(), *response.response_ids_T.tolist()]])
    with torch.no_grad():
        logprobs = before(ids).logits[0].log_softmax(-1)
    first = len(response.prompt_ids)
    initial_T = torch.tensor(
        [logprobs[first + t - 1, ids[0, first + t]] for t in range(ids.shape[1] - first)]
    )
    assert (initial_T - torch.from_numpy(response.rollout_logprobs_T)).abs().max() > 1e-3
