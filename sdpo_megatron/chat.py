"""Conversations to token ids and back; the same for student, teacher and evaluation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdpo_megatron.algorithm.thoughts import Separated, Thoughts
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Message


class Chat:
    """A tokenizer and its chat template. What the template adds by itself (a default system turn) is kept."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        generation_eos_ids: Sequence[int] = (),
    ) -> None:
        """`generation_eos_ids` are what the model's generation_config.json calls eos, besides the tokenizer's.

        Raises UserError if the tokenizer has no chat template or nothing ends a turn.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template: use an instruction-tuned "
                "model, or add chat_template.jinja to its directory."
            )
        # Any: the results of its methods are annotated as unions over all ways to call them.
        self._tokenizer: Any = tokenizer
        self._system_prompt = system_prompt
        self._kwargs = dict(chat_template_kwargs or {})
        eos_ids = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        self._end_of_turn = self._find_end_of_turn([*generation_eos_ids, *eos_ids])
        self.stop_token_ids: list[int] = sorted({self._end_of_turn, *generation_eos_ids, *eos_ids})
        """Sampling one of these ends a response."""
        self._thoughts = Thoughts(self._tokenizer.get_vocab(), self.decode, self.decode_all)

    @property
    def largest_id(self) -> int:
        """The largest id among plain text and the template's tokens; what was added and is used nowhere, such as
        padding, does not count."""
        template = self.prompt_ids([Message(role="user", content="?")])
        return max(self._tokenizer.vocab_size - 1, self._end_of_turn, *template)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Returns the token ids up to where the assistant's turn begins; `tools` are schemas for the template."""
        return self._tokenizer.encode(self._render(messages, True, tools), add_special_tokens=False)

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

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        conversation = list(messages)
        if self._system_prompt is not None and (not conversation or conversation[0]["role"] != "system"):
            conversation.insert(0, Message(role="system", content=self._system_prompt))
        try:
            return self._tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._kwargs,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise UserError(
                f"The chat template in {self._tokenizer.name_or_path} refuses a conversation of the turns {roles}: "
                f"{error}; change the problems, rollout.system_prompt or rollout.chat_template_kwargs."
            ) from None

    def _find_end_of_turn(self, eos_ids: Sequence[int]) -> int:
        """The special token that the template writes behind an answer; else an eos token.

        The two differ for some models, for example where eos ends a document and another token a turn.
        """
        answer = "ANSWER"
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        behind = self._render(turns, False).rpartition(answer)[2]
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
    directory: Path, system_prompt: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Chat:
    """Loads the Chat of a Hugging Face directory; its generation_config.json may name further eos tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(directory))
    config_file = directory / "generation_config.json"
    eos = (
        json.loads(config_file.read_text(encoding="utf-8")).get("eos_token_id")
        if config_file.exists()
        else None
    )
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Chat(tokenizer, system_prompt, chat_template_kwargs, eos_ids)
