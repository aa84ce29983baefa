"""The rules about who may import whom, and about sizes, read from the sources' syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sdpo_megatron"

# A room (a folder, or a file of the top level) imports what stands in an earlier line, or in its own.
GROUND = ["errors", "files", "stopping", "terminal"]
"""Anyone may import these. A closed list: what fits nowhere else does not belong here."""
LAYERS: list[list[str]] = [
    GROUND,
    ["records", "strict_yaml"],
    ["algorithm"],
    ["config"],
    ["chat", "problems", "models", "run_dir"],
    ["kernels"],
    ["envs"],
    ["data"],
    ["cluster", "preflight"],
    ["doctor"],
    ["rollout", "trainer"],
    ["serving", "conversion"],
    ["evaluation"],
    ["report"],
    ["run"],
    ["build"],
    ["launch"],
    ["train", "evaluate"],
    ["job"],
    ["submission"],
]
STRANGERS = {frozenset({"rollout", "trainer"})}
"""Of one line, but they do not know each other: `serving` alone knows both engines."""
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}

# Which files may import what is heavy, by prefixes of their paths inside the package.
CONFINED = {
    "megatron": ("trainer/",),
    "sglang": (
        "launch/sglang_on_cpu.py",
        "launch/batched_attention.py",
        "launch/plain_parts.py",
    ),
    "triton": ("kernels/",),
}
# algorithm/ is pure: lists and tensors.
ALGORITHM_MAY_IMPORT = {"sdpo_megatron", "torch", "numpy", "pydantic", "abc", "__future__"}
# The wiring, the launcher, and what reads or checks all settings.
TAKES_CONFIG = ("build.py", "evaluate.py", "launch/launcher.py", "preflight/")

MAX_TOP_LEVEL_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 14, 350, 60


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                yield node.lineno, f"{name}.{alias.name}"


def wrong_imports(path: str, source: str) -> list[str]:
    """`path` is relative to the package."""
    module = ".".join(["sdpo_megatron", *Path(path).with_suffix("").parts])
    own = path.split("/")[0].removesuffix(".py")
    if own == "__init__":
        own = LAYERS[0][0]
    if own not in LAYER_OF:
        return [f"{path}: '{own}' has no layer; give it one in LAYERS"]
    problems: list[str] = []
    for line, name in imported(ast.parse(source), module):
        top, _, rest = name.partition(".")
        if top == "sdpo_megatron" and rest:
            other = rest.split(".")[0]
            if other not in LAYER_OF:
                problems.append(f"{path}:{line} imports '{other}', which has no layer")
            elif LAYER_OF[other] > LAYER_OF[own] or frozenset({own, other}) in STRANGERS:
                problems.append(f"{path}:{line} imports {name}: an arrow from left to right")
        if top in CONFINED and not path.startswith(CONFINED[top]):
            problems.append(f"{path}:{line} imports {top}, which only {', '.join(CONFINED[top])} may")
        if own == "algorithm" and top not in ALGORITHM_MAY_IMPORT and top not in PURE_STANDARD_MODULES:
            problems.append(f"{path}:{line} imports {top}: algorithm/ is pure")
    return problems


PURE_STANDARD_MODULES = {
    "array",
    "bisect",
    "collections",
    "dataclasses",
    "functools",
    "heapq",
    "itertools",
    "math",
    "random",
    "re",
    "statistics",
    "typing",
}


def names_in(annotation: ast.expr | None) -> set[str]:
    """All names and attributes of an annotation; of a quoted one too."""
    if annotation is None:
        return set()
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    nodes = list(ast.walk(annotation))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


def functions_with_whole_config(path: str, source: str) -> list[str]:
    if path.startswith(TAKES_CONFIG):
        return []
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            everything = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            for argument in everything:
                names = names_in(argument.annotation)
                if "Config" in names:
                    found.append(f"{path}:{node.lineno} takes the whole Config; hand it the section it needs")
    return found


def too_long(path: str, source: str) -> list[str]:
    found: list[str] = []
    if source.count("\n") >= MAX_FILE_LINES:
        found.append(f"{path} has {source.count(chr(10))} lines; keep it under {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines >= MAX_FUNCTION_LINES:
                found.append(
                    f"{path}:{node.lineno} {node.name} has {lines} lines; keep it under {MAX_FUNCTION_LINES}"
                )
    return found


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
OWN_FILES = sorted(
    path for folder in ("sdpo_megatron", "tools", "slurm") for path in (ROOT / folder).rglob("*.py")
)


def offenders(rule: Callable[[str, str], list[str]], paths: list[Path], base: Path) -> list[str]:
    found = [rule(str(path.relative_to(base)), path.read_text(encoding="utf-8")) for path in paths]
    return [line for lines in found for line in lines]


def test_imports():
    assert offenders(wrong_imports, PACKAGE_FILES, PACKAGE) == []


def test_no_function_takes_the_whole_config():
    assert offenders(functions_with_whole_config, PACKAGE_FILES, PACKAGE) == []


def test_sizes():
    assert offenders(too_long, OWN_FILES, ROOT) == []
    pages = [path for kind in ("js", "css", "html") for path in PACKAGE.rglob(f"*.{kind}")]
    assert len(pages) > 3
    assert all(path.read_text(encoding="utf-8").count("\n") < MAX_FILE_LINES for path in pages)
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL_FILES


def test_environments_are_built_without_anything_heavy():
    """A mistake in the settings is told at once: torch and transformers take seconds to import."""
    code = (
        "import sys, sdpo_megatron.envs; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The rules themselves


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("algorithm/x.py", "from sdpo_megatron.trainer.parallel import y", True),
        ("algorithm/x.py", "from sdpo_megatron import trainer", True),
        ("algorithm/x.py", "from ..trainer import y", True),
        ("algorithm/x.py", "from . import losses", False),
        ("algorithm/x.py", "def f():\n    import sdpo_megatron.run", True),
        ("algorithm/x.py", "from sdpo_megatron.records import Group", False),
        ("algorithm/x.py", "import httpx", True),
        ("algorithm/x.py", "import socket", True),
        ("rollout/x.py", "from sdpo_megatron.trainer import y", True),
        ("trainer/x.py", "from sdpo_megatron.rollout import y", True),
        ("trainer/x.py", "from sdpo_megatron.trainer import y", False),
        ("trainer/x.py", "import megatron.core", False),
        ("serving/push.py", "from megatron.core import x", True),
        ("run.py", "from megatron.core import x", True),
        ("rollout/client.py", "import sglang", True),
        ("launch/sglang_on_cpu.py", "import sglang", False),
        ("launch/server.py", "import sglang", True),
        ("doctor/x.py", "from sdpo_megatron.trainer import y", True),
        ("trainer/x.py", "import triton", True),
        ("kernels/x.py", "import triton.language as tl", False),
        ("strict_yaml/x.py", "from sdpo_megatron.config import x", True),
        ("train.py", "from sdpo_megatron.run import build_run", False),
        ("run.py", "from sdpo_megatron.train import x", True),
        ("novelty.py", "", True),
        ("__init__.py", "from sdpo_megatron.train import x", True),
        ("envs/__init__.py", "from .base import x", False),
        ("errors.py", "from sdpo_megatron.records import x", True),
    ],
)
def test_the_rule_about_imports(path, source, wrong):
    assert bool(wrong_imports(path, source)) == wrong


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("evaluation/suite.py", "def f(config: Config): ...", True),
        ("evaluation/suite.py", "class A:\n    def f(self, *, c: 'Config | None' = None): ...", True),
        ("evaluation/suite.py", "def f(c: config.RunSettings): ...", False),
        ("build.py", "def f(config: Config): ...", False),
    ],
)
def test_the_rule_about_the_config(path, source, wrong):
    assert bool(functions_with_whole_config(path, source)) == wrong


def test_the_rule_about_sizes():
    body = "    x = 1\n"
    assert not too_long("x.py", "def f():\n" + body * 58)
    assert too_long("x.py", "def f():\n" + body * 59)
    assert not too_long("x.py", "\n" * 349)
    assert too_long("x.py", "\n" * 350)
