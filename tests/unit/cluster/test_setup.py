"""What a job's shell has after its first lines."""

import subprocess
from pathlib import Path

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.setup import CACHES, setup_lines


def after(hardware: HardwareSettings, *code: Path, **given: str) -> dict[str, str]:
    """Returns the environment behind the lines, where nothing else was exported, as under sbatch --export=NONE."""
    script = "\n".join(["set -eu", *setup_lines(hardware, *code), "env -0"])
    command = ["bash", "--noprofile", "--norc", "-c", script]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **given}, capture_output=True, check=True)
    return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if entry)


@pytest.fixture
def user() -> str:
    return subprocess.run(["id", "-u"], capture_output=True, text=True, check=True).stdout.strip()


def test_caches_lie_on_the_nodes_disk_also_without_a_users_name(user: str):
    found = after(HardwareSettings(), Path("/run/job/code"))
    assert found["TRITON_CACHE_DIR"] == f"/tmp/sdpo_{user}/triton"
    assert found["SGLANG_CACHE_DIR"] == f"/tmp/sdpo_{user}/sglang"
    own = after(HardwareSettings(), Path("/run/job/code"), PYTHONPATH="/home/me/envs")
    assert own["PYTHONPATH"] == "/run/job/code:/home/me/envs"
    assert len({found[variable] for variable in CACHES}) == len(CACHES)
    assert found["HF_HUB_OFFLINE"] == "1" and found["PYTHONPATH"] == "/run/job/code"
    of_the_site = after(HardwareSettings(), Path("/c"), SLURM_TMPDIR="/local/job 7")
    assert of_the_site["TRITON_CACHE_DIR"] == f"/local/job 7/sdpo_{user}/triton"


def test_scratch_may_have_blanks_and_variables_of_the_site(user: str):
    hardware = HardwareSettings(scratch="$LOCAL/my files", setup=["export LOCAL=/fast", "export SITE=1"])
    found = after(hardware, Path("/my run/code"))
    assert found["SGLANG_JIT_CACHE_DIR"] == f"/fast/my files/sdpo_{user}/sglang_jit"
    assert found["PYTHONPATH"] == "/my run/code" and found["SITE"] == "1"


def test_each_job_of_an_array_runs_its_own_copy():
    codes = [Path("/runs/a/code"), Path("/runs/b c/code")]
    found = [after(HardwareSettings(), *codes, SLURM_ARRAY_TASK_ID=number)["PYTHONPATH"] for number in "01"]
    assert found == ["/runs/a/code", "/runs/b c/code"]


def test_a_line_of_the_sites_that_fails_is_named():
    lines = setup_lines(HardwareSettings(setup=["module_is_missing load x", "export A=1"]), Path("/c"))
    done = subprocess.run(
        ["bash", "-c", "\n".join([*lines, "false", "echo $A"])], capture_output=True, text=True, check=True
    )
    assert "warning: hardware.setup: 'module_is_missing load x' failed\n" in done.stderr
    assert done.stderr.count("hardware.setup") == 1 and done.stdout == "1\n"
