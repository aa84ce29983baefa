"""Every YAML file of the repository is a whole, valid experiment."""

from pathlib import Path

import pytest

from sdpo_megatron.config import load_config
from sdpo_megatron.envs import ENVS
from sdpo_megatron.strict_yaml.load import parse

FOLDER = Path(__file__).parents[2] / "yaml"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_are_files():
    assert FOLDER / "demo_cpu.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_it_loads(path: Path):
    config, origins = load_config([path])
    assert config.run.name == path.stem
    options = getattr(ENVS[config.task.env], "Options")  # noqa: B009
    parse(options, config.task.options, origins, "task.options")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_folder_s_table_names_it(path: Path):
    assert f"`{path.relative_to(FOLDER)}`" in (FOLDER / "README.md").read_text(encoding="utf-8")
