"""A model that was converted, trained, and converted back: who computes with it computes the same."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.rollout.client import Client
from tests.distributed.conftest import make_samples
from tests.distributed.test_checkpoint import train
from tests.e2e.running import REPOSITORY
from tests.ranks import run_ranks
from tests.small_server import MEMORY

IDS = [1, *range(300, 340)]
APART = 1e-4
"""Nats."""


@pytest.fixture(scope="module")
def exported(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policy and teacher after two steps on six ranks from a directory of megatron-core's, and what they began with."""
    work = tmp_path_factory.mktemp("moving")
    run_ranks(1, "tests.distributed.converting:to_megatron", str(tiny_model("qwen3")), str(work / "m"), 1, 1)
    model = resolve_model_path(str(work / "m"), work / "cache")
    samples = work / "samples.json"
    samples.write_text(json.dumps([asdict(sample) for sample in make_samples()]))
    layout, teacher = {"tp": 3, "pp": 2}, {"name": "ema", "ema_rate": 0.5}
    # learning of which the average shows
    optimizer = {"lr": 1e-3, "warmup_steps": 0}
    train(model, samples, layout, [0, 1], save=work / "run", teacher=teacher, optimizer=optimizer)
    with redirect_stdout(io.StringIO()):
        run_ranks(
            1, "tests.distributed.converting:of_a_run", str(model), str(work / "run"), "float32", str(work)
        )
    return {"initial": model, "policy": work / "policy", "teacher": work / "teacher"}


@pytest.fixture(scope="module")
def server(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    python = REPOSITORY / ".venv-sglang/bin/python"
    assert python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    served = ServedModel(
        path=exported["policy"],
        dtype="float32",
        device="cpu",
        context_length=512,
        max_responses=16,
        memory=MEMORY,
        seed=1,
    )
    process = ServerProcess(
        ServerSettings(python=str(python)), served, tmp_path_factory.mktemp("server") / "log"
    )
    process.start()
    try:
        process.wait_healthy()
        yield process
    finally:
        process.stop()


def by_transformers(directory: Path) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        table = network(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return _of_tokens(table)


def by_trainer(directory: Path, work: Path) -> torch.Tensor:
    out = work / "logits.safetensors"
    run_ranks(1, "tests.distributed.weights:logits", str(directory), IDS, str(out), {})
    vocabulary = read_model_shape(directory).vocab
    return _of_tokens(load_file(out)["logits"][:, :vocabulary].log_softmax(-1))


def _of_tokens(table: torch.Tensor) -> torch.Tensor:
    return table[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def by_sglang(server: ServerProcess, directory: Path) -> torch.Tensor:
    """From the files in `directory`."""
    done = httpx.post(
        f"{server.url}/update_weights_from_disk",
        json={"model_path": str(directory)},
        headers={"Authorization": f"Bearer {server.api_key}"},
        timeout=120.0,
    )
    assert done.is_success and done.json()["success"], done.text
    return torch.tensor(Client(server.url, server.api_key, 120.0).prompt_logprobs(IDS))


def test_transformers_sglang_and_the_trainer_agree(
    exported: dict[str, Path], server: ServerProcess, tmp_path: Path
) -> None:
    """On the policy and on the moving average that taught it, which both are other than what training began with."""
    initial, *rest = (by_transformers(directory) for directory in exported.values())
    for (whose, directory), expected in zip(list(exported.items())[1:], rest, strict=True):
        assert (expected - initial).abs().max() > 0.05, whose
        torch.testing.assert_close(by_trainer(directory, tmp_path), expected, atol=APART, rtol=0)
        torch.testing.assert_close(by_sglang(server, directory), expected, atol=APART, rtol=0)
    assert (rest[0] - rest[1]).abs().max() > 0.02
