"""Log-probabilities of given responses under a weight set: what the learner, the evaluation and the canary ask for."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sdpo_megatron.algorithm.batching import Microbatch, View, microbatch, pack
from sdpo_megatron.algorithm.token_rows import token_rows
from sdpo_megatron.kernels.from_hidden import numbers_from_hidden
from sdpo_megatron.kernels.objective import RowNumbers, TokenLevel
from sdpo_megatron.kernels.vocab import VocabShard
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.trainer.forward import run_microbatches
from sdpo_megatron.trainer.parallel import ParallelState


class Head:
    """How final hidden states become logits, at one temperature, chunk by chunk."""

    def __init__(self, shape: ModelShape, parallel: ParallelState, *, temperature: float, chunk_tokens: int):
        self.vocab_size = shape.vocab
        self.parallel = parallel
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens

    def shard(self, head_VD: Tensor) -> VocabShard:
        return VocabShard(
            start=self.parallel.tp_rank * head_VD.shape[0],
            vocab_size=self.vocab_size,
            group=self.parallel.groups.tp,
            temperature=self.temperature,
        )

    def logprobs(self, microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor) -> Tensor:
        """Returns the log-probabilities of the micro-batch's response tokens, [M]; tokens sampled alike in the same
        context are computed once."""
        device = hidden_HD.device
        rows = token_rows(microbatch.hidden_row_M, microbatch.targets_M)
        hidden_row_U, target_U = rows.keys_UK.to(device).unbind(1)
        logprobs_U = torch.zeros(len(target_U), device=device)

        def see(chunk: slice, numbers: RowNumbers) -> None:
            logprobs_U[chunk] = numbers.student.logprob_U.float()

        numbers_from_hidden(
            hidden_HD[hidden_row_U],
            head_VD,
            [],
            target_U,
            see,
            objective=TokenLevel(),
            shard=self.shard(head_VD),
            chunk_tokens=self.chunk_tokens,
        )
        logprobs_M = torch.zeros(len(rows.row_T), device=device)
        logprobs_M[rows.order_T.to(device)] = logprobs_U[rows.row_T.to(device)]
        return logprobs_M


class Ragged:
    """Per-token numbers of a batch, end to end by sample id (axis B), so that ranks can add up what each of them
    knows."""

    def __init__(self, lengths: Sequence[int]):
        self.starts = torch.tensor([0, *lengths]).cumsum(0)

    def zeros(self) -> Tensor:
        return torch.zeros(int(self.starts[-1]))

    def place_M(self, microbatch: Microbatch) -> Tensor:
        """Returns where the micro-batch's response tokens lie in the flat tensor."""
        return self.starts[microbatch.sample_M] + microbatch.index_M

    def flatten(self, rows: Sequence[Sequence[float]]) -> Tensor:
        none = np.zeros(0, np.float32)
        return torch.from_numpy(np.concatenate([none, *(np.asarray(row, np.float32) for row in rows)]))

    def firsts(self, counts: Sequence[int]) -> Tensor:
        """Returns 1 for each sample's first tokens, as many as `counts` says, and 0 for the others."""
        ends = self.starts[:-1] + torch.tensor(counts, dtype=torch.int64)
        index_B = torch.arange(int(self.starts[-1]))
        return (index_B < torch.repeat_interleave(ends, self.starts.diff())).float()

    def spread(self, values: Sequence[float]) -> Tensor:
        """Returns one number per sample, repeated for each of its tokens."""
        return torch.repeat_interleave(torch.tensor(values, dtype=torch.float32), self.starts.diff())

    def split(self, flat: Tensor) -> list[list[float]]:
        starts, values = self.starts.tolist(), flat.tolist()
        return [values[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]


class Packer:
    """Cuts a batch of views into this rank's micro-batches; every rank calls it with the same views."""

    def __init__(self, parallel: ParallelState, *, micro_batch_tokens: int, share_prefixes: bool):
        self.parallel = parallel
        self.micro_batch_tokens = micro_batch_tokens
        self.share_prefixes = share_prefixes

    def __call__(self, views: Sequence[View]) -> list[Microbatch]:
        view_of = {view.sample_id: view for view in views}
        by_rank = pack(views, self.micro_batch_tokens, self.parallel.dp, self.share_prefixes)
        return [
            microbatch([view_of[sample_id] for sample_id in sample_ids], self.share_prefixes)
            for sample_ids in by_rank[self.parallel.dp_rank]
        ]

    def alone(self, views: Sequence[View]) -> list[Microbatch]:
        """Returns micro-batches of views that this data-parallel rank has for itself; other ranks may have other
        numbers of them."""
        view_of = {view.sample_id: view for view in views}
        (own,) = pack(views, self.micro_batch_tokens, 1, self.share_prefixes)
        return [microbatch([view_of[k] for k in sample_ids], self.share_prefixes) for sample_ids in own]


class Scorer:
    """Scores responses under one weight set: a forward pass without gradient, on all ranks together."""

    def __init__(self, chunks: list[nn.Module], head: Head, packer: Packer, parallel: ParallelState):
        self.chunks = chunks
        self.head = head
        self.packer = packer
        self.parallel = parallel

    def logprobs(self, views: Sequence[View], ragged: Ragged) -> Tensor:
        """Returns the log-probabilities as a flat tensor in `ragged`'s order, the same on every rank; 0 where no view
        holds the token."""

        def at_loss(microbatch: Microbatch, hidden_HD: Tensor, head_VD: Tensor):
            logprobs_M = self.head.logprobs(microbatch, hidden_HD, head_VD)
            return hidden_HD.new_zeros(()), {"place_M": ragged.place_M(microbatch), "logprobs_M": logprobs_M}

        logprobs_B = ragged.zeros()
        if not views:
            return logprobs_B
        results = run_microbatches(self.chunks, self.packer(views), at_loss, self.parallel, learn=False)
        if self.parallel.owns_tokens:
            for result in results:
                logprobs_B[result["place_M"]] = result["logprobs_M"].float().cpu()
        return self.parallel.total(logprobs_B)

    def response_logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Returns, for each (prompt ids, response ids), the log-probability of each response token."""
        views = [View(i, prompt, response) for i, (prompt, response) in enumerate(pairs)]
        ragged = Ragged([len(response) for _, response in pairs])
        return ragged.split(self.logprobs(views, ragged))
