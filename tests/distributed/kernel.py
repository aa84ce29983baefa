"""What ranks run: the log-probability kernel over a vocabulary that they share, against the dense definition."""

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_megatron.kernels.token_logprobs import VocabShard, linear_token_logprobs

VOCABULARY, HIDDEN, ROWS, TOKENS = 50, 16, 23, 41


def compare(temperature: float, chunk_tokens: int) -> None:
    """Values and gradients of this rank's shard equal those of float64 log_softmax over the whole vocabulary."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden, head, upstream = random(ROWS, HIDDEN), 2 * random(VOCABULARY, HIDDEN), random(TOKENS)
    row = torch.randint(ROWS, (TOKENS,), generator=generator)  # some rows predict several tokens, some none
    target = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    columns = (
        -(-VOCABULARY // ranks) + 1
    )  # one more than needed: padding on the last rank, wherever it starts
    padded = torch.cat([head, 100 * random(columns * ranks - VOCABULARY, HIDDEN)])
    own_hidden = hidden.clone().requires_grad_()
    own_head = padded.chunk(ranks)[rank].clone().requires_grad_()
    shard = VocabShard(
        start=rank * columns, vocab_size=VOCABULARY, group=dist.group.WORLD if ranks > 1 else None
    )
    logprobs, entropy = linear_token_logprobs(
        own_hidden, own_head, row, target, shard=shard, temperature=temperature, chunk_tokens=chunk_tokens
    )
    (logprobs * upstream).sum().backward()
    assert own_hidden.grad is not None and own_head.grad is not None
    dist.all_reduce(own_hidden.grad)  # as megatron does where hidden states enter the tensor-parallel region

    dense_hidden, dense_head = hidden.double().requires_grad_(), head.double().requires_grad_()
    log_softmax = (dense_hidden @ dense_head.T / temperature).log_softmax(-1)
    dense = log_softmax[row, target]
    (dense * upstream).sum().backward()
    assert dense_hidden.grad is not None and dense_head.grad is not None
    expected_head = torch.cat([dense_head.grad, torch.zeros(columns * ranks - VOCABULARY, HIDDEN)])

    close = torch.testing.assert_close
    close(logprobs.double(), dense, rtol=1e-5, atol=1e-5)
    close(entropy.double(), -(log_softmax.exp() * log_softmax).sum(-1).detach(), rtol=1e-5, atol=2e-5)
    close(own_hidden.grad.double(), dense_hidden.grad, rtol=1e-4, atol=2e-5)
    close(own_head.grad.double(), expected_head.chunk(ranks)[rank], rtol=1e-4, atol=2e-5)
