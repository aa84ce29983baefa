"""The part of SGLang 0.5.23's JSON that is sent and read, and answers as arrays.

An answer has two numbers for each of thousands of tokens. They are read into structs that the garbage collector does
not follow, so that reading costs the same however many responses are there already, and are arrays right after.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

NotNegative = Annotated[int, msgspec.Meta(ge=0)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Meta = TypeVar("Meta")


class _Token(msgspec.Struct, array_like=True, gc=False):
    """[log-probability, id, text]; the text is not asked for."""

    logprob: float
    id: TokenId


class _PromptToken(msgspec.Struct, array_like=True, gc=False):
    """The same; the first has nothing before it, and what is not finite is null in JSON."""

    logprob: float | None
    id: TokenId


class _FinishReason(msgspec.Struct):
    type: Literal["stop", "length", "abort"]


class MarkedSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens `start` to `end` were sampled from weights that were pushed with this mark (`weight_mark.py`)."""

    start: NotNegative
    end: NotNegative
    mark: str = msgspec.field(name="version")


class _Sampled(msgspec.Struct):
    output_token_logprobs: list[_Token]
    finish_reason: _FinishReason
    weight_version: str
    weight_versions: list[MarkedSpan] | None = None
    """Where the weights changed within the response; servers that cannot tell leave it out."""


class _Scored(msgspec.Struct):
    input_token_logprobs: list[_PromptToken]


class _Ranked(_Scored):
    input_top_logprobs: list[list[_PromptToken] | None]


class _Answer(msgspec.Struct, Generic[Meta]):
    meta_info: Meta


_SAMPLED = msgspec.json.Decoder(_Answer[_Sampled])
_SCORED = msgspec.json.Decoder(_Answer[_Scored])
_RANKED = msgspec.json.Decoder(_Answer[_Ranked])


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response as the server reports it."""

    ids_T: Sequence[int]
    """The response's token ids, including the stop token where one was sampled; int32."""
    logprobs_T: Sequence[float]
    """float32, as the server computes them: its decimal digits are read without loss."""
    finish_reason: Literal["stop", "length", "abort"]
    weight_spans: list[MarkedSpan]


def read_completion(answer: bytes) -> Completion:
    """Reads what /generate answers. Raises msgspec.ValidationError where it is another thing, msgspec.DecodeError where
    it is no whole JSON."""
    meta = _SAMPLED.decode(answer).meta_info
    tokens = meta.output_token_logprobs
    whole = [MarkedSpan(start=0, end=len(tokens), mark=meta.weight_version)]
    return Completion(
        ids_T=array("i", [token.id for token in tokens]),
        logprobs_T=array("f", [token.logprob for token in tokens]),
        finish_reason=meta.finish_reason.type,
        weight_spans=meta.weight_versions or whole,
    )


def read_prompt_logprobs(answer: bytes) -> list[float]:
    """Reads the log-probabilities of a prompt's tokens from the second on, in float64. Raises as `read_completion`."""
    tokens = _SCORED.decode(answer).meta_info.input_token_logprobs[1:]
    return [math.nan if token.logprob is None else token.logprob for token in tokens]


def read_ranked_prompt(answer: bytes) -> tuple[list[float], list[int]]:
    """Reads the same, and which token is the likeliest at each of these places; -1 where the server does not say."""
    meta = _RANKED.decode(answer).meta_info
    likeliest = [tokens[0].id if tokens else -1 for tokens in meta.input_top_logprobs[1:]]
    return read_prompt_logprobs(answer), likeliest


def encoded_prompt(ids: Sequence[int]) -> msgspec.Raw:
    """Returns a prompt as it stands in the JSON of a request: made once for all responses to it."""
    return msgspec.Raw(msgspec.json.encode(ids))
