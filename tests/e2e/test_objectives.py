"""One of each objective, and each kind of teacher once, through a real SGLang server that serves them all in turn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.config import ServerSettings
from sdpo_megatron.files import write_private
from sdpo_megatron.launch.server import ServedModel, ServerProcess
from tests.e2e.running import REPOSITORY, assert_complete, run, tiny_settings
from tests.small_server import MEMORY

RUNS: dict[str, dict[str, Any]] = {
    "token": {"loss": {"name": "token"}, "teacher": {"name": "ema"}},
    "sequence": {"loss": {"name": "sequence", "is_clip": 2.0}, "optimizer": {"mini_batches": 2}},
    "reverse-kl": {"loss": {"alpha": 1.0}, "teacher": {"name": "trust_region"}},
    "jsd": {"loss": {"alpha": 0.5}, "teacher": {"name": "live"}},
    "top-k": {"loss": {"alpha": 1.0, "top_k": 20}, "parallel": {"pp": 2}},
    "grpo": {"loss": {"name": "grpo"}, "teacher": {"name": "off"}},
}


@pytest.fixture(scope="module")
def sglang(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The settings of runs that use it."""
    python = REPOSITORY / ".venv-sglang/bin/python"
    assert python.exists(), "SGLang's environment is missing: run `make .venv-sglang`"
    model = ServedModel(
        path=tiny_model(),
        dtype="float32",
        device="cpu",
        context_length=512,
        max_responses=4,
        memory=MEMORY,
        seed=0,
    )
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    server = ServerProcess(ServerSettings(python=str(python)), model, log)
    server.start()
    server.wait_healthy()
    key = log.with_name("key")
    write_private(key, server.api_key)
    yield {"urls": [server.url], "api_key_file": str(key)}
    server.stop()


@pytest.mark.parametrize("name", RUNS)
def test_two_steps(
    name: str, sglang: dict[str, Any], tiny_model: Callable[..., Path], stand_in: Path, tmp_path: Path
) -> None:
    sections = {"run": {"steps": 2, "name": name}, "server": sglang, **RUNS[name]}
    running = run(tiny_settings(tiny_model(), stand_in, tmp_path, **sections), tmp_path)
    assert_complete(running, 2)
    for row in running.rows()[:2]:
        assert row["push/canary_gap/high"] < 1e-4 and row["push/proven"] == 1
        if name != "grpo":  # a model that knows nothing earns no reward to compare
            assert row["rollout_gap/max"] < 2e-3
            assert row["perf/trained_tokens"] > 0 and row["optim/grad_norm"] > 0
            assert row["sdpo/mean_advantage"] != 0
        if "sdpo/divergence/mean" in row:
            assert row["sdpo/divergence/p99"] >= row["sdpo/divergence/p50"] > 0
