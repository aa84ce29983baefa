"""A model on the only rank of a grid, in whichever process asks for it: what it says of texts, as the trainer does."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_megatron.algorithm.batching import Microbatch, View
from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.build import HfModel, build_trainer
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.parallel import ParallelState, initialize, shut_down
from sdpo_megatron.trainer.ragged import Ragged
from sdpo_megatron.trainer.score import in_float32

ONLY_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def only_rank(device: Literal["cpu", "cuda"]) -> Iterator[ParallelState]:
    """Within this context the process is the only rank of a grid, on the first GPU where the device is one."""
    before = {name: os.environ.get(name) for name in ONLY_RANK}
    os.environ.update(ONLY_RANK)
    try:
        yield initialize(
            ParallelSettings(), device=torch.device("cuda:0" if device == "cuda" else "cpu"), seed=0
        )
    finally:
        shut_down()
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@dataclass(frozen=True)
class Scores:
    """What a model says of the tokens of one text behind a prompt, at temperature 1."""

    logprobs_T: list[float]
    """Of the text's tokens, in nats."""
    likeliest_T: list[int]
    """The id that it finds likeliest in each token's place."""
    margins_T: list[float]
    """By how many nats it finds that likelier than the second."""


class AloneModel:
    """A Hugging Face model on the only rank."""

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        dtype: Literal["float32", "bfloat16"],
        parallel: ParallelState,
    ):
        """Loads the weights. Raises UserError where one is not finite in `dtype`."""
        model = HfModel(directory, shape, "the model")
        trainer = build_trainer(
            model,
            parallel,
            dtype=getattr(torch, dtype),
            layout=ParallelSettings(),
            temperature=1.0,
            learning=None,
        )
        self.shape = shape
        self.dtype = dtype
        self.scorer = trainer.scorer

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scores]:
        """Returns what the model says of each (prompt ids, text ids)."""
        scorer = self.scorer
        views = [View(i, prompt, text) for i, (prompt, text) in enumerate(pairs)]
        ragged = Ragged([len(text) for _, text in pairs])
        found_B = {"logprobs": ragged.zeros(), "likeliest": ragged.zeros().long(), "margins": ragged.zeros()}

        def at_loss(
            microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor
        ) -> tuple[Tensor, dict[str, Any]]:
            margins_H, likeliest_H = self._first_of(hidden_HD, head_VD)
            rows_M = microbatch.hidden_row_M.to(hidden_HD.device)
            return hidden_HD.new_zeros(()), {
                "place_M": ragged.place_M(microbatch),
                "logprobs": scorer.head.logprobs(microbatch, hidden_HD, head_VD),
                "likeliest": likeliest_H[rows_M],
                "margins": margins_H[rows_M],
            }

        microbatches = scorer.packer(views)
        for found in run_microbatches(scorer.chunks, microbatches, at_loss, scorer.parallel, learn=False):
            for name, flat_B in found_B.items():
                flat_B[found["place_M"]] = found[name].cpu()
        return [Scores(*one) for one in zip(*map(ragged.split, found_B.values()), strict=True)]

    def float32_logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], own: Sequence[Scores]
    ) -> list[list[float]]:
        """Returns the log-probabilities of the same weights in float32, beside which rounding shows; `own` is what
        `scores` said."""
        if self.dtype == "float32":
            return [scores.logprobs_T for scores in own]
        return in_float32(self.scorer, self.shape).response_logprobs(pairs)

    def _first_of(self, hidden_HD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
        """The margin of the likeliest token over the second, in nats, and its id, chunk by chunk."""
        margins, ids = [], []
        for rows_HD in hidden_HD.split(self.scorer.head.chunk_tokens):
            # rows beyond the vocabulary fill it up
            # a final norm in float32 is rounded first, as in kernels/from_hidden.py
            top_H2 = (rows_HD.to(head_VD.dtype) @ head_VD[: self.shape.vocab].T).float().topk(2)
            margins.append(top_H2.values[:, 0] - top_H2.values[:, 1])
            ids.append(top_H2.indices[:, 0])
        return torch.cat(margins), torch.cat(ids)
