"""A run on a real Slurm with the real SGLang, whose server is killed."""

from pathlib import Path

import numpy as np

from sdpo_megatron.run_dir.records_file import read_record
from tests.e2e.running import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.running import Submitted, assert_complete, job_settings
from tests.tiny_model import make_tiny_model

STEPS = 4


def submit_with_real_server(cluster: Cluster, directory: Path) -> Submitted:
    """One node trains, and one serves."""
    server_python = REPOSITORY / ".venv-sglang/bin/python"
    assert server_python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    model = make_tiny_model(directory / "model", "qwen3", tie_embeddings=False)
    settings = job_settings((model, server_python), directory, name="real", steps=STEPS)
    settings["server"]["start_timeout_s"] = 240.0
    settings["parallel"]["dp"] = 1
    return Submitted(cluster, directory, settings, nodes=2, memory_gb_per_node=6.0)


def kill_the_real_server(submitted: Submitted) -> None:
    submitted.wait_for_phase("learn", 2)
    victims = submitted.server("sglang")
    assert len(victims) > 1
    for victim in victims:
        victim.kill()


def check_what_it_cost(submitted: Submitted) -> None:
    submitted.end()
    assert_complete(submitted, STEPS)
    first, *others = submitted.attempts()
    assert (first["why"], first["reason"]) == ("failed", "server0: The server ended; see its log."), (
        submitted.attempts()
    )
    assert first["steps"] >= 2 and [attempt["why"] for attempt in others] == ["finished"]
    # a step whose push the lost server cut short is saved all the same
    proven = [row for row in submitted.rows()[:STEPS] if "push/proven" in row]
    assert len(proven) >= STEPS - 1
    for row in proven:
        assert row["push/canary_gap/high"] < 1e-4 and row["push/proven"] == 1, row
        assert row["rollout_gap/max"] < 2e-3, (
            row["step"],
            gaps(submitted, row["step"]),
            submitted.attempts(),
        )


def gaps(submitted: Submitted, step: int) -> list[list[float]]:
    """Returns, of each response, what server and trainer differ by at each of its tokens."""
    responses = read_record(submitted.run / "rollouts" / "train" / f"{step:06d}.jsonl")
    return [
        (np.asarray(response.student_logprobs_T) - np.asarray(response.rollout_logprobs_T)).tolist()
        for response in responses
    ]
