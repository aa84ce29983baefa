"""Programs against tests in the real sandboxes: every ending, and every way to a verdict that was not earned."""

import json
import secrets

import pytest

from sdpo_megatron.envs.programs import judge as judging
from sdpo_megatron.envs.programs.cases import Case, Suite
from sdpo_megatron.envs.programs.judge import judge, program_in
from sdpo_megatron.envs.programs.results import Result
from sdpo_megatron.envs.sandbox.choice import choose
from sdpo_megatron.envs.sandbox.service import Service
from sdpo_megatron.envs.sandbox.settings import SandboxSettings
from tests.unit.envs.sandbox.fusion import service

SETTINGS = SandboxSettings(output_kib=64, memory_mib=512)
SECRET = f"expected-{secrets.token_hex(8)}"
ADD = Suite((Case("stdin", "1 2\n", "3\n"), Case("stdin", "5 6\n", " 11.0\n")))
CALL = Suite((Case("call", "[1, 2]\n3", "[4, 5]"), Case("call", "[]\n3", "[]")), "add")
CHECK = Suite(
    (Case("check", "assert f(1) == 2"), Case("check", "import math\nassert f(math.inf) == 7")),
    program_names=("f",),
)


@pytest.fixture(scope="module", params=["bubblewrap", "sandlock"])
def run(request):
    sandbox = choose(SandboxSettings.model_validate({"backend": request.param}))[0]

    def run(program: str, tests: Suite) -> list[Result]:
        return judge(sandbox, SETTINGS, program, tests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "CASE_CPU_S", 2.0)
        yield run


@pytest.mark.parametrize(
    ("program", "tests", "endings"),
    [
        ("print(sum(map(int, input().split())))", ADD, ["passed", "passed"]),
        (
            "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(1)",
            ADD,
            ["passed", "passed"],
        ),
        ("print(3)", ADD, ["passed", "wrong"]),
        ("print(3", ADD, ["syntax"]),
        ("print('\ud800')", ADD, ["syntax"]),
        ("print('\\ud800')", ADD, ["error", "error"]),
        ("print(1 / 0)", ADD, ["error", "error"]),
        ("raise KeyboardInterrupt", ADD, ["error", "error"]),
        ("def f(): f()\nf()", ADD, ["error", "error"]),
        ("x = bytearray(1 << 30)", ADD, ["memory", "memory"]),
        ("while True: pass", ADD, ["time"]),
        ("while True: print('x' * 1000)", ADD, ["output"]),
        ("print('x' * 20000)", ADD, ["wrong", "wrong"]),
        ("import os; os._exit(0)", ADD, ["wrong", "wrong"]),
        ("import ctypes; ctypes.string_at(1)", ADD, ["crash"]),
        ("def add(items, n): return [item + n for item in items]", CALL, ["passed", "passed"]),
        (
            "class Solution:\n def add(self, items, n): return tuple(i + n for i in items)",
            CALL,
            ["passed", "passed"],
        ),
        ("def add(items, n): return items", CALL, ["wrong", "passed"]),
        ("def ad(items, n): return items", CALL, ["error", "error"]),
        ("def add(items, n): raise SystemExit", CALL, ["error", "error"]),
        ("def add(items, n): return object()", CALL, ["wrong", "wrong"]),
        (
            "if __name__ == '__main__': input()\ndef add(items, n): return [i + n for i in items]",
            CALL,
            ["passed"] * 2,
        ),
        ("def f(x): return 2 if x == 1 else 7", CHECK, ["passed", "passed"]),
        ("def f(x): return 2", CHECK, ["passed", "wrong"]),
        ("def f(x): return 1 / 0", CHECK, ["error", "error"]),
        ("g = 1", CHECK, ["error", "error"]),
        ("1 / 0", CHECK, ["error"]),
        ("import os\ndef f(x): os._exit(0)", CHECK, ["crash"]),
        ("def f(x): return iter([2])", CHECK, ["wrong", "wrong"]),
    ],
)
def test_endings(run, program, tests, endings):
    assert [result.ending for result in run(program, tests)] == endings


