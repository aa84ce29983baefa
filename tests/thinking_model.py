"""A random tiny Qwen3 that thinks: each of its tokens is one of a few, so that responses with and without an answer,
and right ones, come often, whatever was asked."""

import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

OPENS_A_THOUGHT = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
"""The template of a model that always thinks."""
assert OPENS_A_THOUGHT != CHAT_TEMPLATE

PROBABILITIES = {"</think>": 0.3, "4": 0.3, "7": 0.1, " guess": 0.05, "\n": 0.05, "<|im_end|>": 0.2}
"""Of what a model says whose template opens the thought; the right answer is 4."""
HIDDEN = 32


def thinking_tokenizer(*, special: bool = False) -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer with tokens for thoughts; special ones are dropped by decoding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    tokenizer.chat_template = OPENS_A_THOUGHT
    return tokenizer


def make_thinking_model(
    directory: Path, tokenizer: PreTrainedTokenizerFast, probabilities: dict[str, float] = PROBABILITIES
) -> Path:
    """Writes a float32 checkpoint that samples the first tokens of these texts with these probabilities, nearly."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.encode("<|im_end|>", add_special_tokens=False)[0],
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        # the first component outweighs all others: behind the last norm it is the square root of HIDDEN
        model.model.embed_tokens.weight[:, 0] = 20.0
        head = model.lm_head.weight.mul_(0.1)
        head[:, 0] = -30.0 / math.sqrt(HIDDEN)
        for text, probability in probabilities.items():
            token_id = tokenizer.encode(text, add_special_tokens=False)[0]
            head[token_id, 0] = math.log(probability) / math.sqrt(HIDDEN)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
