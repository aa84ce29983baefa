"""Converts a GGUF file of the llama architecture to a Hugging Face directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors (float32) and the tokenizer into
    `directory`.

    `gguf` is a file of the llama architecture. transformers reads GGUF files but cannot save what it read
    ("not serializable", 5.23.0); the weights here equal those it reads.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(gguf)
    values = {key: field.contents() for key, field in reader.fields.items()}
    if values["general.architecture"] != "llama":
        raise ValueError(
            f"{gguf} has architecture {values['general.architecture']}; only llama is converted."
        )
    weights = _hf_weights(reader.tensors, values)
    config = _hf_config(values, weights)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (directory / "generation_config.json").write_text(json.dumps(tokens, indent=2))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_weights(tensors: list[Any], values: Mapping[str, Any]) -> dict[str, "np.ndarray"]:
    """Hugging Face name -> float32 array, for every tensor of the file that a Llama model has."""
    import numpy as np
    from gguf import dequantize

    heads = {
        "attn_q": values["llama.attention.head_count"],
        "attn_k": values["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tensors:
        # it follows from the rope settings
        if tensor.name == "rope_freqs.weight":
            continue
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in TOP_NAMES:
            name = TOP_NAMES[tensor.name]
        else:
            _, layer, part, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
            if part in heads:
                weight = _half_rotary_order(weight, heads[part])
        weights[name] = np.ascontiguousarray(weight)
    return _tie(weights)


def _half_rotary_order(weight: "np.ndarray", heads: int) -> "np.ndarray":
    """Rows of a q or k matrix from llama.cpp's order (rotary pairs side by side) to Hugging Face's (in two
    halves)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _tie(weights: dict[str, "np.ndarray"]) -> dict[str, "np.ndarray"]:
    """Undo llama.cpp's habit of storing a tied matrix twice: the output copy has the finer precision and
    stays."""
    import numpy as np

    head = weights.get("lm_head.weight")
    if head is None:
        return weights
    embedding = weights["model.embed_tokens.weight"]
    norms = float(np.linalg.norm(embedding)) * float(np.linalg.norm(head))
    cosine = float(np.vdot(embedding, head)) / norms
    # two roundings of one matrix have 0.999, two matrices about 0
    if cosine < 0.99:
        return weights
    tied = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    return tied | {"model.embed_tokens.weight": head}


def _hf_config(values: Mapping[str, Any], weights: Mapping[str, "np.ndarray"]) -> dict[str, Any]:
    hidden, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": values["llama.context_length"],
        # The file holds it in float32: 1e-5 reads as 9.99999974e-06.
        "rms_norm_eps": float(f"{values['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(values["llama.rope.freq_base"]),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": values.get("tokenizer.ggml.padding_token_id"),
    }
