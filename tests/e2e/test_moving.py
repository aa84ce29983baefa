"""A model that was converted, trained, and converted back: who computes with it computes the same."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_megatron.models.pretrained import resolve_model_path
from tests.distributed.conftest import make_samples
from tests.distributed.test_checkpoint import train
from tests.e2e.agreeing import by_sglang, by_trainer, by_transformers, sglang
from tests.ranks import run_ranks

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


def test_transformers_sglang_and_the_trainer_agree(
    exported: dict[str, Path],
) -> None:
    """On the policy and on the moving average that taught it, which both are other than what training began with."""
    initial, *rest = (by_transformers(directory, IDS) for directory in exported.values())
    with sglang(exported["policy"]) as server:
        for (whose, directory), expected in zip(list(exported.items())[1:], rest, strict=True):
            assert (expected - initial).abs().max() > 0.05, whose
            for found in (by_trainer(directory, IDS), by_sglang(server, directory, IDS)):
                torch.testing.assert_close(found, expected, atol=APART, rtol=0)
    assert (rest[0] - rest[1]).abs().max() > 0.02
