"""What of a response is thought, and what is its answer.

Thinking models write what they think between two markers, and their answer behind. For some the chat template writes
the first marker, as the end of the prompt. The answer alone is graded and shown to siblings; the whole response is
learned from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""What opens and what closes a thought: of Qwen3 and DeepSeek-R1, as some prompts ask for, of Magistral, of
OpenThinker."""
_OPENING = tuple(opening for opening, _ in MARKERS)
_IN_TEXT = re.compile(
    "|".join(f"({re.escape(opening)})|{re.escape(closing)}" for opening, closing in MARKERS)
)
_TAIL = 32
"""Tokens at a prompt's end that surely hold a marker and the white space behind it."""


@dataclass(frozen=True, kw_only=True)
class Separated:
    """A response in two, as text without markers and special tokens."""

    thought: str
    """All thoughts, in order; empty where there is none."""
    answer: str
    """All that is not thought; empty where `closed` is False."""
    closed: bool
    """Whether the last thought ended, if there was any. A response that ends inside a thought has no answer."""


class Thoughts:
    """Separates thought and answer by the ids of the tokenizer's own markers, or, where it has no token for any of
    MARKERS, by their text."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        decode: Callable[[Sequence[int]], str],
        decode_all: Callable[[Sequence[int]], str],
    ) -> None:
        """`vocabulary` has the tokenizer's ids by token, added ones too. `decode` leaves special tokens out,
        `decode_all` does not."""
        known = [pair for pair in MARKERS if pair[0] in vocabulary and pair[1] in vocabulary]
        self._opens: dict[int, bool] = {}
        """The markers' ids -> whether they open a thought; empty where the tokenizer has none."""
        for opening, closing in known:
            self._opens |= {vocabulary[opening]: True, vocabulary[closing]: False}
        self._opening = tuple(opening for opening, _ in known) or _OPENING
        self._decode, self._decode_all = decode, decode_all

    def opened_by(self, prompt_ids: Sequence[int]) -> bool:
        """Returns whether the prompt ends inside a thought. Only white space may stand behind the marker: elsewhere it
        is something that the user wrote."""
        return self._decode_all(prompt_ids[-_TAIL:]).rstrip().endswith(self._opening)

    def separate(self, response_ids_T: Sequence[int], opened: bool) -> Separated:
        """Returns thought and answer of a response to a prompt that ends inside a thought if `opened`.

        A marker that closes what nothing opened makes a thought of all that stands before it.
        """
        if self._opens:
            markers = [(t, t + 1, self._opens[i]) for t, i in enumerate(response_ids_T) if i in self._opens]
            *runs, closed = _sorted(response_ids_T, markers, opened)
            thought, answer = (self._decode([*chain(*some)]) for some in runs)
        else:
            text = self._decode(response_ids_T)
            markers = [(*found.span(), found.lastindex is not None) for found in _IN_TEXT.finditer(text)]
            *pieces, closed = _sorted(text, markers, opened)
            thought, answer = ("".join(some) for some in pieces)
        if not (markers or opened):
            return Separated(thought="", answer=answer, closed=True)
        # line breaks between marker and text belong to the format
        return Separated(thought=thought.strip("\n"), answer=answer.lstrip("\n"), closed=closed)


def _sorted(
    whole: Sequence[Any], markers: Sequence[tuple[int, int, bool]], inside: bool
) -> tuple[list[Any], list[Any], bool]:
    """The segments of thought, those of the answer, and whether the last thought was closed. A marker is where it
    begins and ends in `whole`, and whether it opens a thought."""
    starts, ends = [0, *(end for _, end, _ in markers)], [*(start for start, _, _ in markers), len(whole)]
    kinds, first = [inside, *(opens for _, _, opens in markers)], 0
    for k, (before, opens) in enumerate(pairwise(kinds), start=1):
        # it closes what nothing opened: all that stands before it is thought
        if not before and not opens:
            first = k
    # a response that ends inside a thought has no answer
    first = len(kinds) if kinds[-1] else first
    thought: list[Any] = []
    answer: list[Any] = []
    for k, (start, end, thinks) in enumerate(zip(starts, ends, kinds, strict=True)):
        (thought if thinks or k < first else answer).append(whole[start:end])
    return thought, answer, not kinds[-1]
