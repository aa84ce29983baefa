"""Fixtures that several suites share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny checkpoint, once per kind and session: `tiny_model("qwen3", tie_embeddings=False,
    seed=1)`."""
    made: dict[tuple[str, bool, int], Path] = {}

    def make(family: str = "llama", *, tie_embeddings: bool = True, seed: int = 0) -> Path:
        from tests.tiny_model import make_tiny_model  # imports transformers, which most tests do without

        kind = (family, tie_embeddings, seed)
        if kind not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{family}-{seed}") / "model"
            made[kind] = make_tiny_model(directory, family, tie_embeddings=tie_embeddings, seed=seed)  # type: ignore[arg-type]
        return made[kind]

    return make
