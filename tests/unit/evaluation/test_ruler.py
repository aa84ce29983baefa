"""Two evaluations compare only where nothing of their rulers differs; each part is refused by its name."""

import ast
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdpo_megatron.envs import ENVS, environment_class
from sdpo_megatron.envs.jsonl import JsonlOptions
from sdpo_megatron.envs.version import grader_version
from sdpo_megatron.errors import UserError
from sdpo_megatron.evaluation.ruler import base_model, check_same_ruler, differences
from sdpo_megatron.evaluation.suite import Suite
from sdpo_megatron.models.weight_files import weights_sha256
from sdpo_megatron.run_dir.export_record import record_export
from tests.unit.evaluation.cases import PROBLEMS, SAMPLING, CountingChat, Judge, conditions, suite


class OtherJudge(Judge):
    judged_by = ("pytest",)


def judge(**options: Any) -> Judge:
    env = Judge()
    env.options = JsonlOptions(train_file="a", **options)
    return env


OTHER_WORDS = [replace(PROBLEMS[0], messages=[{"role": "user", "content": "other?"}]), PROBLEMS[1]]
OTHER_ANSWERS = [replace(PROBLEMS[0], answer="b"), PROBLEMS[1]]
PARTS: list[tuple[str, Suite, dict[str, Any]]] = [
    ("problems", suite(problems=OTHER_ANSWERS), {}),
    ("problems", suite(problems=PROBLEMS[:1] + PROBLEMS[2:3]), {}),
    ("prompts", suite(problems=OTHER_WORDS), {}),
    ("chat template", suite(chat=CountingChat(opens=True)), {}),
    ("chat template", suite(chat=CountingChat(arguments={"enable_thinking": False})), {}),
    ("grader", suite(env_name="math_answer"), {}),
    ("grader", suite(env=judge(grader="number")), {}),
    ("grader", suite(env=OtherJudge()), {}),
    ("grader", suite(), {"success_threshold": 1.0}),
    ("sampling", suite(sampling=replace(SAMPLING, temperature=1.0)), {}),
    ("sampling", suite(sampling=replace(SAMPLING, samples=8)), {}),
    ("sampling", suite(sampling=replace(SAMPLING, max_tokens=6)), {}),
    ("base model", suite(), {"base_model": "b1"}),
    ("server", suite(), {"server": "SGLang 2"}),
    ("exact problems", suite(exact_problems=PROBLEMS[:1]), {}),
]


@pytest.mark.parametrize(
    "part,other,others", PARTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_part_is_refused_by_name(part: str, other: Suite, others: dict[str, Any]):
    one, two = suite().ruler(conditions()), other.ruler(conditions(**others))
    assert part in [line.partition(":")[0] for line in differences(one, two)]
    with pytest.raises(UserError, match=rf"A and B were not measured alike, in .*{part}: .* --anyway"):
        check_same_ruler({"A": one, "B": two})
    marked = check_same_ruler({"A": one, "B": two}, anyway=True)
    assert list(marked) == ["B"] and f"{part}: " in marked["B"]


def test_the_same_ruler_is_the_same():
    rulers = {name: suite().ruler(conditions()) for name in "ABC"}
    assert check_same_ruler(rulers) == {}
    where_data_lie = (
        suite(env=judge()).ruler(conditions()),
        suite(env=judge(test_file="b")).ruler(conditions()),
    )
    assert differences(*where_data_lie) == []


def test_a_part_that_one_did_not_record_differs():
    assert differences({"server": "a"}, {}) == ["server: a and not recorded"]


def test_the_base_model_of_an_export_is_that_of_its_training(tiny_model, tmp_path):
    model = tiny_model("llama")
    assert base_model(model) == weights_sha256(model)[:12]
    record_export(tmp_path, 3, "0123456789abcdef")
    assert base_model(tmp_path) == "0123456789ab"


def test_weights_are_told_apart_by_a_bit_and_not_by_how_they_are_spread_over_files(tmp_path):
    tensors = {name: np.arange(4, dtype=np.float32) + k for k, name in enumerate("ab")}
    spread, one, other = (tmp_path / name for name in ("spread", "one", "other"))
    for directory in (spread, one, other):
        directory.mkdir()
    save_file(tensors, one / "model.safetensors")
    tensors["b"][3] += 1e-6
    save_file(tensors, other / "model.safetensors")
    tensors["b"][3] = 4
    weight_map = {name: f"{name}.safetensors" for name in tensors}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, spread / file)
    (spread / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert weights_sha256(one) == weights_sha256(spread) != weights_sha256(other)


@pytest.mark.parametrize("name", [name for name in ENVS if name != "reasoning_gym"])
def test_every_environment_has_a_version_that_its_code_makes(name: str):
    env = environment_class(name)
    assert grader_version(env) == grader_version(env) and len(grader_version(env).split()[0]) == 12


def test_versions_change_with_the_code_that_judges_and_with_nothing_else(monkeypatch: pytest.MonkeyPatch):
    import sdpo_megatron.envs.version as version

    env = environment_class("multiple_choice")
    before, original = grader_version(env), ast.parse

    def with_more(line: str) -> str:
        def parse(source: str) -> ast.Module:
            return original(source + line)

        monkeypatch.setattr(version.ast, "parse", parse)
        found = grader_version(env)
        monkeypatch.undo()
        return found

    assert with_more("\n# a remark\n") == before
    assert with_more("\nANSWER = 42\n") != before
    assert grader_version(environment_class("math_answer")).endswith("math-verify 0.9.0")
