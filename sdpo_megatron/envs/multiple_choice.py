"""Questions with two to ten lettered options: SciKnowEval's files, and files of one's own.

A line is either SciKnowEval's as lasgroup/SDPO has it, in the paper's splits (`prompt`, `answer`, `system`, `idx`), or

    question   text
    options    list of two to ten texts; the first is A
    answer     the right letter, or several: "B", "AC"
    id         text, unique in its file; by default the line's number

for example  {"question": "What boils first?", "options": ["water", "ethanol"], "answer": "B"}
"""

import re
from typing import Annotated, Literal

from pydantic import Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.data.lines import Line, Row
from sdpo_megatron.envs.from_files import FileOptions, FromFiles
from sdpo_megatron.envs.judging.choices import LETTERS, judge, judge_as_official
from sdpo_megatron.errors import UserError, quoted
from sdpo_megatron.records import Grade, Message, Problem, Rollout

_CLOSING = "Please reason step by step."
_PROMPT = re.compile(rf"(?P<question>.+)\n\n(?P<options>A: .*)\n{re.escape(_CLOSING)}", re.DOTALL)
"""SciKnowEval's `prompt`."""
_NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class MultipleChoiceOptions(FileOptions):
    prompt: Literal["official", "recipe", "bare"] = "official"
    """What surrounds question and options. `official` is the system turn of lasgroup/SDPO's files, `recipe` that of
    tinker-cookbook's recipe; both ask for <reasoning> and <answer>. `bare` adds nothing: rollout.system_prompt may say
    how to answer."""
    grader: Literal["default", "official"] = "default"
    """`official` scores as lasgroup/SDPO's grader does, for comparison with its figures: the letter has to stand alone
    behind <answer>, or be the whole response. The default reads a choice in any form."""


class MultipleChoice(FromFiles):
    Options = MultipleChoiceOptions
    example = '{"question": ..., "options": [...], "answer": "B"}'

    @classmethod
    def problem(cls, line: Line, options: MultipleChoiceOptions) -> Problem:
        own, system = _published(line) if "prompt" in line.values else (line.fields(_Own), None)
        text = _text(own.question, own.options, closing=options.prompt != "bare")
        messages = [Message(role="user", content=text)]
        system = {
            "official": system or official_system(len(own.options)),
            "recipe": RECIPE_SYSTEM,
            "bare": None,
        }[options.prompt]
        if system:
            messages.insert(0, Message(role="system", content=system))
        return Problem(
            id=line.name(own.id),
            messages=messages,
            answer=_letters(own.answer, len(own.options), line.where),
            metadata={"options": len(own.options)},
        )

    def grade(self, problem: Problem, rollout: Rollout) -> Grade:
        if self.options.grader == "official":
            return judge_as_official(rollout.text, problem.answer)
        tags = self.options.prompt != "bare"
        return judge(rollout.text, problem.answer, problem.metadata["options"], tags=tags)


RECIPE_SYSTEM = """\
Given a question and answer options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option, and nothing else."""


def official_system(options: int) -> str:
    """Returns the system turn of SciKnowEval's files, where it says four, for another number of options."""
    letters = ", ".join(LETTERS[: options - 1]) + ("," if options > 2 else "") + f" or {LETTERS[options - 1]}"
    return (
        f"\nGiven a question and {_NUMBERS[options - 2]} options, please select the right answer. Respond in the "
        "following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\nFor the answer, only output "
        f"the letter corresponding to the correct option ({letters}), and nothing else. Do not restate the answer "
        'text. For example, if the answer is "A", just output:\n<answer>\nA\n</answer>\n'
    )


class _Own(Section):
    id: Annotated[str, Field(min_length=1)] | None = None
    question: Annotated[str, Field(min_length=1)]
    options: Annotated[list[str], Field(min_length=2, max_length=len(LETTERS))]
    answer: str


class _Published(Row):
    idx: int
    prompt: str
    answer: str
    system: str | None = None


def _published(line: Line) -> tuple[_Own, str | None]:
    """The question as a line of one's own would have it, and its system turn."""
    row = line.fields(_Published)
    parts = _PROMPT.fullmatch(row.prompt)
    options = re.split(r"\n[B-J]: ", parts["options"].removeprefix("A: ")) if parts else []
    if (
        parts is None
        or not 2 <= len(options) <= len(LETTERS)
        or _text(parts["question"], options) != row.prompt
    ):
        raise UserError(
            f"{line.where}: 'prompt' does not end with a blank line, two to {len(LETTERS)} options from 'A: ' on and "
            f"{_CLOSING!r}, as SciKnowEval's does; correct it, or write 'question' and 'options'."
        )
    own = _Own(id=str(row.idx), question=parts["question"], options=options, answer=row.answer)
    return own, row.system


def _text(question: str, options: list[str], *, closing: bool = True) -> str:
    listed = [f"{letter}: {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, "", *listed, *([_CLOSING] if closing else [])])


def _letters(answer: str, options: int, where: str) -> str:
    """The right letters, in alphabetical order."""
    found = re.findall(r"[^\s,]", answer)
    if not found or len(set(found)) < len(found) or not set(found) <= set(LETTERS[:options]):
        raise UserError(
            f"{where}: 'answer' is {quoted(answer)}; write the letter of one of the {options} options, A to "
            f"{LETTERS[options - 1]}, or several."
        )
    return "".join(sorted(found))
