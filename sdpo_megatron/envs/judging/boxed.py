r"""The answer of a mathematical text: what stands in its last \boxed{}."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
"""Older texts write fbox for boxed."""


def last_boxed(text: str) -> str | None:
    r"""Returns what the last \boxed{...} or \fbox{...} holds, without outer white space; None where there is none.

    Braces may be nested, and \{ and \} are no braces. Without braces it is the next character or command, as in TeX:
    \boxed 5, \boxed\pi. Of boxes in one another the innermost counts. A last box that never closes is no answer: the
    text was cut off inside it, and an earlier box is what the text went on from.
    """
    starts = [box.end() for box in _BOX.finditer(text)]
    if not starts:
        return None
    rest = text[starts[-1] :]
    if not rest.startswith("{"):
        argument = re.match(r"\\[a-zA-Z]+|\\.|[^\s{}$]", rest)
        return argument[0] if argument else None
    depth = 0
    for piece in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(piece[0], 0)
        if depth == 0:
            return rest[1 : piece.start()].strip()
    return None
