"""Tiny random Hugging Face checkpoints, complete with tokenizer and chat template, made in about a second."""

import email
import http
import json
import unittest
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tests.families import BESIDE_SIZES, save_tiny

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "olmo3", "gemma3_text"]

VOCABULARY = 1026
"""A multiple of 6, and not of 3 * 128: Megatron pads it for tp=3 as it pads real ones."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens, trained on a few files of the standard library."""
    packages = (email, http, json, unittest)
    files = sorted(str(f) for p in packages if p.__file__ for f in Path(p.__file__).parent.glob("*.py"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(files, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == VOCABULARY
    return fast


def make_tiny_model(
    directory: Path, family: Family = "llama", *, tie_embeddings: bool = True, seed: int = 0
) -> Path:
    """Writes a float32 checkpoint: 4 layers, hidden 96, 6 heads, 3 KV heads, so that tp=3 and pp=2 both
    divide.

    Weights are large enough, norms and biases uneven enough, that any two tensors taken for each other show
    in the log-probabilities."""
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=tie_embeddings,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **BESIDE_SIZES.get(family, {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    save_tiny(model, directory)
    tokenizer.save_pretrained(directory)
    return directory
