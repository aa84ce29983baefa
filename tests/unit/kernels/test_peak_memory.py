"""How much memory a loss from hidden states takes, measured in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY, HIDDEN = 32768, 64
FLOAT32 = 4
CHUNKS = {"token level": 5, "forward": 6, "mixture": 10, "top-K": 5}
"""Tensors of a chunk's logits, [chunk_tokens, V] in float32, that exist at once on a CPU, and one more."""
FEW, MANY = 128, 384
SIZES = ((FEW, 32), (MANY, 32), (FEW, 128))
"""U and chunk_tokens"""
FIXED, SLACK = 24 * 2**20, 8 * 2**20
"""What libraries take when first used; what two equal runs differ by."""


@pytest.fixture(scope="module")
def added() -> dict[tuple[str, int, int], int]:
    """Bytes, by objective, U and chunk_tokens."""
    shapes = [(name, rows, chunk) for name in CHUNKS for rows, chunk in SIZES]
    lines = [json.dumps([name, rows, VOCABULARY, HIDDEN, chunk]) for name, rows, chunk in shapes]
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.peak_memory"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    return dict(zip(shapes, map(int, done.stdout.split()), strict=True))


def test_memory_does_not_grow_with_the_rows(added, subtests: pytest.Subtests):
    """added(U, chunk) = 4 V D (the head's gradient) + 4 U D (the hidden states') + CHUNKS 4 chunk V + a constant.

    More rows add their hidden states' gradient alone: 0.07 MB, where their logits would be 34 MB a model."""
    for name in CHUNKS:
        with subtests.test(name):
            hidden = FLOAT32 * (MANY - FEW) * HIDDEN
            assert added[name, MANY, 32] - added[name, FEW, 32] < hidden + SLACK
            for rows, chunk in SIZES:
                gradients = FLOAT32 * HIDDEN * (VOCABULARY + rows)
                logits = FLOAT32 * chunk * VOCABULARY
                assert added[name, rows, chunk] < gradients + CHUNKS[name] * logits + FIXED
