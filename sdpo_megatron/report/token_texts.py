"""The text of single tokens, which records hold as ids only."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.run_dir.snapshots_file import read_snapshots

UNFINISHED = "\ufffd"
"""What a tokenizer writes for the bytes of a character that is not whole."""
_LONGEST = 8
"""Tokens that one character may take."""


class TokenTexts:
    """Cuts a response's text at its tokens. What `decode` says of an id is asked once."""

    def __init__(self, decode: Callable[[Sequence[int]], str], anchor: Sequence[int]) -> None:
        """`anchor` are the ids of some text: many tokenizers drop the space that begins a text, not one behind it."""
        self._decode, self._anchor = decode, list(anchor)
        self._before = decode(self._anchor)
        self._one = functools.cache(lambda token: self._text([token]))

    def of(self, ids_T: Sequence[int]) -> list[str]:
        """Returns the text of each token. Where a character takes several, the first has it and the others are
        empty."""
        texts = [self._one(token) for token in ids_T]
        t = 0
        while t < len(texts):
            t += self._join(ids_T, texts, t) if UNFINISHED in texts[t] else 1
        return texts

    def _text(self, ids: list[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(ids)

    def _join(self, ids_T: Sequence[int], texts: list[str], start: int) -> int:
        """Gives the first of the tokens that make whole characters their text; returns how many they are."""
        for end in range(start + 2, min(start + _LONGEST, len(ids_T)) + 1):
            text = self._text([int(token) for token in ids_T[start:end]])
            if UNFINISHED not in text:
                texts[start:end] = [text, *[""] * (end - start - 1)]
                return end - start
        return 1


def load_token_texts(values: dict[str, Any], snapshots: Path) -> TokenTexts:
    """Returns the texts of the tokens of a run whose settings are `values`, by the tokenizer of its model as it lies on
    this machine; nothing is downloaded. Raises UserError where there is none."""
    # torch and transformers take seconds
    from sdpo_megatron.models.hub import MAIN, is_hub_id
    from sdpo_megatron.models.pretrained import resolve_model_path

    model = values["model"]
    name = model["path"]
    if is_hub_id(name) and not Path(name).exists():
        path = Path(read_snapshots(snapshots).get(f"{name}@{model.get('revision') or MAIN}", ""))
        if not (path.is_absolute() and path.is_dir()):
            raise UserError(f"the model {name} is not on this machine")
    else:
        path = resolve_model_path(name)
    # transformers would look for it on the Hub
    if not (path / "tokenizer_config.json").is_file():
        raise UserError(f"{path} holds no tokenizer")
    return _of_model(path)


@functools.lru_cache(maxsize=1)
def _of_model(path: Path) -> TokenTexts:
    """A run that goes on makes its report again and again."""
    from sdpo_megatron.chat import load_chat

    chat = load_chat(path)
    return TokenTexts(chat.decode_all, chat.answer_ids("a")[:1])
