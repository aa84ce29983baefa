"""A tokenizer whose tokens are bytes, written with `json` alone: what a preflight reads of one, in a millisecond."""

import json
from collections.abc import Sequence
from pathlib import Path

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking == false %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)


def write_tokenizer(
    directory: Path, template: str | None = CHAT_TEMPLATE, *, more: Sequence[tuple[str, int]] = ()
) -> None:
    """tokenizer.json and tokenizer_config.json of 259 tokens; `more` are added ones with their ids."""
    # the printable characters that stand for bytes in a byte-level BPE
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    alphabet = [chr(b) for b in shown] + [chr(256 + k) for k in range(len(hidden))]
    added = [*((token, k) for k, token in enumerate(SPECIAL)), *more]
    traits = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": k, "content": token, **traits} for token, k in added],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: k for k, token in enumerate([*SPECIAL, *sorted(alphabet)])} | dict(more),
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
