"""Each family against transformers, in each layout, in float32 and bfloat16: logits, and a learning step's gradients.

The last test prints the table that the README has.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from sdpo_megatron.models.families import FAMILIES
from tests.distributed.conftest import VOCABULARY, make_samples
from tests.distributed.plain import Expected
from tests.distributed.test_learning import compare, expect, read_gradients
from tests.families import BESIDE_SIZES, MODEL_TYPES, YARN, save_tiny
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 1": {},
    "TP 2": {"tp": 2},
    "PP 2": {"pp": 2},
    "TP 2 x PP 2": {"tp": 2, "pp": 2, "sequence_parallel": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama, a key-value head per head, tied": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "Llama: linear rope, tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    },
    "Llama 3.1: its rope, untied": {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "Mistral, heads of their own size": {"model_type": "mistral", "head_dim": 48},
    "Qwen2: biases, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen2: YaRN": {"model_type": "qwen2", "rope_parameters": YARN | {"rope_theta": 1e6}},
    "Qwen3: norms per head, tied": {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True},
    "Qwen3: YaRN": {"model_type": "qwen3", "head_dim": 64, "rope_parameters": YARN | {"rope_theta": 1e6}},
    "Qwen3-MoE: two of five experts": {"model_type": "qwen3_moe", "head_dim": 64},
    "Qwen3-MoE: three of four experts, not normalised": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "OLMo 2, a key-value head per head": {"model_type": "olmo2", "num_key_value_heads": 4},
    "OLMo 2, tied": {"model_type": "olmo2", "tie_word_embeddings": True},
    "OLMo 3: windows, YaRN where there is none": {"model_type": "olmo3"},
    "Gemma 3: windows, linear rope where there is none": {
        "model_type": "gemma3_text",
        "head_dim": 48,
        "tie_word_embeddings": True,
    },
    "Gemma 3: windows, no rope scaled": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN_ROPES,
    },
}
"""Four layers, four heads, two key-value heads, untied, unless they say else."""
LOGIT_TOLERANCE = 1e-4
ROUNDING = 1.25
"""The error of bfloat16, its mean over all logits, in that of transformers in bfloat16."""
IDS = torch.randint(VOCABULARY, (64,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_family_has_its_row_here_and_in_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"\n| {name} |" in text for name in MODELS)
    assert {settings["model_type"] for settings in MODELS.values()} == set(MODEL_TYPES)
    assert len(FAMILIES) == len(MODEL_TYPES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: _save(root / str(n), **MODELS[name]) for n, name in enumerate(MODELS)}


def _save(directory: Path, model_type: str, **settings: Any) -> Path:
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"tie_word_embeddings": False, "initializer_range": 0.08, "dtype": "float32"},
        **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None},
    }
    config = AutoConfig.for_model(model_type, **(sizes | BESIDE_SIZES.get(model_type, {}) | settings))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:  # norms and biases are all ones and zeros otherwise
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return save_tiny(network, directory)


@pytest.fixture(scope="module")
def wanted(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Of each model transformers' logits of IDS in each type, and a learning step in float64."""
    found: dict[str, dict[str, Any]] = {}
    for name, directory in models.items():
        step = expect(directory, make_samples())
        found[name] = {
            "step": step,
            "float32": _logits(directory, "float32"),
            "bfloat16": _logits(directory, "bfloat16"),
        }
    return found


@torch.no_grad()
def _logits(directory: Path, dtype: str) -> Tensor:
    network = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
    )
    return network(torch.tensor([IDS])).logits[0].float()


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], tuple[float, float, float]]:
    """(model, layout) -> largest difference of a logit, largest of a gradient in the largest of its tensor, and the
    mean error in bfloat16 in transformers' own."""
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_model_is_transformers(
    layout: str,
    models: dict[str, Path],
    wanted: dict[str, dict[str, Any]],
    measured: dict[tuple[str, str], tuple[float, float, float]],
    samples: Path,
    tmp_path: Path,
) -> None:
    settings = LAYOUTS[layout]
    ranks = settings.get("tp", 1) * settings.get("pp", 1)
    results: dict[str, Any] = {}
    # tensor-parallel ranks train experts with the sequence split alone
    for split in (False, True):
        named = {
            str(n): str(models[name])
            for n, name in enumerate(MODELS)
            if ("experts" in name and "tp" in settings) == split
        }
        own = settings | ({"sequence_parallel": True} if split else {})
        arguments = (named, IDS, str(samples), str(tmp_path), own)
        results |= run_ranks(ranks, "tests.distributed.parity:compute", *arguments, timeout_s=300.0)[0]
    for n, name in enumerate(models):
        place, expected = tmp_path / str(n), wanted[name]
        (gradients,) = read_gradients(place / "gradients")
        logits = {
            dtype: load_file(place / f"{dtype}.safetensors")["logits"].float()
            for dtype in ("float32", "bfloat16")
        }
        row = _differences(logits, gradients, expected)
        measured[name, layout] = row
        assert expected["float32"].abs().max() > 1.0, name  # so that the bound below says something
        assert row[0] <= LOGIT_TOLERANCE and row[2] <= ROUNDING, (name, row)
        compare(results[str(n)], gradients, expected["step"])
        # what tensor-parallel ranks share out counts whole, what they all hold once
        norm = torch.stack([g.norm() for g in expected["step"].gradients.values()]).norm()
        assert results[str(n)]["metrics"]["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4), name


def _differences(
    logits: dict[str, Tensor], gradients: dict[str, Tensor], wanted: dict[str, Any]
) -> tuple[float, float, float]:
    step: Expected = wanted["step"]
    exact = wanted["float32"]
    own, theirs = ((x["bfloat16"] - exact).abs().mean() for x in (logits, wanted))
    return (
        float((logits["float32"] - exact).abs().max()),
        max(
            float((gradients[k].double() - g).abs().max() / g.abs().max()) for k, g in step.gradients.items()
        ),
        float(own / theirs),
    )


def test_a_norm_over_the_heads_of_one_rank_is_not_parity(
    models: dict[str, Path], wanted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Megatron's own placement: OLMo's norm over all heads needs the other ranks' squares."""
    name, out = "OLMo 2, tied", tmp_path / "logits.safetensors"
    run_ranks(2, "tests.distributed.parity:norm_each_rank_alone", str(models[name]), IDS, str(out))
    difference = (load_file(out)["logits"] - wanted[name]["float32"]).abs().max()
    assert difference > 100 * LOGIT_TOLERANCE


def test_the_table(
    measured: dict[tuple[str, str], tuple[float, float, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits, gradients, bfloat16, of each layout."""
    if len(measured) < len(MODELS) * len(LAYOUTS):
        pytest.skip("not all layouts were selected")
    with capsys.disabled():
        print("\n| model | " + " | ".join(LAYOUTS) + " |\n|---|" + "---|" * len(LAYOUTS))
        for name in MODELS:
            cells = ("{:.0e}, {:.0e}, {:.2f}".format(*measured[name, layout]) for layout in LAYOUTS)
            print(f"| {name} | " + " | ".join(cells) + " |")
