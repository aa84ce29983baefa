"""What server and trainer need of memory, by config.json; what a machine has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.config import Config, ServerSettings, load_config
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.models.families import FAMILIES
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.preflight import memory
from sdpo_megatron.preflight.memory import ServerMemory, parameter_count, plan_server_memory
from tests.families import UNSAID
from tests.unit.launch.launching import MODEL

GIB = 1 << 30
QWEN_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
PARAMETERS = 494_032_768
"""Of Qwen2.5-0.5B, as its makers count them."""


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_HALF_B))
    return read_model_shape(tmp_path)


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Config]:
    def configure(*overrides: str) -> Config:
        file = tmp_path / "x.yaml"
        file.write_text(
            "{run: {name: x, steps: 1}, model: {path: m, dtype: float32}, task: {env: equations}}"
        )
        return load_config([file], overrides)[0]

    return configure


def plan(config: Config, shape: ModelShape, free: float, **changes: Any) -> ServerMemory:
    arguments: dict[str, Any] = {"device": "cpu", "responses": 256, "tokens_each": 2056} | changes
    return plan_server_memory(config, shape, shape, bytes_free=int(free * GIB), **arguments)


def test_a_model_of_half_a_billion_starts_on_24_gib(configured: Callable[..., Config], shape: ModelShape):
    """In the defaults of the settings, in float32: weights 1.8 GiB, trainer 7.4, teacher 1.8, processes 2."""
    assert parameter_count(shape) == PARAMETERS
    planned = plan(configured(), shape, 22)
    assert planned.fraction == 0.95
    token = 2 * 24 * 2 * 64 * 4
    left = 22 * GIB - PARAMETERS * (4 + 16 + 4) - 4 * (GIB // 2) - token * 2056
    assert planned.cache_tokens == left // 2 // token
    assert 4 * GIB < planned.cache_tokens * token < 5 * GIB
    # all responses at once, where they need less than that
    assert plan(configured(), shape, 22, responses=4, tokens_each=100).cache_tokens == 400
    # one response, where little is left
    assert plan(configured(), shape, 13.1).cache_tokens == 2056


def test_a_server_that_gives_its_memory_to_each_step_has_a_larger_cache(
    configured: Callable[..., Config], shape: ModelShape
):
    """What the trainer has for good it has either way: the smallest machine is the same."""
    token, many = 2 * 24 * 2 * 64 * 4 // 2, {"device": "cuda", "responses": 10**6}
    own = plan(configured("model.dtype=bfloat16"), shape, 40, **many)
    shared = plan(configured("model.dtype=bfloat16", "server.release_memory=true"), shape, 40, **many)
    left = int(0.9 * 40 * GIB) - PARAMETERS * (2 + 18 + 2) - token * 2056
    assert own.cache_tokens == left // 2 // token
    assert shared.cache_tokens == int(0.9 * left) // token
    for overrides in ((), ("server.release_memory=true",)):
        with pytest.raises(ConfigError):
            plan(configured("model.dtype=bfloat16", *overrides), shape, 11, **many)


def test_what_does_not_fit_is_said_with_the_figures(configured: Callable[..., Config], shape: ModelShape):
    with pytest.raises(ConfigError) as caught:
        plan(configured(), shape, 13)
    assert str(caught.value) == (
        "model.path does not fit: server and trainer need at least 13.09 GiB (the server's weights 1.84, its key-value "
        "cache for one response of 2056 tokens 0.05, the trainer's weights, gradients and optimizer 7.36, the "
        "teacher's weights 1.84, 4 processes 2.00), but this machine has 13.00 GiB; take a smaller model or more "
        "memory, give server.urls of servers elsewhere, or have it tried by setting server.memory_fraction."
    )
    assert plan(configured("server.memory_fraction=0.4"), shape, 1) == ServerMemory(
        fraction=0.4, cache_tokens=None
    )


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        ([], 4 + 4 + 8 + 4),
        (["model.dtype=bfloat16"], 2 + 4 + 4 + 8 + 2),
        (["model.dtype=bfloat16", "teacher.name=ema"], 2 + 4 + 4 + 8 + 4 + 2),
        (["teacher.name=live"], 4 + 4 + 8),
        (["parallel.dp=2", "rollout.problems_per_step=2"], 2 * (4 + 4) + 8 + 2 * 4),
    ],
)
def test_bytes_of_the_trainer(
    overrides: list[str], bytes_each: int, configured: Callable[..., Config], shape: ModelShape
):
    config = configured(*overrides)
    item = memory.ITEM[config.model.dtype]
    found = memory.trained_bytes(shape, config, item) + memory.teacher_bytes(
        shape, config.teacher, config.parallel, item
    )
    assert found == PARAMETERS * bytes_each


def test_a_last_stage_has_a_tied_embedding_of_its_own(configured: Callable[..., Config], shape: ModelShape):
    whole, cut = (memory.trained_bytes(shape, configured(f"parallel.pp={pp}"), 4) for pp in (1, 2))
    assert cut - whole == 151_936 * 896 * 16


def test_a_gpu_is_shared_with_a_rank(configured: Callable[..., Config], shape: ModelShape):
    """Not seen on a GPU: what is checked is the arithmetic."""
    config = configured("model.dtype=bfloat16", "server.tp=2", "parallel.dp=4", "rollout.problems_per_step=4")
    planned = plan(config, shape, 8, device="cuda", responses=10_000)
    token = 24 * 64 * 2 * 2  # one of two key-value heads
    trainer = PARAMETERS * (4 * (2 + 4) + 12 + 4 * 2) // 4
    left = int(0.9 * 8 * GIB) - PARAMETERS * 2 // 2 - trainer - token * 2056
    assert planned.cache_tokens is not None
    assert abs(planned.cache_tokens - left // 2 // token) <= 1
    with pytest.raises(ConfigError, match=r"but each GPU can give 5\.40 GiB; "):
        plan(config, shape, 6, device="cuda")


def test_more_ranks_than_key_value_heads_keep_copies(shape: ModelShape):
    one = 24 * 2 * 64 * 2
    assert memory.cached_bytes_per_token(shape, ServerSettings(tp=1), 2) == 2 * one
    assert memory.cached_bytes_per_token(shape, ServerSettings(tp=7), 2) == 7 * one


@pytest.mark.parametrize(("architecture", "copies"), [("Qwen2ForCausalLM", 0), ("Gemma3ForCausalLM", 2)])
def test_ranks_of_a_server_that_hold_the_whole_embedding(tmp_path: Path, architecture: str, copies: int):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_HALF_B | {"architectures": [architecture]}))
    shape = read_model_shape(tmp_path)
    embedding = 151_936 * 896 * 2
    whole = parameter_count(shape) * 2
    assert memory.served_bytes(shape, ServerSettings(tp=3), 2) == whole + copies * embedding


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_counted_as_transformers_builds_it(architecture: str, tmp_path: Path):
    import torch
    import transformers

    config_class = getattr(transformers, architecture).config_class
    values = MODEL | {"architectures": [architecture], "model_type": config_class.model_type}
    values |= UNSAID.get(architecture, {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config_class.from_pretrained(tmp_path))
    assert parameter_count(read_model_shape(tmp_path)) == sum(p.numel() for p in model.parameters())


def test_the_tightest_limit_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "groups", lambda controller: [Path("a"), Path("b"), Path("c")])
    monkeypatch.setattr(memory, "memory_left", {Path("a"): None, Path("b"): 5, Path("c"): 7}.get)
    assert memory.bytes_free("cpu", ServerSettings()) == 5
    monkeypatch.undo()
    assert memory.bytes_free("cpu", ServerSettings()) > GIB // 4
