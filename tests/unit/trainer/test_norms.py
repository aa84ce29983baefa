"""What Gemma 3 rounds, and what it does not: in the mean error of a model's logits either is lost."""

from types import SimpleNamespace

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.model import embedding_scale
from sdpo_megatron.trainer.norms import RMSNorm


def test_a_norm_of_one_plus_weight_is_transformers_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    config = SimpleNamespace(
        params_dtype=torch.bfloat16, sequence_parallel=True, layernorm_zero_centered_gamma=True
    )
    own, theirs = RMSNorm(config, 640, eps=1e-6), Gemma3RMSNorm(640, eps=1e-6).bfloat16()
    with torch.no_grad():
        weight = 0.2 * torch.randn(640, generator=generator)
        x = torch.randn(100, 640, generator=generator).bfloat16()
        for norm in (own, theirs):
            norm.weight.copy_(weight)
        found, expected = own(x), theirs(x)
    assert found.dtype == torch.bfloat16
    assert (found != expected).float().mean() < 1e-3
    # its gradient is one of tokens that are spread over ranks
    assert own.weight.sequence_parallel  # type: ignore[attr-defined]


def test_the_embedding_s_factor_is_rounded_to_the_model_s_type():
    for dtype in (torch.float32, torch.bfloat16):
        scale = embedding_scale(shape("Gemma3ForCausalLM"), dtype)
        theirs = Gemma3TextScaledWordEmbedding(1000, 640, 0, embed_scale=640**0.5).to(dtype)
        with torch.no_grad():
            assert torch.equal(theirs.weight * scale, theirs(torch.arange(1000)))
    assert scale == 25.25
    assert embedding_scale(shape("LlamaForCausalLM"), torch.bfloat16) == 1.0


def shape(architecture: str) -> ModelShape:
    return ModelShape(
        architecture=architecture, layers=18, heads=4, kv_heads=1, head_dim=256, hidden=640, ffn=2048, vocab=262_144,
        tie_embeddings=True, rope_theta=1e6, rope_scaling=None, rms_norm_eps=1e-6, max_positions=32_768, eos_ids=(1,),
    )  # fmt: skip
