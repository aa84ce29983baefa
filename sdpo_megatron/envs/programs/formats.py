"""Sets of questions as they are published, and a form for one's own: a row becomes a problem whose metadata hold its
tests."""

import ast
import builtins
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import Field

from sdpo_megatron.config import Section
from sdpo_megatron.envs.data.lines import Line, Row
from sdpo_megatron.envs.programs.cases import Case, Suite
from sdpo_megatron.envs.programs.packed import unpacked
from sdpo_megatron.errors import UserError
from sdpo_megatron.records import Message, Problem

WRITE = "Write the whole program in one block that begins with ```python and ends with ```."
STDIN = f"Write a Python program that reads the input from standard input and prints the answer.\n{WRITE}"
STARTER = f"Complete this code:\n\n```python\n{{code}}\n```\n\n{WRITE}"


class HumanEvalRow(Row):
    task_id: str
    prompt: str
    entry_point: str = Field(min_length=1)
    test: str


def humaneval(line: Line) -> Problem:
    """One hidden test: the set's function `check`. What the prompt defines is there for program and test."""
    row = line.fields(HumanEvalRow)
    _compiles(row.prompt, f"{line.where}: 'prompt'")
    source = f"{row.test}\n\ncheck({row.entry_point})\n"
    _compiles(source, f"{line.where}: 'test'")
    prompt = STARTER.format(code=row.prompt.strip("\n"))
    tests = Suite((Case("check", source),), preamble=row.prompt, program_names=(row.entry_point,))
    return _problem(row.task_id, prompt, tests)


class MbppRow(Row):
    task_id: int | str
    prompt: str | None = None
    text: str | None = None
    code: str = ""
    test_list: list[str] = Field(min_length=1)
    test_imports: list[str] = []
    test_setup_code: str = ""


def mbpp(line: Line) -> Problem:
    """Each assertion is a test, and all stand in the question, as the set's authors have it: without them the
    function's name is unknown."""
    row = line.fields(MbppRow)
    words = row.prompt or row.text
    if not words:
        raise UserError(f"{line.where}: 'prompt' is missing; add it. {line.shown()}")
    preamble = "\n".join([*row.test_imports, row.test_setup_code])
    _compiles(preamble, f"{line.where}: 'test_imports'")
    for test in row.test_list:
        _compiles(test, f"{line.where}: 'test_list'")
    prompt = "\n\n".join([words, "The program must pass these tests:", "\n".join(row.test_list), WRITE])
    cases = tuple(Case("check", test, public=True) for test in row.test_list)
    _compiles(row.code, f"{line.where}: 'code'")
    names = _program_names(row.test_list, preamble, row.code)
    return _problem(str(row.task_id), prompt, Suite(cases, preamble=preamble, program_names=names))


class LiveCodeBenchRow(Row):
    question_id: str
    question_content: str
    starter_code: str = ""
    public_test_cases: str
    private_test_cases: str
    metadata: str | dict[str, Any] = "{}"


def livecodebench(line: Line) -> Problem:
    """The rows of code_generation_lite: public tests, and private ones that are compressed."""
    row = line.fields(LiveCodeBenchRow)
    metadata = _json(row.metadata, line, "metadata")
    function = str(metadata.get("func_name") or "") if isinstance(metadata, dict) else ""
    public = _tests(
        _json(row.public_test_cases, line, "public_test_cases"), line, "public_test_cases", function, True
    )
    try:
        private_tests = unpacked(row.private_test_cases)
    except ValueError as error:
        raise UserError(f"{line.where}: 'private_test_cases': {error}.") from None
    private = _tests(private_tests, line, "private_test_cases", function, False)
    return _problem(
        row.question_id, _prompt(row.question_content, row.starter_code), Suite((*public, *private), function)
    )


class DeepCoderRow(Row):
    problem: str
    tests: str | list[Any] | dict[str, Any]
    starter_code: str | None = None
    metadata: str | dict[str, Any] | None = None


def deepcoder(line: Line) -> Problem:
    """The rows of DeepCoder's parts: a list of tests, or inputs and outputs side by side; all hidden. A row's number is
    its id."""
    row = line.fields(DeepCoderRow)
    tests, metadata = _json(row.tests, line, "tests"), _json(row.metadata or {}, line, "metadata")
    function = str(metadata.get("func_name") or "") if isinstance(metadata, dict) else ""
    if isinstance(tests, dict):
        function = str(tests.get("fn_name") or function)
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise UserError(f"{line.where}: 'tests' needs 'inputs' and 'outputs', two lists of one length.")
        pairs = zip(inputs, outputs, strict=True)
        tests = [{"input": given, "output": wanted, "wrapped": True} for given, wanted in pairs]
    elif isinstance(tests, list) and tests and isinstance(tests[0], dict) and not function:
        # PrimeIntellect's part says it in each test, LiveCodeBench's in each test's own metadata
        function = str(tests[0].get("fn_name") or (tests[0].get("metadata") or {}).get("func_name") or "")
    cases = _tests(tests, line, "tests", function, False)
    return _problem(str(line.number), _prompt(row.problem, row.starter_code or ""), Suite(cases, function))


