import subprocess
import sys

import pytest

import tests
from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs import ENVS, build_environment, environment_class
from sdpo_megatron.envs.base import Environment, look_up
from sdpo_megatron.errors import ConfigError, UserError


def test_a_task_is_built_from_its_name_and_options():
    environment = build_environment(TaskSettings(env="equations", options={"digits": 1, "test_size": 5}))
    assert isinstance(environment, environment_class("equations"))
    assert len(environment.test_problems()) == 5


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError) as error:
        build_environment(TaskSettings(env="equation"))
    assert str(error.value) == (
        "There is no environment (task.env) 'equation'. Did you mean 'equations'? "
        "There are: equations, jsonl, math_answer, multiple_choice, python_tests, reasoning_gym, tool_call."
    )
    with pytest.raises(ConfigError, match=r"^There is no x 'zzz'\. There are: a, b\.$"):
        look_up("x", "zzz", {"b": 1, "a": 2})


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match=r"'task\.options\.digit'.*'task\.options\.digits'"):
        build_environment(TaskSettings(env="equations", options={"digit": 2}))
    with pytest.raises(UserError, match="neither train_file nor test_file"):
        build_environment(TaskSettings(env="jsonl"))


def test_an_environment_by_import_path(tmp_path):
    options = {"directory": str(tmp_path)}
    environment = build_environment(TaskSettings(env="tests.graded_tasks:Failing", options=options))
    assert type(environment).__name__ == "Failing" and list(environment.test_problems()) == []
    with pytest.raises(ConfigError, match=r"'task\.options\.directry'.*'task\.options\.directory'"):
        build_environment(TaskSettings(env="tests.graded_tasks:Failing", options={"directry": "x"}))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "no_such.module:X",
            "no_such.module cannot be imported: there is no such module; start the run where it can",
        ),
        (
            "tests.no_such:X",
            "tests.no_such cannot be imported: there is no such module; start the run where it can",
        ),
        (
            "tests.broken_task:X",
            "tests.broken_task cannot be imported: ZeroDivisionError: division by zero (",
        ),
        (
            "tests.needs_more:X",
            "tests.needs_more cannot be imported: ModuleNotFoundError: No module named 'no_such'",
        ),
        ("tests.graded_tasks:", "nothing in tests.graded_tasks is no class that derives from"),
        ("tests.graded_tasks:Gone", "Gone in tests.graded_tasks is no class that derives from"),
        ("tests.graded_tasks:os", "it has Equations, Failing, Strict, Unfinished, Unlucky, WithoutOptions."),
        ("tests.graded_tasks:Unfinished", "Unfinished lacks grade; write what Environment says of it."),
        ("tests.graded_tasks:WithoutOptions", "WithoutOptions.Options must be a class that derives from"),
        (":", "cannot be imported: "),
    ],
)
def test_an_import_path_that_leads_nowhere(tmp_path, monkeypatch, path, line):
    (tmp_path / "broken_task.py").write_text("1 / 0")
    (tmp_path / "needs_more.py").write_text("import no_such")
    monkeypatch.setattr(tests, "__path__", [*tests.__path__, str(tmp_path)])
    with pytest.raises(ConfigError) as error:
        build_environment(TaskSettings(env=path))
    assert str(error.value).startswith(f"task.env={path}: ") and line in str(error.value)
    assert "\n" not in str(error.value)


def test_an_environment_that_raises_while_it_is_built(tmp_path):
    options = {"directory": str(tmp_path), "broken": True}
    with pytest.raises(ConfigError) as error:
        build_environment(TaskSettings(env="tests.graded_tasks:Failing", options=options))
    assert "cannot be built from its options: RuntimeError: of building it (" in str(error.value)


def test_no_environment_is_imported_that_is_not_named():
    """The graders' host and the launcher should start in a fraction of a second."""
    code = "import sys, sdpo_megatron.envs; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "sdpo_megatron.envs.equations", "transformers"} & set(modules.split())


@pytest.mark.parametrize("name", sorted(ENVS))
def test_every_name_is_an_environment(name):
    assert issubclass(environment_class(name), Environment)
