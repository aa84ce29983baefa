"""Files of hardware: strict like all settings."""

import math
from pathlib import Path

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings, is_hardware, load_hardware, seconds_of
from sdpo_megatron.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_and_overrides(tmp_path: Path):
    file = write(
        tmp_path / "a.yaml",
        "# ours\nhardware:\n  nodes: 4\n  gpus_per_node: 8\n  time_limit: 1-02:30:00\n  partition: gpu\n",
    )
    hardware = load_hardware([file], ["hardware.nodes=2", "hardware.setup=[module load cuda]"])
    assert (hardware.nodes, hardware.gpus_per_node, hardware.partition) == (2, 8, "gpu")
    assert hardware.time_limit_s == ((26 * 60) + 30) * 60 and hardware.setup == ["module load cuda"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5:30", 330),
        ("45", 45),
        ("1:02:03", 3723),
        ("2-01:00:00", 176_400),
        ("0:00", 0),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("INVALID", math.inf),
        ("", math.inf),
    ],
)
def test_times_that_slurm_prints(text: str, seconds: float):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("hardware:\n  nodes: 1\n", True),
        ("---\n# x\n\nhardware: {}\n", True),
        ("run:\n  name: x\nhardware: {}\n", True),
        ("", False),
    ],
)
def test_which_files_are_of_hardware(tmp_path: Path, text: str, known: bool):
    assert is_hardware(write(tmp_path / "a.yaml", text)) == known
    assert not is_hardware(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hardware.nodez=1", "nodez"),
        ("hardware.nodes=0", "hardware.nodes is 0"),
        ("hardware.partition=a b", "hardware.partition is 'a b'"),
        ("hardware.time_limit=2h", "write HH:MM:SS or D-HH:MM:SS, such as 24:00:00"),
        ("hardware.time_limit=01:70:00", "write HH:MM:SS or D-HH:MM:SS"),
        ("hardware.time_limit=00:00:30", "give a minute at least"),
        ("hardware.scratch=scratch/me", "hardware.scratch is 'scratch/me'"),
        ("hardware.scratch='~/scratch'", "hardware.scratch is '~/scratch'"),
        ("hardware.scratch='/x\"; rm -r'", "hardware.scratch is"),
        ("hardware.placement=apart", "separate_nodes"),
        ("hardware.server_nodes=1", "is for hardware.placement=separate_nodes, and it is colocated"),
        ("hardware.server_gpus_per_node=1", "is for hardware.placement=split_node, and it is colocated"),
        ("hardware.placement=split_node", "needs hardware.gpus_per_node of 2 or more"),
        ("hardware.placement=separate_nodes", "needs hardware.nodes of 2 or more"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str):
    with pytest.raises(ConfigError) as raised:
        load_hardware([], [override])
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"gpus_per_node": 8, "placement": "split_node", "server_gpus_per_node": 8},
            "give from 1 to 7 of the 8 GPUs",
        ),
        ({"nodes": 4, "placement": "separate_nodes", "server_nodes": 4}, "give from 1 to 3 of the 4 nodes"),
    ],
)
def test_somebody_has_to_train(values: dict, message: str):
    overrides = [f"hardware.{key}={value}" for key, value in values.items()]
    with pytest.raises(ConfigError, match=message):
        load_hardware([], overrides)


def test_the_defaults_are_one_node_without_gpus():
    assert load_hardware([], []) == HardwareSettings()


def test_an_option_of_sbatch_that_has_a_key_of_its_own():
    with pytest.raises(
        ConfigError, match=r"hardware\.sbatch_args\.time: write hardware\.time_limit in its place\."
    ):
        load_hardware([], ["hardware.sbatch_args={time: 60}"])
    for name in ("p", "--mail-type", "-p"):
        with pytest.raises(ConfigError) as caught:
            load_hardware([], [f"hardware.sbatch_args={{'{name}': main}}"])
        assert str(caught.value) == (
            f"hardware.sbatch_args.{name}: write the long name of the option without dashes before it, such as "
            "mail-type."
        )
    assert load_hardware([], ["hardware.sbatch_args={mail-type: END}"]).sbatch_args == {"mail-type": "END"}
