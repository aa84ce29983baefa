import json
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sdpo_megatron.chat import Chat, load_chat
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Message

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As SmolLM2's: a default system turn unless there is one; and Qwen3's switch.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nDefault<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ASK = [Message(role="user", content="What is 2 + 2?")]


def make_tokenizer(
    template: str | None = TEMPLATE, eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: k for k, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, name_or_path="tiny")
    fast.chat_template = template
    return fast


def text_of(chat: Chat, tokenizer, messages) -> str:
    return tokenizer.decode(chat.prompt_ids(messages), skip_special_tokens=False)


def test_the_prompt_ends_where_the_answer_begins_and_keeps_the_templates_default():
    tokenizer = make_tokenizer()
    chat = Chat(tokenizer)
    assert text_of(chat, tokenizer, ASK) == (
        "<|im_start|>system\nDefault<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert chat.prompt_ids(ASK)[0] == 1 and all(type(i) is int for i in chat.prompt_ids(ASK))


def test_system_prompt_is_put_first_unless_there_is_one():
    tokenizer = make_tokenizer()
    chat = Chat(tokenizer, system_prompt="Ours")
    assert text_of(chat, tokenizer, ASK).startswith("<|im_start|>system\nOurs<|im_end|>\n<|im_start|>user")
    own = [Message(role="system", content="Its own"), *ASK]
    assert text_of(chat, tokenizer, own).startswith("<|im_start|>system\nIts own<|im_end|>\n<|im_start|>user")
    assert len(own) == 2 and len(ASK) == 1


def test_another_system_prompt_leaves_the_chat_as_it_is():
    chat = Chat(make_tokenizer(), system_prompt="One")
    texts = [
        one.prompt_text(ASK) for one in (chat, chat.with_system_prompt("Two"), chat.with_system_prompt(None))
    ]
    assert ["One" in texts[0], "Two" in texts[1], "Default" in texts[2]] == [True] * 3
    assert "One" in chat.prompt_text(ASK) and chat.template_arguments == {"system_prompt": "One"}


def test_template_arguments_reach_the_template():
    tokenizer = make_tokenizer()
    assert text_of(Chat(tokenizer, None, {"enable_thinking": False}), tokenizer, ASK).endswith(
        "<think></think>"
    )
    assert text_of(Chat(tokenizer, None, {"enable_thinking": True}), tokenizer, ASK).endswith("assistant\n")


def test_an_answer_ends_with_the_end_of_turn_and_decodes_without_it():
    chat = Chat(make_tokenizer())
    ids = chat.answer_ids("2 + 2 = 4 é")
    assert ids[-1] == 2 and 2 not in ids[:-1]
    assert chat.decode(ids) == "2 + 2 = 4 é"
    assert chat.decode(chat.answer_ids(" a , b .")) == " a , b ."


def test_the_tokenizer_adds_nothing_to_a_rendered_prompt():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    chat = Chat(tokenizer)
    assert chat.prompt_ids(ASK)[0] == 1
    assert 0 not in chat.answer_ids("x")


def test_stop_tokens_are_all_that_may_end_a_turn():
    assert Chat(make_tokenizer()).stop_token_ids == [2]
    # eos ends a document, the template ends a turn
    base = Chat(make_tokenizer(eos="<|endoftext|>"))
    assert base.stop_token_ids == [0, 2] and base.answer_ids("x")[-1] == 2
    assert Chat(make_tokenizer(), generation_eos_ids=[0, 7]).stop_token_ids == [0, 2, 7]


def test_a_template_that_ends_no_turn_falls_back_to_eos():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Chat(make_tokenizer(plain, "<|endoftext|>")).answer_ids("x")[-1] == 0
    with pytest.raises(UserError, match="set eos_token in tokenizer_config.json"):
        Chat(make_tokenizer(plain, None))


def test_a_template_that_refuses_the_turns():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    )
    chat = Chat(make_tokenizer(template))
    assert chat.prompt_ids(ASK)
    with pytest.raises(UserError) as caught:
        chat.prompt_ids([Message(role="system", content="s"), *ASK])
    assert str(caught.value) == (
        "The chat template in tiny refuses a conversation of the turns system, user: no system turn; change the "
        "problems, rollout.system_prompt or rollout.chat_template_kwargs."
    )


