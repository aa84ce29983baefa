"""A Hugging Face model's shape -> megatron-core GPTModel, one chunk per (virtual) pipeline stage of this rank."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer import cpu_platform
from sdpo_megatron.trainer.attention import TreeAttention, slides
from sdpo_megatron.trainer.norms import NormOverHeads, NormThenAdd, RMSNorm
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.rotary import TreeRotary, has_two_ropes, rotary_frequencies

# megatron.core after parallel.py, which installs the CPU platform where there is no GPU
from megatron.core.extensions.transformer_engine import HAVE_TE, TEColumnParallelLinear, TENorm  # isort: skip
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import (  # isort: skip
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (  # isort: skip
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig  # isort: skip
from megatron.core.transformer.attention import SelfAttention  # isort: skip
from megatron.core.transformer.identity_op import IdentityOp  # isort: skip
from megatron.core.transformer.module import Float16Module  # isort: skip
from megatron.core.transformer.moe.router import TopKRouter  # isort: skip
from megatron.core.transformer.transformer_block import (  # isort: skip
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)


VOCAB_ALIGNMENT = 128
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage stops at the final hidden states [S, 1, D]: the loss owns the LM head."""

    embedding_scale: float = 1.0
    """What embeddings are multiplied with."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        if self.pre_process and self.embedding_scale != 1.0:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            kwargs["decoder_input"] = embedded * self.embedding_scale
        return super()._preprocess(input_ids, position_ids, **kwargs)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """Returns the LM head's shard [V, D]; on the last stage only."""
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        assert weight is not None
        return weight


class TwoRopesAttention(SelfAttention):
    """Attention of a model whose layers with a sliding window have a rotary embedding of their own."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Takes the angles [2, S, 1, 1, head_dim] of both; those of sliding layers are the last."""
        own = rotary_pos_emb[int(slides(self.config, self.layer_number))]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)


class ExpertRouter(TopKRouter):
    """megatron's router, whose logits are a product in the model's type, as transformers and SGLang compute them.
    megatron-core 0.16 has its own function for it, which misses a name where there is no Transformer Engine."""

    def gating(self, input: Tensor) -> Tensor:
        """Returns logits [S, 1, experts] of hidden states [S, 1, hidden]."""
        return F.linear(input, self.weight)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Returns the rows of embedding and head: the vocabulary, rounded up so that each tensor-parallel rank has as many
    of them, and a row of logits begins where kernels can load 128 bits at a time."""
    multiple = VOCAB_ALIGNMENT * tp
    return -(-vocab_size // multiple) * multiple


def embedding_scale(shape: ModelShape, dtype: torch.dtype) -> float:
    """Returns what embeddings are multiplied with."""
    if not shape.family.scaled_embedding:
        return 1.0
    # a model without numbers has this one all the same
    return float(torch.tensor(math.sqrt(shape.hidden), dtype=dtype, device="cpu"))


def transformer_config(shape: ModelShape, dtype: torch.dtype, parallel: ParallelState) -> TransformerConfig:
    on_gpu = parallel.device.type == "cuda"
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        activation_func=ACTIVATIONS[shape.family.activation],
        **shape.family.transformer,
        **_attention_arguments(shape),
        **_expert_arguments(shape),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # sampled tokens are scored and learned from without dropout, so every forward pass is a pure function
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # micro-batches are packed, each to its own length
        variable_seq_lengths=True,
        # the default is refused together with variable lengths, experts or not
        moe_token_dispatcher_type="alltoall",
        # the loss divides by the global token count itself
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        # these need CUDA extensions or a compiler at run time
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=on_gpu,
    )


def _attention_arguments(shape: ModelShape) -> dict[str, Any]:
    """What is not megatron's default."""
    if shape.sliding is None:
        return {}
    return {
        # megatron counts the tokens before, we those that are seen
        "window_size": (shape.sliding.window - 1, 0),
        "window_attn_skip_freq": [int(layer in shape.sliding.layers) for layer in range(shape.layers)],
    }


