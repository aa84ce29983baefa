"""Which of several lettered options a response chooses."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from sdpo_megatron.envs.judging.boxed import last_boxed
from sdpo_megatron.records import Grade

LETTERS = "ABCDEFGHIJ"
_DRESS = re.compile(r"\*+|__|[`$]|\\[()\[\]]")
_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|mathit)(?:bf|rm|it)?\s*\{([^{}]*)\}")
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
# A letter with a word behind it is no choice ("A force acts", "B cells") unless the word goes on with the sentence.
_ON = "because|since|as|and|or|is|are|for|with|due|which|from|based|but|if|given|by|in|after|considering"
_NAMES = r"(?i:\b(?:answers?|ans|choice|option|selection|conclusion)\b|correct\s+one|答案)"
_STATES = (
    r"(?i:\s+(?:to|for|of|among|from)\b[^.:\n]{0,80}?)?[\"']?\s*"
    r"(?i:\b(?:is|are|(?:would|should|must|will|has\s+to|can\s+only|seems\s+to|appears\s+to)\s+be|becomes)\b|是|为"
    r"|[:=–—]|-+>?|→|(?<=\bans)\.|(?<=answer)\s*\n)[\s:]*"
    r"(?i:(?:therefore|thus|hence|clearly|likely|most\s+likely|probably|definitely|indeed|simply)\b[\s,:]*)?"
)
_TAKES = r"(?i:\b(?:choose|choosing|chose|select|selecting|pick|picking|go(?:ing)?\s+with|opt\s+for)\s+)"
_PRAISED = (
    r"\s+(?i:(?:is|are|must\s+be|should\s+be)\s+(?:(?:therefore|thus|clearly|indeed|both|all)\s+)?(?:the\s+)?"
    r"(?:only\s+|most\s+|best\s+|one\s+)*(?:correct|right|answer|best|appropriate)\b)"
)
_NOT_REFUSED = r"(?!\s+(?:is|are)\s+(?:not|wrong|incorrect|false)\b)"
_UNMEANT = re.compile(
    r"(?:\b(?:wrong|incorrect|false)|\bif|\bwhether|\bunless|(?:\bnot|n't)\s+(?:think|believe|say|mean)(?:\s+that)?)"
    r"(?:\s+(?:the|my|your|correct|right|final))*\s*$",
    re.IGNORECASE,
)
_SPECIES = (
    r"(?!\.\s*(?:coli|elegans|melanogaster|thaliana|subtilis|cereus|anthracis|difficile|botulinum|albicans|rerio"
    r"|discoideum|faecalis|sapiens|pylori|influenzae|gallus|tumefaciens|burgdorferi)\b)"
)
"""Behind a genus cut to its letter; nothing else tells `C. elegans` from `C. increases`."""
_LEAD = (
    r"(?i:(?:so|thus|therefore|hence|it's|it\s+is|it\s+must\s+be|that's|this\s+is|(?:final\s+)?answer|conclusion|∴|=>|→|->|[-#>•]+)"
    r"[\s,:]+)*"
)


@dataclass(frozen=True)
class _Patterns:
    """For one number of options."""

    one: re.Pattern[str]
    """A letter, in one of its groups."""
    stated: re.Pattern[str]
    """A letter or several behind words that say that here comes the answer."""
    hinted: re.Pattern[str]
    """The same in a weaker form: "I choose B", "B is correct"."""
    alone: re.Pattern[str]
    """A text that is a choice and nothing else."""
    labelled: re.Pattern[str]
    """A text that begins with an option's letter and goes on with its words."""
    behind: re.Pattern[str]
    """A text that ends with a letter in brackets."""


@cache
def _patterns(options: int) -> _Patterns:
    if not 2 <= options <= len(LETTERS):
        raise ValueError(f"{options} options; there can be 2 to {len(LETTERS)}")
    upper = f"[A-{LETTERS[options - 1]}]"
    either = f"[A-{LETTERS[options - 1]}a-{LETTERS[options - 1].lower()}]"
    one = (
        r"(?<![A-Za-z0-9_])(?i:(?:the\s+)?(?:options?|choices?|letters?)\s*:?\s*)?"
        rf"(?:[(\[{{]\s*({either})\s*[)\]}}]|[\"'“‘]({upper})[\"'”’]"
        rf"|({upper})(?![ \t]+(?!(?:{_ON})\b)[a-z])|({either})(?=[.)]?\s*$))"
        # no part of a word, a formula (C(=O)O, F = ma) or a compound (B-cell)
        r"(?![\w(\[=#@+/\\]|\s*=|['’-][A-Za-z])" + _SPECIES
    )
    several = rf"{one}(?:\s*(?:,\s*and|[,;&/]|\band)\s*{one}){{0,9}}(?P<undecided>,?\s+or\s+{one})?"
    joined = rf"(?={upper})" + r"\s*".join(f"{letter}?" for letter in LETTERS[:options])
    return _Patterns(
        one=re.compile(one, re.MULTILINE),
        stated=re.compile(rf"(?P<before>{_NAMES}{_STATES})(?P<group>{several}){_NOT_REFUSED}", re.MULTILINE),
        hinted=re.compile(
            rf"{_TAKES}(?P<group>{several})(?!\s+as\b)|(?P<praised>{several}){_PRAISED}".replace(
                "P<undecided>", "P<undecided_too>", 1
            ),
            re.MULTILINE,
        ),
        alone=re.compile(rf"{_LEAD}(?P<group>{several}|{joined}|{either})\s*[.)!:]*"),
        labelled=re.compile(rf"{_LEAD}(?P<group>{one}){_NOT_REFUSED}\s*(?:[.:),–—-]\s*|\s)\S.*", re.DOTALL),
        behind=re.compile(rf".*\s[(\[](?P<group>{either})[)\]]\.?", re.DOTALL),
    )