class OwnTest(Section):
    input: str | None = None
    output: str | None = None
    arguments: list[Any] | None = None
    result: Any = None
    check: str | None = None
    public: bool = False


class OwnRow(Section):
    id: str | None = Field(default=None, min_length=1)
    prompt: str
    function: str = ""
    preamble: str = ""
    tests: list[OwnTest] = Field(min_length=1)


def own(line: Line) -> Problem:
    """A row of one's own; `yaml/README.md` says what it holds."""
    row = line.fields(OwnRow)
    _compiles(row.preamble, f"{line.where}: 'preamble'")
    cases: list[Case] = []
    for number, test in enumerate(row.tests, start=1):
        where, given = f"{line.where}: test {number}", test.model_fields_set - {"public"}
        if given == {"input", "output"} and test.input is not None and test.output is not None:
            cases.append(Case("stdin", test.input, test.output, test.public))
        elif given == {"arguments", "result"} and test.arguments is not None:
            if not row.function:
                raise UserError(f"{where} has arguments: name the function in 'function'.")
            arguments = "\n".join(json.dumps(argument) for argument in test.arguments)
            cases.append(Case("call", arguments, json.dumps(test.result), test.public))
        elif given == {"check"} and test.check is not None:
            _compiles(test.check, f"{where}: 'check'")
            cases.append(Case("check", test.check, public=test.public))
        else:
            has = ", ".join(sorted(given)) or "nothing"
            raise UserError(
                f"{where} has {has}; it must have input and output, arguments and result, or check."
            )
    checks = [test.check for test in row.tests if test.check is not None]
    names = (row.function,) if row.function else _program_names(checks, row.preamble, "")
    tests = Suite(tuple(cases), row.function, preamble=row.preamble, program_names=names)
    return _problem(line.name(row.id), row.prompt, tests)


FORMATS: dict[str, Callable[[Line], Problem]] = {
    "livecodebench": livecodebench,
    "deepcoder": deepcoder,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "own": own,
}


def _problem(id: str, prompt: str, tests: Suite) -> Problem:
    return Problem(id=id, messages=[Message(role="user", content=prompt)], metadata={"tests": tests})


def _prompt(question: str, starter_code: str) -> str:
    task = STARTER.format(code=starter_code.strip("\n")) if starter_code.strip() else STDIN
    return f"{question.strip()}\n\n{task}"


def _json(value: Any, line: Line, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{line.where}: '{field}' is not JSON ({error}); correct it.") from None


def _tests(tests: Any, line: Line, field: str, function: str, public: bool) -> tuple[Case, ...]:
    """Returns tests that say their type, or go to a function where the set names one."""
    if not isinstance(tests, list):
        raise UserError(f"{line.where}: '{field}' must be a list of tests.")
    cases: list[Case] = []
    for number, test in enumerate(tests, start=1):
        where = f"{line.where}: '{field}' test {number}"
        if not isinstance(test, dict) or "input" not in test or "output" not in test:
            raise UserError(f"{where} needs 'input' and 'output'.")
        kind = str(test.get("testtype") or test.get("type") or ("functional" if function else "stdin"))
        if kind in ("stdin", "stdin_stdout"):
            cases.append(Case("stdin", _text(test["input"]), _text(test["output"]), public))
        elif kind in ("functional", "function_call"):
            cases.append(_call(test, where, function, public))
        else:
            raise UserError(f"{where} has type {kind!r}; it must be stdin or functional.")
    return tuple(cases)


def _call(test: dict[str, Any], where: str, function: str, public: bool) -> Case:
    if not function:
        raise UserError(
            f"{where} calls a function, but the row names none: 'func_name' in 'metadata', or 'fn_name'."
        )
    given, wanted = test["input"], test["output"]
    arguments = given if isinstance(given, str) else "\n".join(json.dumps(argument) for argument in given)
    expected = wanted if isinstance(wanted, str) else json.dumps(wanted)
    try:
        for text in (*(line for line in arguments.splitlines() if line.strip()), expected):
            json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{where}: arguments and result must be JSON, an argument a line ({error})."
        ) from None
    return Case("call", arguments, expected, public, bool(test.get("wrapped")))


def _text(value: Any) -> str:
    """Some sets have lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _program_names(checks: Iterable[str], preamble: str, solution: str) -> tuple[str, ...]:
    """Returns the names that tests take from the program: what the set's own solution defines, or, without one, what
    neither the tests nor Python have."""
    used = {node.id for check in checks for node in ast.walk(_tree(check)) if isinstance(node, ast.Name)}
    defines = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for node in ast.walk(_tree(solution)) if isinstance(node, defines)}
    if defined:
        return tuple(sorted(used & defined))
    own = {name for source in (*checks, preamble) for name in _bound(_tree(source))}
    return tuple(sorted(used - own - vars(builtins).keys() - sys.stdlib_module_names))


def _bound(tree: ast.AST) -> Iterator[str]:
    """Yields the names that code gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name.partition(".")[0]


def _tree(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # a set's backslashes are its own matter
        return ast.parse(source)


def _compiles(source: str, where: str) -> None:
    try:
        _tree(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{where} is not Python that compiles ({error}); correct it.") from None
