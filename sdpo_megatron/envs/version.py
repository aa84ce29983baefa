"""The version of a grader: what its code is, so that no one has to remember to count it up."""

import ast
import hashlib
import importlib.util
from importlib.metadata import version
from pathlib import Path

from sdpo_megatron.envs.base import Environment

PACKAGE = "sdpo_megatron.envs"


def grader_version(env: type[Environment]) -> str:
    """Returns a hash of the code of the environment's module and of all of `sdpo_megatron.envs` that it imports, as it
    runs: comments, docstrings and layout do not count; and the versions of the libraries that judge."""
    sources: dict[str, str] = {}
    waiting = [env.__module__]
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        tree = _tree(name)
        if tree is None:
            continue
        sources[name] = ast.dump(tree)
        waiting += _imported(tree)
    digest = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:12]
    return " ".join([digest, *(f"{library} {version(library)}" for library in env.judged_by)])


def _tree(module: str) -> ast.Module | None:
    """The module's code without docstrings; None for a name that is no module, and for one without source."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not (_is_text(part) or _judges_nothing(part))]
    return tree


def _judges_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in ("show", "render", "warm_up")


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imported(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.startswith(f"{PACKAGE}.")]