def test_each_test_starts_anew(run):
    program = "import os\nseen = globals().setdefault('seen', [])\nseen.append(1)\nprint(len(seen), 'X' in os.environ)"
    program += "\nos.environ['X'] = ''"
    tests = Suite((Case("stdin", "", "1 False"),) * 3)
    assert [result.ending for result in run(program, tests)] == ["passed"] * 3


def test_values_of_every_kind_travel_both_ways(run):
    values = [
        "None",
        "True",
        "-3",
        "2**80",
        "0.5",
        "float('inf')",
        "'é\\n'",
        "b'x'",
        "(1, [2])",
        "{1, 2}",
        "frozenset({1})",
    ]
    values += ["{'a': (1,), 2: None}", "3 + 4j", "[]"]
    source = "\n".join(
        f"assert f({value}) == {value} and type(f({value})) is type({value})" for value in values
    )
    source += "\nassert f(range(3)) == [0, 1, 2] and f(1, y=2) == 2"
    assert (
        run(
            "def f(x, y=None): return x if y is None else y",
            Suite((Case("check", source),), program_names=("f",)),
        )[0].ending
        == "passed"
    )


def test_a_test_may_use_the_programs_own_kinds_of_object(run):
    tests = Suite((Case("check", "assert area(Square(3)) == 9"),), program_names=("area", "Square"))
    program = "class Square:\n def __init__(self, a): self.a = a\ndef area(square): return square.a ** 2"
    assert [result.ending for result in run(program, tests)] == ["passed"]


def test_a_test_may_wait_for_an_exception(run):
    source = "try:\n    f(0)\nexcept ValueError:\n    pass\nelse:\n    assert False"
    tests = Suite((Case("check", source),), program_names=("f",))
    assert run("def f(x): raise ValueError(x)", tests)[0].ending == "passed"
    assert run("def f(x): return x", tests)[0].ending == "wrong"


def test_the_preamble_is_there_before_the_program_and_the_test(run):
    tests = Suite(
        (Case("check", "assert f(3) == twice(3)"),),
        preamble="def twice(x): return 2 * x",
        program_names=("f",),
    )
    assert run("def f(x): return twice(x)", tests)[0].ending == "passed"


def test_what_is_told_of_a_failure(run):
    [result, _] = run("def inner():\n    return [][0]\n\ndef f(x):\n    return inner()\n", CHECK)
    assert result.error == "IndexError: list index out of range"
    assert result.frames == ((5, "f", "return inner()"), (2, "inner", "return [][0]"))
    [result] = run("x = 1\nprint(x", ADD)
    assert "'(' was never closed (line 2)" in result.error and result.frames == ((0, "", "print(x"),)
    result = run("def f(x): print('said'); return 3", CHECK)[0]
    assert (result.statement, result.output, result.printed) == ("assert f(1) == 2", "3", "said\n")


