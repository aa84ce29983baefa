"""Conversations to token ids and back; the same for student, teacher and evaluation."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdpo_megatron.algorithm.thoughts import Separated, Thoughts
from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.errors import UserError, one_line
from sdpo_megatron.files import read_text
from sdpo_megatron.records import Message


class Chat:
    """A tokenizer and its chat template. What the template adds by itself (a default system turn) is kept."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        generation_eos_ids: Sequence[int] = (),
        vocab: int | None = None,
    ) -> None:
        """`generation_eos_ids` are what the model's generation_config.json calls eos, besides the tokenizer's. `vocab`
        is how many tokens the model knows, None for as many as the tokenizer.

        Raises UserError if the tokenizer has no chat template or nothing ends a turn.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template: use an instruction-tuned "
                "model, or add chat_template.jinja to its directory."
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has the chat templates "
                f"{', '.join(tokenizer.chat_template)}, none of them called default: add chat_template.jinja to its "
                "directory."
            )
        # Any: the results of its methods are annotated as unions over all ways to call them.
        self._tokenizer: Any = tokenizer
        self._system_prompt = system_prompt
        self._kwargs = dict(chat_template_kwargs or {})
        self._vocab = vocab
        eos_ids = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self._end_of_turn = self._find_end_of_turn([*generation_eos_ids, *eos_ids])
        self.stop_token_ids: list[int] = sorted({self._end_of_turn, *generation_eos_ids, *eos_ids})
        """Sampling one of these ends a response."""
        self._thoughts = Thoughts(self._tokenizer.get_vocab(), self.decode, self.decode_all)

    def with_system_prompt(self, system_prompt: str | None) -> "Chat":
        """Returns the same chat with another system prompt, or none."""
        chat = copy.copy(self)
        chat._system_prompt = system_prompt
        return chat

    @property
    def largest_id(self) -> int:
        """The largest id among plain text and the template's tokens; what was added and is used nowhere, such as
        padding, does not count."""
        template = self.prompt_ids([Message(role="user", content="?")])
        return max(self._tokenizer.vocab_size - 1, self._end_of_turn, *template)

    @property
    def name(self) -> str:
        """The directory of the tokenizer."""
        return str(self._tokenizer.name_or_path)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """What is handed to the template, and the system prompt."""
        system = {} if self._system_prompt is None else {"system_prompt": self._system_prompt}
        return self._kwargs | system

    @property
    def template(self) -> str:
        """The chat template's source."""
        return str(self._tokenizer.chat_template)

    def has_ids_from(self, vocab: int) -> bool:
        """Returns whether some text has a token id of `vocab` or above."""
        return max(self._tokenizer.get_vocab().values()) >= vocab

    def prompt_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Returns what `prompt_ids` are the ids of; `arguments` go to the template in place of its own. Without
        `add_generation_prompt` it ends where the last turn does."""
        conversation = list(messages)
        if self._system_prompt is not None and (not conversation or conversation[0]["role"] != "system"):
            conversation.insert(0, Message(role="system", content=self._system_prompt))
        try:
            return self._tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(self._kwargs if arguments is None else arguments),
            )
        # a template is a program, which may raise anything
        except Exception as error:
            roles = ", ".join(message["role"] for message in conversation)
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"The chat template in {self.name} refuses a conversation of the turns {roles}: {one_line(said)}; "
                "change the problems, rollout.system_prompt or rollout.chat_template_kwargs."
            ) from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, as it is."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Returns the token ids up to where the assistant's turn begins; `tools` are schemas for the template."""
        return self._tokenizer.encode(self.prompt_text(messages, tools), add_special_tokens=False)

    def known_ids(self, ids: list[int]) -> list[int]:
        """Returns the ids with each that the model does not know, such as of padding that was added behind its
        vocabulary, spelled out by ids that it does: a response may hold the text of any token."""
        vocab = self._vocab
        if vocab is None or max(ids, default=0) < vocab:
            return ids
        return [
            known
            for token_id in ids
            for known in ([token_id] if token_id < vocab else self._spelled(token_id, vocab))
        ]

    def answer_ids(self, text: str) -> list[int]:
        """Returns what a model would have to sample to answer `text`: its tokens and the one that ends a turn."""
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._end_of_turn]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Returns the text with special tokens, as the model reads it."""
        return self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Returns whether the template began a thought at the end of this prompt."""
        return self._thoughts.opened_by(prompt_ids)

    def separate(self, prompt_ids: Sequence[int], response_ids_T: Sequence[int]) -> Separated:
        """Returns thought and answer of a response to this prompt."""
        return self._thoughts.separate(response_ids_T, self.opens_thought(prompt_ids))

    def _spelled(self, token_id: int, vocab: int) -> list[int]:
        text = self.decode_all([token_id])
        # cut in two it is that token no more; what cannot be cut is left out
        return [known for part in self.encode([text[:1], text[1:]]) for known in part if known < vocab]

    def _find_end_of_turn(self, eos_ids: Sequence[int]) -> int:
        """The special token that the template writes behind an answer; else an eos token.

        The two differ for some models, for example where eos ends a document and another token a turn.
        """
        answer = "ANSWER"
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        behind = self.prompt_text(turns, add_generation_prompt=False).rpartition(answer)[2]
        # all_special_ids holds only those with a role of their own, such as eos.
        added = self._tokenizer.added_tokens_decoder.items()
        special = {*(token_id for token_id, token in added if token.special), *eos_ids}
        for token_id in self._tokenizer.encode(behind, add_special_tokens=False):
            if token_id in special:
                return token_id
        if not eos_ids:
            raise UserError(
                f"The tokenizer in {self._tokenizer.name_or_path} has no eos_token and its chat template "
                "ends no turn: set eos_token in tokenizer_config.json."
            )
        return eos_ids[-1]


def load_chat(
    directory: Path,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    vocab: int | None = None,
) -> Chat:
    """Loads the Chat of a Hugging Face directory; its generation_config.json may name further eos tokens."""
    try:
        # without a word transformers would ask the terminal for it
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"The tokenizer in {directory} is a program of its own (auto_map in tokenizer_config.json), and no model's "
            "programs are run here: take a model whose tokenizer transformers knows."
        ) from None
    config_file = directory / "generation_config.json"
    eos = json.loads(read_text(config_file)).get("eos_token_id") if config_file.is_file() else None
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Chat(tokenizer, system_prompt, chat_template_kwargs, eos_ids, vocab)


def build_chat(directory: Path, rollout: RolloutSettings, vocab: int) -> Chat:
    """Loads the tokenizer and its template. Raises UserError where it has ids that a model of `vocab` tokens does
    not."""
    chat = load_chat(directory, rollout.system_prompt, rollout.chat_template_kwargs, vocab)
    if chat.largest_id >= vocab:
        raise UserError(
            f"The tokenizer in {directory} has token ids up to {chat.largest_id}, but config.json says vocab_size "
            f"{vocab}: take the tokenizer that belongs to the model."
        )
    return chat
