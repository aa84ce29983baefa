"""The client's part of `bench_host.py`: a server's answers as bytes, and what reads them."""

import json
from collections.abc import Callable
from typing import Any

from sdpo_megatron.algorithm.thoughts import Separated
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.ticket import SampleRequest
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.rollout.wire import read_completion


def answer_of(rollout: Any) -> bytes:
    """What SGLang 0.5.23 answers with a response, without its text."""
    pairs = zip(rollout.rollout_logprobs_T, rollout.response_ids_T, strict=True)
    meta = {
        "id": "0" * 32,
        "finish_reason": {"type": rollout.finish_reason, "matched": rollout.response_ids_T[-1]},
        "prompt_tokens": len(rollout.prompt_ids),
        "weight_version": "ab-0",
        "output_token_logprobs": [[float(logprob), token_id, None] for logprob, token_id in pairs],
    }
    answer = {"text": "", "output_ids": list(rollout.response_ids_T), "meta_info": meta}
    return json.dumps(answer, separators=(",", ":")).encode()


def answer_reader() -> Callable[[bytes], Any]:
    """The client's and the sampler's part of a rollout, but for its text: an answer -> a Rollout."""
    settings = {
        "stop_token_ids": [],
        "max_context_length": 1 << 20,
        "max_concurrent": 1,
        "idle_timeout_s": 1.0,
    }
    nothing = Separated(thought="", answer="", closed=True)
    sampler = Sampler(
        [], separate=lambda prompt, ids: nothing, train_truncated=True, mark=WeightMark("ab"), **settings
    )
    request = SampleRequest(id="p", prompt_ids=[], n=1, temperature=1.0, max_tokens=1)
    return lambda answer: sampler._rollout(request, read_completion(answer), "")