def chosen(text: str, options: int) -> str | None:
    """Returns the letters that a response chooses, in alphabetical order ("B", "AC"), or None where it chooses none.

    `options` is their number, 2 to 10, from A on; ValueError for another. The last <answer> counts, else the last box,
    else the last statement such as "the answer is B", else a last or first line that is nothing but an option. A
    response that leaves open which ("A or B") or that only names an option's words has chosen none.
    """
    patterns = _patterns(options)
    tags = _TAG.findall(text)
    if tags:
        text = tags[-1]
    if (box := last_boxed(text)) is not None:
        return _short(_undressed(box), patterns)
    text = _undressed(text)
    if tags:
        return _short(text, patterns) or _stated(text, patterns)
    return _stated(text, patterns) or _line(text, patterns)


def judge(text: str, answer: str, options: int, *, tags: bool) -> Grade:
    """A response is right if it chooses the letters of `answer`, which are as `chosen` returns them, in whatever form.

    With `tags` the format is correct where the response ends with its only <answer>, which holds the letters and
    nothing else; without, where it chooses at all. The feedback does not name the right letters.
    """
    letters = chosen(text, options)
    if letters is None:
        last = LETTERS[options - 1]
        return Grade(
            reward=0.0,
            feedback=f"The response chooses none of the options A to {last}.",
            correct_format=False,
            answer="",
        )
    correct_format = not tags or _ends_with_tags(text, options)
    if letters == answer:
        return Grade(reward=1.0, correct_format=correct_format, answer=letters)
    feedback = f"{', '.join(letters)} is wrong."
    return Grade(reward=0.0, feedback=feedback, correct_format=correct_format, answer=letters)


def judge_as_official(text: str, answer: str) -> Grade:
    """Scores as SDPO's published grader does (lasgroup/SDPO, feedback/mcq.py), for comparison with its figures.

    What stands behind the last <answer>, or the whole response where there is none, has to be the letter. The
    published grader reports its format flag the wrong way round; here it is true where the format is right.
    """
    found = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    tagged = re.search(r"<answer>\s*[A-D]\s*</answer>\n?\Z", text) is not None
    return Grade(reward=float(found == answer), correct_format=tagged, answer=found)


def _ends_with_tags(text: str, options: int) -> bool:
    letter = f"[A-{LETTERS[options - 1]}]"
    tags = rf"<answer>\s*{letter}(?:\s*,\s*{letter})*\s*</answer>\s*\Z"
    return text.count("<answer>") == 1 and re.search(tags, text) is not None


def _undressed(text: str) -> str:
    """The text without what only concerns its looks: Markdown's emphasis, TeX's, full-width characters."""
    text = unicodedata.normalize("NFKC", text)
    return _DRESS.sub("", _COMMAND.sub(r"\1", text)).strip()


def _letters(group: str, patterns: _Patterns) -> str:
    found = [next(filter(None, one.groups())) for one in patterns.one.finditer(group)]
    if not found:
        found = re.findall("[A-Ja-j]", group)
    return "".join(sorted(set("".join(found).upper())))


def _short(text: str, patterns: _Patterns) -> str | None:
    """The choice that a tag, a box or a line holds."""
    if match := patterns.alone.fullmatch(text):
        return None if match["undecided"] else _letters(match["group"], patterns)
    if match := patterns.labelled.fullmatch(text):
        return _letters(match["group"], patterns)
    if match := patterns.behind.fullmatch(text):
        return match["group"].upper()
    return None


def _stated(text: str, patterns: _Patterns) -> str | None:
    stated = [match for match in patterns.stated.finditer(text) if not _unmeant(text, match)]
    if stated and not stated[-1]["undecided"]:
        return _letters(stated[-1]["group"], patterns)
    after = stated[-1].end() if stated else 0
    hinted = [match for match in patterns.hinted.finditer(text, after) if not _unmeant(text, match)]
    if not hinted or hinted[-1]["undecided"] or hinted[-1]["undecided_too"]:
        return None
    return _letters(hinted[-1]["group"] or hinted[-1]["praised"], patterns)


def _unmeant(text: str, match: re.Match[str]) -> bool:
    return _UNMEANT.search(text[max(0, match.start() - 60) : match.start()]) is not None


def _line(text: str, patterns: _Patterns) -> str | None:
    """The choice of the last line, else of the first. Where several lines begin as options do, the response lists
    them, and none of these is a choice."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    listed = {m["group"] for line in lines if (m := patterns.labelled.fullmatch(line))}
    for line in [*lines[-1:], *lines[:1]]:
        if len(listed) > 1 and not patterns.alone.fullmatch(line):
            continue
        if letters := _short(line, patterns):
            return letters
    return None