def _expert_arguments(shape: ModelShape) -> dict[str, Any]:
    """What tokens learn from is the loss alone: no balance between experts is asked for."""
    experts = shape.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.chosen,
        "moe_ffn_hidden_size": experts.ffn,
        # a softmax over those that are taken is the one over all, made to sum to 1
        "moe_router_pre_softmax": not experts.normalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _layer_spec(
    config: TransformerConfig, shape: ModelShape, parallel: ParallelState, transformer_engine: bool
) -> Any:
    parts: dict[str, Any] = {"qk_layernorm": config.qk_layernorm, "num_experts": config.num_moe_experts}
    if transformer_engine:
        layer: Any = get_gpt_layer_with_transformer_engine_spec(**parts)
    else:
        layer = get_gpt_layer_local_spec(**parts, normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if shape.experts is not None:
        layer.submodules.mlp.submodules.router = ExpertRouter
    if shape.family.norms != "before":
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = ModuleSpec(
            NormThenAdd, params={"config": config}
        )
    if shape.family.norms == "after":
        _remove_norms_before(layer, transformer_engine)
    attention = layer.submodules.self_attention
    if shape.family.norm_over_heads:
        for name, heads in (("q_layernorm", shape.heads), ("k_layernorm", shape.kv_heads)):
            norm = ModuleSpec(NormOverHeads, params={"heads": heads, "parallel": parallel})
            setattr(attention.submodules, name, norm)
    # a factor of queries and keys (YaRN) is part of the scale of their product
    scales = {"scale": shape.attention_scale, "sharpening": rotary_frequencies(shape)[1] ** 2}
    attention.submodules.core_attention = ModuleSpec(TreeAttention, params=scales)
    if has_two_ropes(shape):
        attention.module = TwoRopesAttention
    count = get_num_layers_to_build(config)
    final_norm: Any = TENorm if transformer_engine else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=final_norm)


def _remove_norms_before(layer: Any, transformer_engine: bool) -> None:
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    if transformer_engine:
        # in place of those that hold the norm before them
        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear


def build_model(
    shape: ModelShape, dtype: torch.dtype, parallel: ParallelState, *, transformer_engine: bool = HAVE_TE
) -> list[nn.Module]:
    """Returns this rank's chunks, whose weights are not loaded yet. In bfloat16 each is wrapped in megatron's
    Float16Module.

    With `transformer_engine` layers are Transformer Engine's, which must be installed, else megatron-core's own."""
    config = transformer_config(shape, dtype, parallel)
    chunk = HiddenStatesModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, shape, parallel, transformer_engine),
        vocab_size=padded_vocab_size(shape.vocab, parallel.tp),
        max_sequence_length=shape.max_positions,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        share_embeddings_and_output_weights=shape.tie_embeddings,
        position_embedding_type="rope",
        pg_collection=parallel.groups,
    )
    cpu_platform.check_rewritten()
    _mark_shards(chunk)
    chunk.embedding_scale = embedding_scale(shape, dtype)
    chunk.rotary_pos_emb = TreeRotary(shape, parallel.device)  # type: ignore[assignment]
    chunk = chunk.to(device=parallel.device, dtype=dtype)
    if dtype != torch.bfloat16:
        return [chunk]
    return [Float16Module(config, chunk)]


def _mark_shards(chunk: nn.Module) -> None:
    """Say which weights are divided over tensor-parallel ranks: the gradient norm counts the others once.

    megatron-core does so while it fills weights with random numbers, which `perform_initialization=False` skips.
    """
    for module in chunk.modules():
        cut = 1 if isinstance(module, RowParallelLinear) else 0
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            # a tied head has none of its own
            if module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, True, cut, 1)


def unwrap(chunk: nn.Module) -> HiddenStatesModel:
    """Returns the GPTModel inside megatron's wrappers for data parallelism and mixed precision."""
    while not isinstance(chunk, HiddenStatesModel):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
