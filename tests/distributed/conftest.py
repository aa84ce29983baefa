"""Tiny models and one batch of samples, written once."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from sdpo_megatron.records import Sample
from tests.families import BESIDE_SIZES, save_tiny

VOCABULARY = 514
"""Not a multiple of 3: padded for tp=3."""


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model("qwen3", seed=1)`: a float32 checkpoint of 4 layers, 6 heads, 3 key-value heads or as many as asked.

    The embedding is tied, but for Qwen3."""
    made: dict[tuple[str, int, int], Path] = {}

    def make(family: str = "llama", seed: int = 0, kv_heads: int = 3) -> Path:
        kind = (family, seed, kv_heads)
        if kind not in made:
            made[kind] = _save(tmp_path_factory.mktemp(f"{family}-{seed}") / "model", *kind)
        return made[kind]

    return make


def _save(directory: Path, family: str, seed: int, kv_heads: int) -> Path:
    import torch
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=32 if family == "qwen3" else 16,
        max_position_embeddings=512,
        tie_word_embeddings=not family.startswith("qwen3"),
        initializer_range=0.08,
        dtype="float32",
        **{"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None},
        **BESIDE_SIZES.get(family, {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:  # norms and biases are all ones and zeros otherwise
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return save_tiny(network, directory)


@pytest.fixture(scope="package")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 problems x 4 responses as JSON: uneven lengths, masked tokens, no teacher, a truncated teacher."""
    path = tmp_path_factory.mktemp("samples") / "samples.json"
    path.write_text(json.dumps([asdict(sample) for sample in make_samples()]))
    return path


def make_samples() -> list[Sample]:
    dice = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [dice.randrange(VOCABULARY) for _ in range(count)]

    examples = tokens(9)  # worked examples, which all problems share
    samples = []
    for problem in range(4):
        question = tokens(3 + problem)
        start = tokens(2)
        for response in range(4):
            length = 1 + (5 * response + 3 * problem) % 11
            ids = (start + tokens(11))[:length]
            mask = [int(dice.random() > 0.2) for _ in ids]
            samples.append(
                Sample(
                    id=4 * problem + response,
                    prompt_ids=examples + question,
                    response_ids_T=ids,
                    rollout_logprobs_T=[-6.0 + 2 * dice.random() for _ in ids],
                    loss_mask_T=mask,
                    teacher_prompt_ids=None if response == 2 else tokens(8) + question,
                    teacher_tokens=length // 2 if response == 3 else length,
                    success=response == 1,
                    group_advantage=dice.random() - 0.5,
                )
            )
    return samples
