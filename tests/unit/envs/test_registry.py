import pytest

from sdpo_megatron.config import TaskSettings
from sdpo_megatron.envs import ENVS, build_environment
from sdpo_megatron.envs.base import look_up
from sdpo_megatron.errors import ConfigError


def test_a_task_is_built_from_its_name_and_options():
    environment = build_environment(TaskSettings(env="equations", options={"digits": 1, "test_size": 5}))
    assert isinstance(environment, ENVS["equations"])
    assert len(environment.test_problems()) == 5


def test_an_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError) as error:
        build_environment(TaskSettings(env="equation"))
    assert str(error.value) == (
        "There is no environment (task.env) 'equation'. Did you mean 'equations'? "
        "There are: equations, jsonl."
    )
    with pytest.raises(ConfigError, match=r"^There is no x 'zzz'\. There are: a, b\.$"):
        look_up("x", "zzz", {"b": 1, "a": 2})


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigError, match=r"'task\.options\.digit'.*'task\.options\.digits'"):
        build_environment(TaskSettings(env="equations", options={"digit": 2}))
    with pytest.raises(ConfigError, match=r"task\.options\.train_file"):
        build_environment(TaskSettings(env="jsonl"))
