"""Samples as one buffer of bytes, in which they travel from rank 0 to the others: 9 bytes a response token.

    int64: bytes of the header | header | int32 tokens | float32 log-probabilities | uint8 loss masks

The header is JSON, filled up with spaces to whole words: what is known once per sample, the lengths of prompts and
responses, and what the sender says about all of them. The tokens are those of each distinct prompt, a teacher's
included, then of the responses.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdpo_megatron.records import Sample

_ONCE = ("id", "teacher_tokens", "success", "group_advantage", "demonstration_id", "hints_lost")
_WORD = 8


def encode(samples: Sequence[Sample], about: Any) -> np.ndarray:
    """Returns the samples, and JSON-serialisable `about`, as bytes, uint8 [bytes]."""
    prompts = _Prompts()
    rows = [
        [
            prompts.place(sample.prompt_ids),
            prompts.place(sample.teacher_prompt_ids),
            len(sample.response_ids_T),
        ]
        + [getattr(sample, name) for name in _ONCE]
        for sample in samples
    ]
    lengths = [len(ids) // np.dtype(np.int32).itemsize for ids in prompts.distinct]
    header = json.dumps({"about": about, "prompts": lengths, "samples": rows}).encode()
    header += b" " * (-len(header) % _WORD)
    parts = [
        np.asarray([len(header)], np.int64).tobytes(),
        header,
        *prompts.distinct,
        *(np.asarray(sample.response_ids_T, np.int32) for sample in samples),
        *(np.asarray(sample.rollout_logprobs_T, np.float32) for sample in samples),
        *(np.asarray(sample.loss_mask_T, np.uint8) for sample in samples),
    ]
    return np.frombuffer(bytearray().join(parts), np.uint8)


def decode(buffer: np.ndarray) -> tuple[list[Sample], Any]:
    """Returns the samples that `encode` made bytes of, and what was said about them. What the samples hold per token
    are views of the buffer."""
    head = _WORD + int(buffer[:_WORD].view(np.int64)[0])
    header = json.loads(buffer[_WORD:head].tobytes())
    rows = header["samples"]
    lengths = [row[2] for row in rows]
    starts = np.cumsum([0, *header["prompts"], *lengths]).tolist()
    tokens, responses = starts[-1], starts[len(header["prompts"])]
    ids = buffer[head : head + 4 * tokens].view(np.int32)
    values = buffer[head + 4 * tokens :]
    logprobs_B = values[: 4 * (tokens - responses)].view(np.float32)
    loss_mask_B = values[4 * (tokens - responses) :]
    prompts = [_view(ids[a:b]) for a, b in zip(starts, starts[1 : len(header["prompts"]) + 1], strict=False)]
    samples = []
    start = 0
    for prompt, teacher_prompt, length, *once in rows:
        part = slice(start, start + length)
        samples.append(
            Sample(
                prompt_ids=prompts[prompt],
                response_ids_T=_view(ids[responses:][part]),
                rollout_logprobs_T=_view(logprobs_B[part]),
                loss_mask_T=_view(loss_mask_B[part]),
                teacher_prompt_ids=None if teacher_prompt is None else prompts[teacher_prompt],
                **dict(zip(_ONCE, once, strict=True)),
            )
        )
        start += length
    return samples, header["about"]


class _Prompts:
    """Distinct prompts, in the order in which they were met."""

    def __init__(self) -> None:
        self._place_of: dict[bytes, int] = {}
        # siblings mostly have one and the same list; it lives as long as the samples
        self._place_of_list: dict[int, int] = {}

    @property
    def distinct(self) -> list[bytes]:
        return list(self._place_of)

    def place(self, ids: Sequence[int] | None) -> int | None:
        if ids is None:
            return None
        if id(ids) not in self._place_of_list:
            key = np.asarray(ids, np.int32).tobytes()
            self._place_of_list[id(ids)] = self._place_of.setdefault(key, len(self._place_of))
        return self._place_of_list[id(ids)]


def _view(array: np.ndarray) -> Any:
    """A memoryview is a sequence of plain numbers, of whatever type the array is of."""
    return array.data
