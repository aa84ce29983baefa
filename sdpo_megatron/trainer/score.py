"""Log-probabilities of given responses under a weight set: what the learner, the evaluation and the canary ask for."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import Microbatch, View, microbatch, pack
from sdpo_megatron.algorithm.token_rows import token_rows
from sdpo_megatron.kernels.from_hidden import logprobs_from_hidden
from sdpo_megatron.kernels.vocab import VocabShard
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.model import build_model, unwrap
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.ragged import Ragged


@dataclass(frozen=True)
class Head:
    """How final hidden states become logits, at one temperature, chunk by chunk."""

    shape: ModelShape
    parallel: ParallelState
    _: KW_ONLY
    temperature: float
    chunk_tokens: int

    def shard(self, head_VD: Tensor) -> VocabShard:
        return VocabShard(
            start=self.parallel.tp_rank * head_VD.shape[0],
            vocab_size=self.shape.vocab,
            group=self.parallel.groups.tp,
            temperature=self.temperature,
        )

    def logprobs(self, microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor) -> Tensor:
        """Returns the log-probabilities of the micro-batch's response tokens, [M]; tokens sampled alike in the same
        context are computed once."""
        device = hidden_HD.device
        rows = token_rows(microbatch.hidden_row_M, microbatch.targets_M)
        hidden_row_U, target_U = rows.keys_UK.to(device).unbind(1)
        shard = self.shard(head_VD)
        logprobs_U, _ = logprobs_from_hidden(
            hidden_HD[hidden_row_U], head_VD, [], target_U, shard=shard, chunk_tokens=self.chunk_tokens
        )
        logprobs_M = torch.zeros(len(rows.row_T), device=device)
        logprobs_M[rows.order_T.to(device)] = logprobs_U[rows.row_T.to(device)]
        return logprobs_M


@dataclass(frozen=True)
class Packer:
    """Cuts views into micro-batches."""

    parallel: ParallelState
    _: KW_ONLY
    micro_batch_tokens: int
    share_prefixes: bool

    def by_rank(self, views: Sequence[View]) -> list[list[list[int]]]:
        """Returns, for each data-parallel rank, the sample ids of each of its micro-batches."""
        return pack(views, self.micro_batch_tokens, self.parallel.dp, self.share_prefixes)

    def made(self, views: Sequence[View], microbatches: Sequence[Sequence[int]]) -> list[Microbatch]:
        """Returns the micro-batches of these sample ids, whose views are among `views`."""
        view_of = {view.sample_id: view for view in views}
        return [
            microbatch([view_of[k] for k in sample_ids], self.share_prefixes) for sample_ids in microbatches
        ]

    def __call__(self, views: Sequence[View]) -> list[Microbatch]:
        """Returns this rank's micro-batches of views that every rank has."""
        return self.made(views, self.by_rank(views)[self.parallel.dp_rank])

    def alone(self, views: Sequence[View]) -> list[Microbatch]:
        """Returns micro-batches of views that this data-parallel rank has for itself; other ranks may have other
        numbers of them."""
        (own,) = pack(views, self.micro_batch_tokens, 1, self.share_prefixes)
        return self.made(views, own)


@dataclass(frozen=True)
class Scorer:
    """Scores responses under one weight set: a forward pass without gradient, on all ranks together."""

    chunks: list[nn.Module]
    head: Head
    packer: Packer
    parallel: ParallelState

    def logprobs(self, views: Sequence[View], ragged: Ragged) -> Tensor:
        """Returns the log-probabilities of views that every rank has, as a flat tensor in `ragged`'s order, the same on
        every rank; 0 where no view holds the token."""
        logprobs_B = self.own_logprobs(self.packer(views), ragged)
        return self.parallel.owned_total(logprobs_B)

    def own_logprobs(self, microbatches: Sequence[Microbatch], ragged: Ragged) -> Tensor:
        """Returns the log-probabilities of this data-parallel rank's tokens as a flat tensor in `ragged`'s order: on
        the last stage; 0 elsewhere, and where no micro-batch holds the token."""

        def at_loss(microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor):
            logprobs_M = self.head.logprobs(microbatch, hidden_HD, head_VD)
            return hidden_HD.new_zeros(()), {"place_M": ragged.place_M(microbatch), "logprobs_M": logprobs_M}

        logprobs_B = ragged.zeros()
        for result in run_microbatches(self.chunks, microbatches, at_loss, self.parallel, learn=False):
            logprobs_B[result["place_M"]] = result["logprobs_M"].float().cpu()
        return logprobs_B

    def response_logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Returns, for each (prompt ids, response ids), the log-probability of each response token."""
        views = [View(i, prompt, response) for i, (prompt, response) in enumerate(pairs)]
        ragged = Ragged([len(response) for _, response in pairs])
        return ragged.split(self.logprobs(views, ragged))


@torch.no_grad()
def in_float32(scorer: Scorer, shape: ModelShape) -> Scorer:
    """Returns a scorer like `scorer` of the same weights, which computes in float32, beside which its own type's
    rounding shows; it holds 4 bytes a parameter."""
    wide = build_model(shape, torch.float32, scorer.parallel)
    for chunk, own in zip(wide, scorer.chunks, strict=True):
        for parameter, narrow in zip(unwrap(chunk).parameters(), unwrap(own).parameters(), strict=True):
            parameter.copy_(narrow)
    return Scorer(wide, scorer.head, scorer.packer, scorer.parallel)
