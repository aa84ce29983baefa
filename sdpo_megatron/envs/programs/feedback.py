"""What a program's author is told: the most telling failure, in a form that contests have, and short."""

from collections.abc import Sequence

from sdpo_megatron.envs.programs.results import Result

INPUT_LINES, PRINTED_LINES, FIELD_CHARACTERS, CHARACTERS = 8, 10, 250, 2000
WRONG_ANSWERS = 2
NO_PROGRAM = (
    "Incorrect Format: the answer holds no complete program. Write the whole program in one block that begins with "
    "```python and ends with ```."
)
CUT_OFF = (
    "Incorrect Format: the answer was cut off at its greatest length before its program was complete. Answer shorter, "
    "with the whole program in one block that begins with ```python and ends with ```."
)
HIDDEN = "The test is not shown."
LIMITS = {
    "time": "Time Limit Exceeded",
    "memory": "Memory Limit Exceeded",
    "output": "Output Limit Exceeded",
}


def feedback_on(results: Sequence[Result], show_private: bool) -> str:
    """Returns what to tell of results that are not all passed: an error first, then a limit, then the shortest wrong
    answers, of tests that may be shown before others. Nothing of the tests that may not but how the program failed."""
    failed = [result for result in results if result.ending != "passed"]

    def shown(result: Result) -> bool:
        return result.case is not None and (show_private or result.case.public)

    for endings in (("syntax",), ("error", "crash"), ("time", "memory", "output")):
        found = [result for result in failed if result.ending in endings]
        if found:
            result = next(filter(shown, found), found[0])
            parts = [_failure(result, shown(result) or result.case is None)]
            return _cut([*parts, _input("Last Executed Input", result) if shown(result) else ""])
    wrong = sorted(filter(shown, failed), key=lambda result: len(result.case.input) if result.case else 0)
    if not wrong:
        return f"Wrong Answer\n\n{HIDDEN}" if failed else ""
    return _cut(["Wrong Answer", *(_comparison(result) for result in wrong[:WRONG_ANSWERS])])


def _failure(result: Result, shown: bool) -> str:
    """An exception's message may hold the test's input: where that is not shown, its type alone is."""
    if result.ending in LIMITS:
        return LIMITS[result.ending]
    if result.ending == "syntax":
        source = "".join(f"\n    {source}" for _, _, source in result.frames)
        return f"Syntax Error: the program does not compile.\n{_field(result.error)}{source}"
    error = result.error if shown else result.error.partition(":")[0]
    if result.ending == "crash":
        why = f": {_field(error)}" if error else "."
        return f"Runtime Error\nThe program ended without an answer{why}"
    lines = [f"  line {number}, in {name}: {_field(source)}" for number, name, source in result.frames]
    return "\n".join(["Runtime Error", _field(error), *lines])


def _comparison(result: Result) -> str:
    case = result.case
    assert case is not None
    parts = [_input("Input", result), f"Output:\n{_field(result.output) or '(nothing)'}"]
    if case.kind == "check":
        parts = [
            f"Test:\n{_field(result.statement)}",
            *([f"Last value:\n{_field(result.output)}"] if result.output else []),
        ]
        parts += [_field(result.error)] if result.error else []
    else:
        parts.append(f"Expected:\n{_field(case.expected)}")
    if case.kind != "stdin" and result.printed.strip():
        parts.append(f"Printed:\n{_field(result.printed, PRINTED_LINES)}")
    return "\n".join(parts)


def _input(title: str, result: Result) -> str:
    assert result.case is not None
    return f"{title}:\n{_field(result.case.input)}"


def _field(text: str, most_lines: int = INPUT_LINES) -> str:
    """Cut to so many lines and characters, which shows."""
    lines = text.strip().splitlines()
    cut = "\n".join(lines[:most_lines])
    shown = cut[:FIELD_CHARACTERS]
    return shown + ("..." if len(lines) > most_lines or len(cut) > FIELD_CHARACTERS else "")


def _cut(parts: Sequence[str]) -> str:
    return "\n\n".join(filter(None, parts))[:CHARACTERS]
