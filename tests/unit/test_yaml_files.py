"""Every YAML file of the repository is a whole, valid experiment, or a part that makes one behind another."""

import json
import re
from pathlib import Path

import pytest

from sdpo_megatron.algorithm.losses.grpo import GrpoSettings
from sdpo_megatron.algorithm.reprompt import PRESETS, RepromptSettings
from sdpo_megatron.config import load_config
from sdpo_megatron.data.sets import SETS
from sdpo_megatron.envs import build_environment, environment_class
from sdpo_megatron.envs.graders import GRADERS
from sdpo_megatron.envs.jsonl import JsonlOptions, _Line
from sdpo_megatron.preflight.settings import check_problem_counts, check_settings
from sdpo_megatron.records import Hints, Message
from sdpo_megatron.strict_yaml.load import parse

FOLDER = Path(__file__).parents[2] / "yaml"
FILES = sorted(FOLDER.glob("*.yaml"))
PARTS = sorted(FOLDER.glob("cells/*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CELLS = re.findall(
    r"^\| [^|]+ \| `([^`|]+\.yaml)` \|$", README.partition("| cell | files |")[2], re.MULTILINE
)
"""The experiments of the paper and of the recipe, as the folder's table has them."""
QWEN3_8B = {
    **{
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
    },
    **{
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    **{"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000, "rms_norm_eps": 1e-6},
    **{
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
}
"""Its config.json."""


OLMO3_7B = {
    **{
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
    },
    **{
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    **{"max_position_embeddings": 65536, "rope_theta": 500000, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "layer_types": 8 * [*3 * ["sliding_attention"], "full_attention"],
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        **{"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0},
    },
    **{"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "dtype": "bfloat16"},
}
"""The one of Olmo-3-7B-Instruct, in the form in which its makers write it."""
OLMO_CELLS = [cell.replace("_8b", "_olmo3_7b") for cell in CELLS if cell.startswith("sciknoweval_8b")]
"""The same experiments with the paper's other model."""


HERE = [path for path in FILES if "file: data/" not in path.read_text(encoding="utf-8")]
"""What needs no published file; of others tests/real_data sees to it."""


def test_there_are_files():
    assert FOLDER / "demo_cpu.yaml" in HERE and len(PARTS) >= 7


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_loads(path: Path):
    config, origins = load_config([path])
    assert config.run.name == path.stem
    options = environment_class(config.task.env).Options
    parse(options, config.task.options, origins, "task.options")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_it_reads_is_a_prepared_set_or_here(path: Path):
    options = load_config([path])[0].task.options
    for key in ("train_file", "test_file"):
        if (file := options.get(key, "")).startswith("data/"):
            assert Path(file).parent.name in SETS and Path(file).name in (
                "train.jsonl",
                "test.jsonl",
                "all.jsonl",
            )


@pytest.mark.parametrize("variant", ["", "cells/grpo.yaml", "cells/grpo_on_policy.yaml"])
@pytest.mark.parametrize("cell", [*CELLS, *OLMO_CELLS])
def test_a_cell_of_the_paper_s_table_is_a_possible_run(cell, variant, tmp_path, monkeypatch):
    """Neither its model nor its data is here."""
    olmo = cell in OLMO_CELLS
    (tmp_path / "config.json").write_text(json.dumps(OLMO3_7B if olmo else QWEN3_8B))
    monkeypatch.setattr("sdpo_megatron.preflight.settings.check_weights", lambda *_: None)
    monkeypatch.setattr("sdpo_megatron.preflight.settings.check_tokenizer_file", lambda *_: None)
    monkeypatch.setattr("sdpo_megatron.preflight.settings.check_server", lambda *_: None)
    config, origins = load_config([FOLDER / name for name in [*cell.split(), *variant.split()]])
    parse(environment_class(config.task.env).Options, config.task.options, origins, "task.options")
    check_settings(config, tmp_path, world_size=None, gpus=8, loss_is_chosen=True)
    assert config.model.path == ("allenai/Olmo-3-7B-Instruct" if olmo else "Qwen/Qwen3-8B")
    assert isinstance(config.loss, GrpoSettings) == (config.teacher.name == "off") == bool(variant)


@pytest.mark.parametrize("cell", OLMO_CELLS)
def test_the_paper_s_other_model_has_the_same_settings(cell: str):
    """Its chat template has no switch for thoughts: one that changes nothing would be refused."""
    mine, theirs = (
        load_config([FOLDER / name for name in files.split()])[0].model_dump()
        for files in (cell, cell.replace("_olmo3_7b", "_8b"))
    )
    assert theirs["rollout"].pop("chat_template_kwargs") == {"enable_thinking": False}
    assert mine["rollout"].pop("chat_template_kwargs") == {}
    for config in (mine, theirs):
        del config["model"]["path"], config["run"]["name"]
    assert mine == theirs


def test_the_suites_are_evaluations_of_prepared_sets():
    config, origins = load_config([FOLDER / "sciknoweval_cpu.yaml", FOLDER / "cells/suites.yaml"])
    assert list(config.eval.suites) == ["math500", "tooluse"]
    for name, suite in config.eval.suites.items():
        options = environment_class(suite.task.env).Options
        parse(options, suite.task.options, origins, f"eval.suites.{name}.task.options")
        file = Path(suite.task.options["test_file"])
        assert file.parent.name in SETS and file.name == "test.jsonl"


def test_the_cells_names_and_published_settings():
    loaded = {cell: load_config([FOLDER / name for name in cell.split()])[0] for cell in CELLS}
    assert len({config.run.name for config in loaded.values()}) == len(CELLS) == 8
    assert {part for cell in CELLS for part in cell.split()[1:]} == {
        f"cells/{part.name}" for part in PARTS if not part.name.startswith(("grpo", "suites"))
    }
    for cell, config in loaded.items():
        optimizer, rollout, evaluation = config.optimizer, config.rollout, config.eval
        assert rollout.group_size == 8 and rollout.temperature == 1.0
        if cell.startswith("math"):
            assert (rollout.problems_per_step, rollout.max_tokens, optimizer.lr) == (64, 2048, 1e-5)
            continue
        code = cell.startswith("livecode")
        assert (rollout.problems_per_step, rollout.max_tokens) == (32, 8192)
        assert rollout.chat_template_kwargs == {"enable_thinking": False}
        assert (optimizer.lr, optimizer.warmup_steps) == ((1e-6, 0) if code else (1e-5, 10))
        assert (optimizer.mini_batches, config.teacher.ema_rate) == ((32, 0.01) if code else (1, 0.05))
        assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (0.01, 1.0)
        assert config.loss.rollout_is_cap == 2.0 and getattr(config.loss, "top_k", None) == (
            20 if code else 100
        )
        assert code or getattr(config.loss, "alpha", None) == 0.5
        assert (evaluation.samples, evaluation.temperature, evaluation.top_p) == (
            4 if code else 16,
            0.6,
            0.95,
        )
    grpo = load_config([FOLDER / "sciknoweval_8b.yaml", FOLDER / "cells/grpo.yaml"])[0]
    assert (grpo.optimizer.lr, grpo.optimizer.mini_batches) == (1e-6, 4)
    grpo = load_config([FOLDER / "livecodebench_8b.yaml", FOLDER / "cells/grpo_on_policy.yaml"])[0]
    assert (grpo.optimizer.lr, grpo.optimizer.mini_batches) == (1e-5, 1)


@pytest.mark.parametrize("path", HERE, ids=lambda path: path.name)
def test_its_problems_are_enough(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the root of a clone, where the command is given; a file of problems must name right graders too."""
    (tmp_path / "yaml").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    config, origins = load_config([path])
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
        assert f"`{key}`" in table or key in ("train_file", "test_file", "fields")


@pytest.mark.parametrize("path", [*FILES, *PARTS], ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_folder_s_readme_names_it(path: Path):
    assert re.search(rf"[` ]{re.escape(str(path.relative_to(FOLDER)))}[` ]", README)
