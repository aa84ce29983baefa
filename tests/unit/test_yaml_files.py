"""Every YAML file of the repository is a whole, valid experiment."""

import json
from pathlib import Path

import pytest

from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings
from sdpo_megatron.config import load_config
from sdpo_megatron.envs import build_environment, environment_class
from sdpo_megatron.envs.graders import GRADERS
from sdpo_megatron.envs.jsonl import JsonlOptions, _Line
from sdpo_megatron.preflight.settings import check_problem_counts
from sdpo_megatron.records import Hints, Message
from sdpo_megatron.strict_yaml.load import parse

FOLDER = Path(__file__).parents[2] / "yaml"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_files():
    assert FOLDER / "demo_cpu.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_loads(path: Path):
    config, origins = load_config([path])
    assert config.run.name == path.stem
    options = environment_class(config.task.env).Options
    parse(options, config.task.options, origins, "task.options")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_its_problems_are_enough(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the root of a clone, where the command is given; a file of problems must name right graders too."""
    (tmp_path / "yaml").symlink_to(FOLDER)
    (tmp_path / "data").symlink_to(FOLDER.parents[1] / "shared" / "data")
    monkeypatch.chdir(tmp_path)
    config, origins = load_config([path])
    for key in ("train_file", "test_file"):
        if (file := config.task.options.get(key, "")).startswith("data/") and not Path(file).exists():
            pytest.skip(f"{file} is a published file that is not at hand")
    if config.task.env == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")
    env = build_environment(config.task, origins)
    check_problem_counts(config.rollout, train=len(env.train_problems()))
    assert env.test_problems()


def test_what_the_demos_teacher_reads_byte_for_byte():
    config, origins = load_config([FOLDER / "demo_cpu.yaml"])
    env = build_environment(config.task, origins)
    assert config.reprompt == RepromptSettings()
    messages = env.show(env.train_problems()[0], Hints(solution="12 + 34 = 46"), config.reprompt.template)
    question = env.train_problems()[0].messages[-1]["content"]
    assert messages == [
        Message(role="user", content="What is 23 + 41? Correct solution: 23 + 41 = 64\n23 + 41 = 64"),
        Message(role="assistant", content="23 + 41 = 64"),
        Message(role="user", content="What is 58 + 17? Correct solution: 58 + 17 = 75\n58 + 17 = 75"),
        Message(role="assistant", content="58 + 17 = 75"),
        Message(role="user", content=f"{question} Correct solution: 12 + 34 = 46\n12 + 34 = 46"),
    ]


def test_the_table_of_the_teachers_prompt_has_each_setting_and_preset():
    table = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## What the teacher reads")[2]
    for key in RepromptSettings.model_fields:
        assert f"| `{key}` |" in table
    for preset in PRESETS:
        assert f"`{preset}`" in table


def test_the_file_of_problems_shows_every_grader():
    lines = (FOLDER / "data" / "questions_train.jsonl").read_text(encoding="utf-8").splitlines()
    config, _ = load_config([FOLDER / "jsonl_cpu.yaml"])
    named = {json.loads(line).get("grader", config.task.options["grader"]) for line in lines}
    assert named == set(GRADERS)


def test_the_tables_of_problems_have_each_key_and_grader():
    table = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## Problems of your own")[2]
    for name in GRADERS:
        assert f"| `{name}` |" in table
    for key in (*JsonlOptions.model_fields, *_Line.model_fields):
        assert f"| `{key}` |" in table


@pytest.mark.parametrize(
    "name", ["multiple_choice", "math_answer", "tool_call", "reasoning_gym", "python_tests"]
)
def test_the_tables_of_options_name_each(name: str):
    tables = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## Questions, mathematics")[2]
    table = tables.partition(f"| `{name}` | what it is |")[2].partition("\n\n")[0]
    for key in environment_class(name).Options.model_fields:
        assert f"`{key}`" in table or key in ("train_file", "test_file")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_folder_s_table_names_it(path: Path):
    assert f"`{path.relative_to(FOLDER)}`" in (FOLDER / "README.md").read_text(encoding="utf-8")
