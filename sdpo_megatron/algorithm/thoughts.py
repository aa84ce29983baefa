"""What of a response is thought, and what is its answer.

Thinking models write what they think between two markers, and their answer behind. For some the chat template writes
the first marker, as the end of the prompt. The answer alone is graded and shown to siblings; the whole response is
learned from.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

Segment = TypeVar("Segment")

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
            runs, markers = _split_ids(response_ids_T, self._opens)
            thought, answer, closed = _sort(runs, markers, opened)
            texts = self._decode([*chain(*thought)]), self._decode([*chain(*answer)])
        else:
            pieces, markers = _split_text(self._decode(response_ids_T))
            thought, answer, closed = _sort(pieces, markers, opened)
            texts = "".join(thought), "".join(answer)
        if not (markers or opened):
            return Separated(thought="", answer=texts[1], closed=True)
        # line breaks between marker and text belong to the format
        return Separated(thought=texts[0].strip("\n"), answer=texts[1].lstrip("\n"), closed=closed)


def _split_ids(ids_T: Sequence[int], opens: Mapping[int, bool]) -> tuple[list[Sequence[int]], list[bool]]:
    """The runs of ids between markers, one more than there are markers, and whether each marker opens a thought."""
    places = [t for t, token_id in enumerate(ids_T) if token_id in opens]
    starts, ends = [0, *(place + 1 for place in places)], [*places, len(ids_T)]
    runs = [ids_T[start:end] for start, end in zip(starts, ends, strict=True)]
    return runs, [opens[ids_T[place]] for place in places]


def _split_text(text: str) -> tuple[list[str], list[bool]]:
    """The same of text."""
    found = list(_IN_TEXT.finditer(text))
    starts, ends = [0, *(match.end() for match in found)], [*(match.start() for match in found), len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return pieces, [match.lastindex is not None for match in found]


def _sort(
    segments: Sequence[Segment], markers: Sequence[bool], inside: bool
) -> tuple[list[Segment], list[Segment], bool]:
    """The segments of thought, those of the answer, and whether the last thought was closed. Marker k stands behind
    segment k."""
    answer: list[int] = []
    for k in range(len(segments)):
        if not inside:
            answer.append(k)
        if k < len(markers):
            if not inside and not markers[k]:
                answer = []
            inside = markers[k]
    if inside:
        answer = []
    shown = set(answer)
    thought = [segment for k, segment in enumerate(segments) if k not in shown]
    return thought, [segments[k] for k in answer], not inside
