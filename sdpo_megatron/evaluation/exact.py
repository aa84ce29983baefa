"""The exact probability of canonical answers: what sampling the same model for ever would find."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdpo_megatron.records import Problem

if TYPE_CHECKING:
    # its transformers takes seconds, which tools that read evaluations would wait for
    from sdpo_megatron.chat import Chat

EXACT = "exact_answer_prob"


def exact_pairs(problems: Sequence[Problem], chat: "Chat") -> list[tuple[list[int], list[int]]]:
    """Returns the ids of prompts and of their answers, to be scored."""
    pairs = [(chat.prompt_ids(p.messages, p.tools), chat.answer_ids(p.answer)) for p in problems]
    # what stands right behind a prompt that began a thought is no answer
    return [pair for pair in pairs if not chat.opens_thought(pair[0])]


def exact_answer_prob(logprobs_PT: Sequence[Sequence[float]]) -> float:
    """Returns the mean probability of answers, from the log-probabilities of their tokens at temperature 1."""
    return sum(math.exp(sum(logprobs_T)) for logprobs_T in logprobs_PT) / len(logprobs_PT)
