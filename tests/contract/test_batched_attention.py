"""The attention of SGLang on a CPU, beside its definition: SGLang's torch_native."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from sdpo_megatron.launch.server import BATCHED_ATTENTION, CPU_ENVIRONMENT

REPOSITORY = Path(__file__).parents[2]
OTHERWISE = (
    ": leave that out, or take a slower one by server.args=[--attention-backend,torch_native] if that computes "
    "it"
)


@pytest.fixture(scope="module")
def report() -> dict:
    python = REPOSITORY / ".venv-sglang/bin/python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make .venv-sglang`")
    done = subprocess.run(
        [python, Path(__file__).with_name("attention_cases.py")],
        env=os.environ | CPU_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("REPORT "))


def test_it_is_torch_natives(report: dict):
    """Batches of one token each, of new prompts, behind prefixes, in pieces; any number and size of heads; windows that
    cut what the batch has."""
    for case, difference in report["differences"].items():
        assert difference < (2e-6 if "float32" in case else 2e-2), (case, difference)
    assert len(report["differences"]) == 40 + 15


def test_memory_is_bounded(report: dict):
    """32,000 tokens of a prompt, and 500 behind 30,000, beside short ones."""
    pieces = report["pieces"]
    assert pieces["tokens"] == 32_000 + 500 + 40 * 20
    assert pieces["scores"] <= 2**22
    assert 0 < pieces["positions of several"] <= 2048
    assert pieces["pieces"] < 300


def test_other_attention_is_refused_at_the_start(report: dict):
    what = {
        "cross": "attn with cross attention",
        "encoder": "attn with attention of type encoder_only",
        "capped": "attn with scores capped at 30.0",
        "forgetful": "a cache that forgets what is behind a sliding window",
        "mla": "multi-head latent attention (MLA)",
        "pages": "--page-size 16",
        "speculative": "speculative decoding",
    }
    prefix = f"--attention-backend {BATCHED_ATTENTION} does not compute "
    assert report["refusals"] == {name: f"{prefix}{words}{OTHERWISE}" for name, words in what.items()}


def test_an_sglang_of_other_interfaces_is_named(report: dict):
    assert report["other interface"] == (
        "error: sglang's KVWriteLoc has no parameter page, which batched_attention.py relies on: "
        "install the version that sglang_on_cpu.py names"
    )


def test_tokens_are_drawn_in_the_form_in_which_sglang_takes_them(report: dict):
    assert report["drawn"] == [1, 2]
