"""A program tested in a sandbox."""

import json
import re
from functools import cache
from pathlib import Path

from sdpo_megatron.envs.programs.cases import Case, Suite
from sdpo_megatron.envs.programs.results import Result, results_of
from sdpo_megatron.envs.sandbox.base import Limits, Program, Sandbox
from sdpo_megatron.envs.sandbox.settings import SandboxSettings

CASE_CPU_S = 6.0
"""Processor time of one test."""
CASE_WALL_S, START_S = CASE_CPU_S + 1, 5.0
"""Seconds that a test may take in the mean, and those for everything else."""
LONGEST_CASE_S = 2 * CASE_WALL_S
"""Seconds that one test may take, so that other work on the machine is not held against it."""
KEPT_CHARACTERS = 4096
PARTS = ["messages.py", "nursery.py", "harness.py"]
START = (
    "import sys; sys.path.insert(0, '.'); from sdpo_megatron.envs.programs.harness import main; "
    "sys.path.pop(0); main()"  # or what a program writes here would be imported by the harness
)
BLOCK = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})[^\n`]*\n(.*?)^[ ]{0,3}\1[ ]*$", re.DOTALL | re.MULTILINE)


def program_in(text: str) -> str | None:
    """Returns the longest fenced block of an answer that is complete, or None."""
    blocks = [found[2] for found in BLOCK.finditer(text.replace("\r\n", "\n"))]
    longest = max(blocks, key=len, default="")
    return longest if longest.strip() else None


def wall_s(cases: int) -> float:
    """Returns the seconds that so many tests may take."""
    return CASE_WALL_S * cases + START_S


def judge(sandbox: Sandbox, settings: SandboxSettings, program: str, tests: Suite) -> list[Result]:
    """Returns what came of the tests, in order, up to one that used up its time. Raises SandboxFault."""
    work = {
        "program": program,
        "preamble": tests.preamble,
        "function": tests.function,
        "program_names": tests.program_names,
        "cases": [_told(case) for case in tests.cases],
        "output_bytes": settings.output_kib << 10,
        "wall_s": LONGEST_CASE_S,
    }
    limits = Limits(
        cpu_s=CASE_CPU_S,
        wall_s=wall_s(len(tests.cases)),
        memory_bytes=settings.memory_mib << 20,
        processes=settings.processes,
        output_bytes=_verdict_bytes(settings, tests),
        file_bytes=settings.file_mib << 20,
    )
    outcome = sandbox.run(
        Program(["python", "-I", "-S", "-c", START], _harness(), json.dumps(work).encode()), limits
    )
    return results_of(outcome, tests.cases)


def _told(case: Case) -> dict[str, object]:
    """What the harness is told of a test: not what is expected, but where the test is code that compares."""
    if case.kind == "check":
        return {"kind": case.kind, "source": case.input}
    if case.kind == "call":
        return {
            "kind": case.kind,
            "arguments": [json.loads(line) for line in case.input.splitlines() if line.strip()],
        }
    return {"kind": case.kind, "stdin": case.input, "keep": _kept_characters(case)}


def _kept_characters(case: Case) -> int:
    """Of what a program prints: more than twice what is expected is wrong, whatever it is."""
    return 2 * len(case.expected) + KEPT_CHARACTERS


def _verdict_bytes(settings: SandboxSettings, tests: Suite) -> int:
    """What the harness may print: JSON takes up to six bytes a character."""
    values = sum(case.kind != "stdin" for case in tests.cases)
    return 6 * sum(map(_kept_characters, tests.cases)) + (1 + values) * (settings.output_kib << 11)


@cache
def _harness() -> dict[str, bytes]:
    """The harness's files where the package has them; without an __init__.py a folder is a package too."""
    folder = Path(__file__).parent
    return {f"sdpo_megatron/envs/programs/{name}": (folder / name).read_bytes() for name in PARTS}
