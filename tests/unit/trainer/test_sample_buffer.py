"""Samples travel as bytes and arrive as they were, each prompt once."""

import dataclasses

import numpy as np
import pytest

from sdpo_megatron.records import Sample
from sdpo_megatron.trainer.sample_buffer import decode, encode


def sample(id: int, length: int, **changes) -> Sample:
    fields = {
        "id": id,
        "prompt_ids": [7, 8, 9],
        "response_ids_T": [100_000 + t for t in range(length)],
        "rollout_logprobs_T": [-0.5 * t for t in range(length)],
        "loss_mask_T": [t % 2 for t in range(length)],
        "teacher_prompt_ids": [7, 8, 9, 10],
        "teacher_tokens": length,
        "success": True,
        "group_advantage": 1 / 3,
        "demonstration_id": 0,
    }
    return Sample(**{**fields, **changes})


def plain(sample: Sample) -> dict:
    fields = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return {
        name: list(value) if isinstance(value, list | memoryview) else value for name, value in fields.items()
    }


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [sample(0, 0)],
        [sample(0, 3), sample(1, 1, teacher_prompt_ids=None, demonstration_id=None, success=False)],
        [sample(0, 5), sample(1, 0, prompt_ids=[1]), sample(2, 2, teacher_prompt_ids=[1])],
    ],
)
def test_samples_arrive_as_they_were(samples: list[Sample]):
    # from another rank bytes come in memory of their own
    arrived, about = decode(encode(samples, {"dp": [1]}).copy())
    assert about == {"dp": [1]}
    assert [plain(one) for one in arrived] == [plain(one) for one in samples]
    assert all(type(token) is int for one in arrived for token in one.response_ids_T)
    again, _ = decode(encode(arrived, None))
    assert [plain(one) for one in again] == [plain(one) for one in samples]


def test_a_prompt_travels_once_and_a_token_in_nine_bytes():
    prompt = list(range(1000))
    apart = [sample(k, 1000, prompt_ids=list(prompt), teacher_prompt_ids=[*prompt, 1]) for k in range(8)]
    size = encode(apart, None).nbytes
    assert 8 * 1000 * 9 + 2 * 4 * 1000 < size < 8 * 1000 * 9 + 2 * 4 * 1000 + 1000
    first, second = decode(encode(apart, None))[0][:2]
    assert np.shares_memory(np.asarray(first.prompt_ids), np.asarray(second.prompt_ids))
