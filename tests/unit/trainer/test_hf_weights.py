from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_megatron.models.families import FAMILIES
from sdpo_megatron.models.shape import Experts, ModelShape
from sdpo_megatron.trainer import hf_weights

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""What Transformer Engine's layers call them."""


EXPERTS = Experts(count=3, chosen=2, ffn=16, normalised=True)


def shape_of(architecture: str) -> ModelShape:
    return ModelShape(
        architecture=architecture, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=24, ffn=40, vocab=100,
        tie_embeddings=True, rope_theta=1e4, rope_scaling=None, rms_norm_eps=1e-6, max_positions=64, eos_ids=(),
        experts=EXPERTS if "experts" in FAMILIES[architecture].fields else None,
    )  # fmt: skip


def stage(shape: ModelShape, *others: str, engine: bool) -> Any:
    """The second of two pipeline stages, by the names of its parameters: layers 2 and 3, norm, tied head."""
    family = shape.family
    names = [family.final_norm.megatron, family.head.megatron, *others]
    for index in range(2):
        for row in family.of_layer(index, EXPERTS.count):
            name = FUSED_NORMS.get(row.megatron, row.megatron) if engine else row.megatron
            names.append(f"decoder.layers.{index}.{name}")
    return SimpleNamespace(
        named_parameters=lambda: [(name, torch.empty(0)) for name in names],
        pre_process=False,
        post_process=True,
        decoder=SimpleNamespace(layers=[SimpleNamespace(layer_number=3), SimpleNamespace(layer_number=4)]),
    )


@pytest.mark.parametrize("engine", [False, True], ids=["megatron's layers", "Transformer Engine's"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_parameter_of_a_stage_has_its_hugging_face_names(architecture: str, engine: bool):
    shape = shape_of(architecture)
    placed = [row for _, row in hf_weights._placed_in(stage(shape, engine=engine), shape)]
    rows = list(shape.parameters())
    of_two_layers = 2 * len(list(shape.family.of_layer(0, EXPERTS.count)))
    assert placed[:-1] == rows[-1 - of_two_layers :]
    assert placed[-1].parts == shape.family.embedding.parts


def test_a_parameter_without_hugging_face_name_is_an_error():
    shape = shape_of("LlamaForCausalLM")
    model = stage(shape, "decoder.layers.0.self_attention.linear_qkv.bias", engine=False)
    with pytest.raises(RuntimeError, match="^No Hugging Face name for .*linear_qkv.bias"):
        list(hf_weights._placed_in(model, shape))