def test_the_largest_id_is_the_tokenizers():
    tokenizer = make_tokenizer()
    assert Chat(tokenizer).largest_id == len(SPECIAL) + 255
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})  # no prompt has it
    assert Chat(tokenizer).largest_id == len(SPECIAL) + 255


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_the_model_does_not_know_is_spelled_out(special: bool):
    tokenizer = make_tokenizer()
    vocab = len(tokenizer)
    tokenizer.add_tokens(["[PAD]", "€"], special_tokens=special)
    chat = Chat(tokenizer, vocab=vocab)
    messages: list[Message] = [{"role": "user", "content": "a[PAD]b [PAD] €"}]
    ids = chat.prompt_ids(messages)
    assert ids.count(vocab) == 2 and ids.count(vocab + 1) == 1
    known = chat.known_ids(ids)
    assert max(known) < vocab
    # a single character cannot be spelled otherwise, and is left out
    assert tokenizer.decode(known) == str(tokenizer.decode(ids)).replace("€", "")
    harmless = chat.prompt_ids([{"role": "user", "content": "a"}])
    assert chat.known_ids(harmless) is harmless
    assert Chat(tokenizer).known_ids(ids) is ids


def test_no_chat_template():
    with pytest.raises(UserError, match="The tokenizer in tiny has no chat template"):
        Chat(make_tokenizer(None))


@pytest.mark.parametrize(("eos", "stops"), [(None, [2]), (0, [0, 2]), ([0, 2, 9], [0, 2, 9])])
def test_load_chat_reads_the_generation_config(tmp_path, eos, stops):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_chat(tmp_path).stop_token_ids == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
    chat = load_chat(tmp_path, "Ours", {"enable_thinking": False})
    assert chat.stop_token_ids == stops
    assert chat.prompt_ids(ASK) == Chat(make_tokenizer(), "Ours", {"enable_thinking": False}).prompt_ids(ASK)


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_of_a_template_that_opens_them(special):
    tokenizer = make_tokenizer(TEMPLATE.replace("<think></think>", "<think>\n</think>\n"))
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    closed = Chat(tokenizer, None, {"enable_thinking": False})
    assert not closed.opens_thought(closed.prompt_ids(ASK))
    tokenizer.chat_template = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    chat = Chat(tokenizer)
    prompt = chat.prompt_ids(ASK)
    assert chat.opens_thought(prompt)
    separated = chat.separate(prompt, chat.answer_ids("I guess 7</think>4"))
    assert (separated.thought, separated.answer, separated.closed) == ("I guess 7", "4", True)
    assert chat.separate(prompt, chat.answer_ids("I guess 74")).closed is False


def test_a_question_about_a_marker_opens_no_thought():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    chat = Chat(tokenizer)
    prompt = chat.prompt_ids([Message(role="user", content="What is <think>")])
    assert not chat.opens_thought(prompt)
    assert chat.separate(prompt, chat.answer_ids("A marker.")).answer == "A marker."


def test_one_thread_may_decode_while_another_tokenises():
    """Records are decoded beside training. A tokenizer is changed by its first use alone, where its file cuts or
    fills texts; a change beside a use raises "Already borrowed"."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    chat = Chat(tokenizer)
    ids = chat.prompt_ids(ASK)
    assert len(ids) > 8
    text, ended, decoded = chat.decode_all(ids), threading.Event(), []

    def decode() -> None:
        while not ended.is_set():
            decoded.append(chat.decode_all(ids) == text)

    thread = threading.Thread(target=decode)
    thread.start()
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        assert chat.prompt_ids(ASK) == ids
    ended.set()
    thread.join()
    assert len(decoded) > 10 and all(decoded)


def test_a_tokenizer_that_is_a_program_is_not_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "program.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nProgram = object\n")
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "Program", "auto_map": {"AutoTokenizer": ["program.Program", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    with pytest.raises(UserError) as caught:
        load_chat(tmp_path)
    assert str(caught.value) == (
        f"The tokenizer in {tmp_path} is a program of its own (auto_map in tokenizer_config.json), and no model's "
        "programs are run here: take a model whose tokenizer transformers knows."
    )
    assert not (tmp_path / "proof").exists()
