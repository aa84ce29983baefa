"""Thought and answer, by ids and by text, with a tokenizer of one token per letter and, if it has them, per marker."""

import re
import time

import pytest

from sdpo_megatron.algorithm.thoughts import MARKERS, Separated, Thoughts

LETTERS = [chr(k) for k in range(32, 127)] + ["\n"]
END = "<|end|>"


class Letters:
    def __init__(self, *markers: str, special: bool = False):
        self.tokens = [*LETTERS, END, *markers]
        self.dropped = {END, *(markers if special else ())}
        self.vocabulary = {token: k for k, token in enumerate(self.tokens)}
        self.thoughts = Thoughts(self.vocabulary, self.decode, self.decode_all)

    def encode(self, text: str) -> list[int]:
        longest_first = sorted(self.tokens, key=len, reverse=True)
        return [self.vocabulary[t] for t in re.findall("|".join(map(re.escape, longest_first)), text)]

    def decode(self, ids) -> str:
        return "".join(self.tokens[i] for i in ids if self.tokens[i] not in self.dropped)

    def decode_all(self, ids) -> str:
        return "".join(self.tokens[i] for i in ids)

    def separate(self, text: str, opened: bool = False) -> Separated:
        return self.thoughts.separate(self.encode(text), opened)


TOKENIZERS = {
    "tokens": Letters("<think>", "</think>"),
    "special tokens": Letters("<think>", "</think>", special=True),
    "text": Letters(),
}
CASES = [
    # response, opened by the prompt: thought, answer, closed
    ("4", False, "", "4", True),
    (" 4\n", False, "", " 4\n", True),
    ("", False, "", "", True),
    ("<think>x</think>\n\n4", False, "x", "4", True),
    ("<think>\nI guess 7\n</think>\n\n4", False, "I guess 7", "4", True),
    ("I guess 7</think>4", True, "I guess 7", "4", True),
    ("</think>4", True, "", "4", True),
    ("<think></think>\n\n4", False, "", "4", True),
    # cut off, or ended, inside the thought
    ("<think>it is 4", False, "it is 4", "", False),
    ("it is 4", True, "it is 4", "", False),
    ("", True, "", "", False),
    ("<think>", False, "", "", False),
    ("it is 4<|end|>", True, "it is 4", "", False),
    ("4 <think>or 5", False, "4 or 5", "", False),
    ("<think>a</think>4<think>b", False, "a4b", "", False),
    # cut off behind it
    ("<think>x</think>", False, "x", "", True),
    # several, nested, never opened
    ("<think></think>x<think>b</think> y", False, "b", "x y", True),
    ("<think>a<think>b</think>c</think>d", False, "abc", "d", True),
    ("nothing opened it</think>\n4", False, "nothing opened it", "4", True),
    ("x<think>a</think>y</think>4", False, "xay", "4", True),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("text", "opened", "thought", "answer", "closed"), CASES)
def test_thought_and_answer(kind, text, opened, thought, answer, closed):
    expected = Separated(thought=thought, answer=answer, closed=closed)
    assert TOKENIZERS[kind].separate(text, opened) == expected


@pytest.mark.parametrize("pair", MARKERS)
@pytest.mark.parametrize("are_tokens", [True, False])
def test_every_pair_of_markers(pair, are_tokens):
    tokenizer = Letters(*pair) if are_tokens else Letters()
    opening, closing = pair
    assert tokenizer.separate(f"{opening}x{closing}4").answer == "4"
    assert not tokenizer.separate(f"{opening}x").closed
    assert tokenizer.thoughts.opened_by(tokenizer.encode(f"<|end|>assistant\n{opening}\n"))


def test_where_the_markers_are_tokens_their_letters_are_none():
    tokenizer = TOKENIZERS["tokens"]
    spelled = [tokenizer.vocabulary[letter] for letter in "<think>4"]
    assert tokenizer.thoughts.separate(spelled, False) == Separated(
        thought="", answer="<think>4", closed=True
    )
    assert tokenizer.separate("[THINK]4").answer == "[THINK]4"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("What?<|end|>assistant\n<think>\n", True),
        ("What?<|end|>assistant<think>", True),
        ("What?<|end|>assistant\n", False),
        ("What?<|end|>assistant\n<think>\n\n</think>\n\n", False),
        # what a user wrote
        ("What is <think>?<|end|>assistant\n", False),
        ("What is <think><|end|>assistant\n", False),
        ("[INST] What is <think> [/INST]", False),
        ("", False),
    ],
)
def test_whether_the_prompt_began_the_thought(kind, prompt, opened):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.thoughts.opened_by(tokenizer.encode(prompt)) == opened


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_response_of_markers_only_takes_no_time(kind):
    ids = TOKENIZERS[kind].encode("<think></think>") * 20_000
    began = time.process_time()
    assert TOKENIZERS[kind].thoughts.separate(ids, False).closed
    assert time.process_time() - began < 10  # measured: 0.3 to 1.1
