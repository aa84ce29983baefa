"""A run of a tiny model, made once, and how a tool is called within this process."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from sdpo_megatron.terminal import reported
from tests.distributed.conftest import make_samples
from tests.ranks import run_ranks

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="package")
def trained(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of an untied Qwen3 in bfloat16 on three tensor-parallel ranks, which do not divide its
    vocabulary: its checkpoint of step 2, and what the trainer exported then, `policy` and `teacher`."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run.mkdir()
    samples = run / "samples.json"
    samples.write_text(json.dumps([asdict(sample) for sample in make_samples()]))
    model = tiny_model("qwen3", tie_embeddings=False)
    run_ranks(3, "tests.tools.trained:save_and_export", str(model), str(samples), str(run), {"tp": 3})
    return run


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`tool("hash_weights", "A", "B")`: exit code, output and errors."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = reported(module.main)
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
