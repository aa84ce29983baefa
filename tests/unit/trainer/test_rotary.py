"""Rotary embedding against transformers' own of each type."""

import math
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Olmo3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from sdpo_megatron.models.rope import LinearRope, Llama3Rope, RopeScaling, YarnRope
from sdpo_megatron.models.shape import ModelShape, Sliding
from sdpo_megatron.trainer.attention import TreeParams
from sdpo_megatron.trainer.rotary import TreeRotary, rotary_frequencies

CPU = torch.device("cpu")
POSITIONS = torch.tensor([0, 1, 2, 900, 901, 5, 6, 10_000])
LLAMA3 = Llama3Rope(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
"""Llama 3.1's own: some wavelengths unchanged, some divided by 8, some between."""
YARN = YarnRope(factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0, beta_slow=1.0)
"""OLMo 3's own."""


def shape(scaling: RopeScaling | None, sliding: Sliding | None = None, **more: Any) -> ModelShape:
    return ModelShape(
        architecture="LlamaForCausalLM", layers=2, heads=4, kv_heads=2, head_dim=64, hidden=256, ffn=512, vocab=100,
        tie_embeddings=True, rope_theta=500_000.0, rope_scaling=scaling, rms_norm_eps=1e-5,
        max_positions=131_072, eos_ids=(2,), sliding=sliding, **more,
    )  # fmt: skip


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
}


LINEAR = LinearRope(factor=4.0)


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN], ids=["plain", "linear", "llama3", "yarn"])
def test_frequencies_and_angles_are_transformers(scaling: RopeScaling | None) -> None:
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    if scaling is not None:
        rope |= {"rope_type": scaling.rope_type, **vars(scaling)}
    reference = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=rope))
    own, factor = rotary_frequencies(shape(scaling))
    torch.testing.assert_close(own, reference.inv_freq, rtol=1e-6, atol=0.0)
    assert factor == reference.attention_scaling
    assert factor == (0.1 * math.log(8.0) + 1.0 if scaling is YARN else 1.0)
    cos, sin = reference(torch.zeros(1, 8, 256), POSITIONS[None])
    angles = TreeRotary(shape(scaling), CPU)(TreeParams(positions_S=POSITIONS, blocks=[], sliding_blocks=[]))
    assert angles.shape == (8, 1, 1, 64)
    torch.testing.assert_close(factor * angles[:, 0, 0].cos(), cos[0], rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(factor * angles[:, 0, 0].sin(), sin[0], rtol=1e-4, atol=2e-3)


def test_layers_with_a_window_have_the_plain_one() -> None:
    """As OLMo 3 in transformers, which keeps one of each kind."""
    settings: dict[str, Any] = {
        **{key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")},
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 500_000.0,
        "rope_scaling": {"rope_type": "yarn", **vars(YARN)},
    }
    config = Olmo3Config(**settings)
    reference = Olmo3RotaryEmbedding(config)
    rotary = TreeRotary(shape(YARN, Sliding(window=4096, layers=(0,))), CPU)
    angles = rotary(TreeParams(positions_S=POSITIONS, blocks=[], sliding_blocks=[]))
    assert angles.shape == (2, 8, 1, 1, 64)
    for own, kind in zip(angles, ("full_attention", "sliding_attention"), strict=True):
        frequencies = getattr(reference, f"{kind}_inv_freq")
        expected = torch.outer(POSITIONS.float(), frequencies)
        torch.testing.assert_close(own[:, 0, 0], torch.cat([expected, expected], -1), rtol=1e-6, atol=0.0)
    assert not torch.equal(angles[0], angles[1])


@pytest.mark.parametrize("scaling", [None, LINEAR], ids=["plain", "linear"])
def test_layers_with_a_window_have_a_base_of_their_own(scaling: RopeScaling | None) -> None:
    """As Gemma 3 in transformers."""
    full = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.rope_type, **vars(scaling)}
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": full | {"rope_theta": 500_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    reference = Gemma3RotaryEmbedding(config)
    own = shape(scaling, Sliding(window=4096, layers=(0,)), sliding_rope_theta=10_000.0)
    angles = TreeRotary(own, CPU)(TreeParams(positions_S=POSITIONS, blocks=[], sliding_blocks=[]))
    assert angles.shape == (2, 8, 1, 1, 64)
    for mine, kind in zip(angles, ("full_attention", "sliding_attention"), strict=True):
        expected = torch.outer(POSITIONS.float(), getattr(reference, f"{kind}_inv_freq"))
        torch.testing.assert_close(mine[:, 0, 0], torch.cat([expected, expected], -1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_scaling_matters(scaling: RopeScaling) -> None:
    plain, scaled = rotary_frequencies(shape(None))[0], rotary_frequencies(shape(scaling))[0]
    assert torch.equal(plain[:4], scaled[:4])
    assert torch.allclose(plain[-4:] / 8, scaled[-4:])
