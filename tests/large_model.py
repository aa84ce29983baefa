"""A model of two gigabytes of zeros that takes no room: its files have holes."""

import json
from pathlib import Path

from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.models.weight_files import SINGLE, described

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
"""The sizes of Llama 3.2 1B: 2.5 GB in bfloat16, of which the embedding is 525 MB."""


def make_large_model(directory: Path, **changes: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(LLAMA_1B | changes))
    header, end = {}, 0
    for name, sizes in described(read_model_shape(directory)):
        begin = end
        end += 2 * sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory
