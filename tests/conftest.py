"""Fixtures that several suites share."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Triton decides when a kernel is defined whether it will be compiled or interpreted: it has to be told before anything
# imports it. Without a GPU's driver, tests run the kernels in the interpreter.
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ["TRITON_INTERPRET"] = "1"


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
