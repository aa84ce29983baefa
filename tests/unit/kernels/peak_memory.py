"""Run as a program: the largest resident size that `loss_from_hidden` adds, for each line of standard input.

A line is JSON, [objective, U, V, D, chunk_tokens]; the answer is bytes, beyond what was there before, inputs included.
Each is measured in a forked process, which starts with a peak of its own.
"""

import json
import os
import resource
import sys

import torch

from sdpo_megatron.kernels.from_hidden import HiddenPart, loss_from_hidden
from sdpo_megatron.kernels.objective import FullVocabulary, Objective, TokenLevel, TopK
from sdpo_megatron.kernels.vocab import VocabShard

OBJECTIVES: dict[str, Objective] = {
    "token level": TokenLevel(),
    "forward": FullVocabulary(0.0),
    "mixture": FullVocabulary(0.5),
    "top-K": TopK(0.5, 100, "tail", "student"),
}


def added(objective: str, rows: int, vocab_size: int, hidden_size: int, chunk_tokens: int) -> int:
    hidden_UD = torch.randn(rows, hidden_size, requires_grad=True)
    head_VD = torch.randn(vocab_size, hidden_size, requires_grad=True)
    teacher = [HiddenPart(1.0, torch.randn(rows, hidden_size), head_VD.detach(), torch.arange(rows))]
    target_U = torch.randint(vocab_size, (rows,))
    before = resident()
    loss_from_hidden(
        *(hidden_UD, head_VD, teacher, target_U),
        lambda rows, logprob_U, divergence_U, numbers: logprob_U.sum() + divergence_U.sum(),
        objective=OBJECTIVES[objective],
        shard=VocabShard(start=0, vocab_size=vocab_size),
        chunk_tokens=chunk_tokens,
    ).backward()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, str(added(*json.loads(line))).encode())
            os._exit(0)
        os.close(writer)
        print(os.read(reader, 100).decode(), flush=True)
        os.close(reader)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