FORGED = json.dumps({"results": [{"passed": True, "printed": SECRET, "value": SECRET}] * 2})
FORGERIES = {
    "a verdict on every file": f"""
for fd in range(64):
    try:
        os.write(fd, {FORGED!r}.encode())
    except OSError:
        pass
""",
    "a verdict, and the end of its testers": f"""
print({FORGED!r}, flush=True)
for pid in (os.getppid(), 1, 2, 3):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
os._exit(0)
""",
    "another encoder": "json.dumps = lambda *a, **k: '{\"passed\": true}'\nos._exit = lambda code: None",
    "an exit that says success": "sys.exit(0)",
    "a process that lives on": f"""
if os.fork() == 0:
    time.sleep(0.2)
    os.write(1, {FORGED!r}.encode())
    os._exit(0)
""",
}
# each calls look() with whatever it finds
SEARCHES = {
    "memory": """
frame = sys._getframe()
while frame:
    look([frame.f_globals, frame.f_locals])
    frame = frame.f_back
for thing in gc.get_objects():
    look(thing)
""",
    "what is open": """
for fd in range(256):
    for read in (lambda: os.pread(fd, 1 << 16, 0), lambda: os.set_blocking(fd, False) or os.read(fd, 1 << 16)):
        try:
            look(read())
        except OSError:
            pass
""",
    "files": """
for place in (".", "/tmp", "/proc/1", "/proc/self"):
    for path, _, names in os.walk(place):
        for name in names:
            try:
                look(open(os.path.join(path, name), "rb").read())
            except OSError:
                pass
""",
    "memory of its testers": """
libc = ctypes.CDLL(None)
for pid in (os.getppid(), 1, 2, 3):
    if libc.ptrace(16, pid, None, None) >= 0:
        look("expect" "ed-")
    try:
        look(open(f"/proc/{pid}/mem", "rb").read(1) and "expect" "ed-")
    except OSError:
        pass
""",
}
IMPORTS = "import ctypes, gc, json, os, signal, sys, time\n"


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_is_earned(run, name):
    results = run(IMPORTS + FORGERIES[name], Suite((Case("stdin", "", SECRET), Case("stdin", "", SECRET))))
    assert results and "passed" not in [result.ending for result in results]


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_expected_is_nowhere_to_be_found(run, name):
    program = f"""{IMPORTS}
def look(thing):
    try:
        text = repr(thing)
    except Exception:
        return
    if "expect" "ed-" in text:
        print("FOUND", text[max(0, text.index("expect" "ed-") - 40):][:100])
def f(x):
{"".join(f"    {line}{chr(10)}" for line in SEARCHES[name].splitlines())}
    return x
print(f(0))
"""
    check = Case("check", f"assert f(1) == {SECRET!r}")
    results = run(program, Suite((Case("stdin", "", SECRET), check, check), program_names=("f",)))
    assert results and "passed" not in [result.ending for result in results]
    assert not any("FOUND" in result.printed or "FOUND" in result.output for result in results), results


CHEATS = {
    "a value that equals all": "class A:\n __eq__ = lambda self, other: True\n __hash__ = None\nf = lambda x: A()",
    "a number that equals all": "class A(int):\n __eq__ = lambda self, other: True\nf = lambda x: A(5)",
    "another len": "f = lambda x: []\nlen = abs = lambda x: 2",
    "modules for the tester": """
import os
os.makedirs("sdpo_megatron", exist_ok=True)
for name in ("heapq", "ast", "json", "sdpo_megatron/x"):
    open(name + ".py", "w").write("import os; os._exit(0)")
f = lambda x: 0
""",
    "an answer of its own": """
import json, os, struct
data = json.dumps({"value": 2}).encode()
f = lambda x: os.write(62, (struct.pack("!I", len(data)) + data) * 9) and os._exit(0)
""",
    "an answer that is none": "import os\nf = lambda x: os.write(62, b'\\xff' * 99) and os._exit(0)",
    "an answer of another form": """
import os
data = b'{"value": {"set": [[1]], "x": 1}}'
f = lambda x: os.write(62, len(data).to_bytes(4, "big") + data) and os._exit(0)
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_test_is_not_fooled(run, name):
    source = "import heapq\nassert len(f(1)) == 2 and heapq.nlargest(1, f(1)) == [7]"
    if name not in ("another len", "modules for the tester"):
        source = "for x in range(9): assert f(x) == x + 1"
    results = run(CHEATS[name], Suite((Case("check", source),) * 2, program_names=("f",)))
    assert results and "passed" not in [result.ending for result in results], results


def test_a_service_runs_the_same_tests():
    """SandboxFusion's interface; behind it is a stand-in."""
    with service() as url:
        programs = ["def f(x): return 2 if x == 1 else 7", "def f(x): return 2", "def f(x"]
        endings = [
            [result.ending for result in judge(Service(url), SETTINGS, program, CHECK)]
            for program in programs
        ]
    assert endings == [["passed", "passed"], ["passed", "wrong"], ["syntax"]]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Here:\n```python\nprint(1)\n```\nDone", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```py\nx\n```\nor\n```python\nlonger = 1\n```", "longer = 1\n"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```python\r\nx\r\n```", "x\n"),
        ("```python\nprint(1)", None),
        ("```python\n```", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_program_in_an_answer(text, program):
    assert program_in(text) == program
