"""A loss is a file: outside `algorithm/losses/` nothing asks which loss it has, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

from sdpo_megatron.algorithm.losses import LOSSES

PACKAGE = Path(__file__).parents[2] / "sdpo_megatron"
OWN = PACKAGE / "algorithm" / "losses"
NAMES = {loss.Settings.model_fields["name"].default for loss in LOSSES}
CLASSES = {kind.__name__ for loss in LOSSES for kind in (loss, loss.Settings)}
COMPARISONS = {"SampledTokens", "WholeVocabulary", "LikeliestTokens", "ClippedLikeliestTokens"}


def switches(source: str) -> list[str]:
    """Lines that compare a loss's name, or ask for the class of a loss, of its settings, or of what it compares."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.Match):
            constants = {
                n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            if constants & NAMES:
                found.append(f"line {getattr(node, 'lineno', 0)} compares with {sorted(constants & NAMES)}")
        asked = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in ast.walk(node)}
        is_test = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
        if (is_test or isinstance(node, ast.Compare)) and asked & (CLASSES | COMPARISONS):
            found.append(
                f"line {getattr(node, 'lineno', 0)} asks for {sorted(asked & (CLASSES | COMPARISONS))}"
            )
        if isinstance(node, ast.ImportFrom) and (names := {alias.name for alias in node.names} & CLASSES):
            found.append(f"line {getattr(node, 'lineno', 0)} imports {sorted(names)}")
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "objective"
            and getattr(node.value, "id", "") == "settings"
        ):
            found.append(f"line {getattr(node, 'lineno', 0)} reads settings.objective")
    return found


def test_nothing_else_asks_which_loss_it_has():
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if OWN not in path.parents]
    found = {str(path.relative_to(PACKAGE)): switches(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        'if config.loss.name == "grpo": pass',
        'x = 1 if name in ("token", "other") else 2',
        'match loss.name:\n    case "sequence": pass',
        "isinstance(settings, DivergenceSettings)",
        "type(loss) is TokenSdpo",
        "isinstance(loss.comparison, SampledTokens)",
        "from sdpo_megatron.algorithm.losses.grpo import Grpo",
    ],
)
def test_the_rule_notices(source: str):
    assert switches(source)
    assert not switches('if teacher.name == "frozen": pass')
