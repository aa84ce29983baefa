"""The commands of a job's steps."""

from pathlib import Path
from typing import Any

import pytest

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import plan_layout
from sdpo_megatron.cluster.steps import job_options, server_step, trainer_step
from sdpo_megatron.config import ParallelSettings

LOGS = Path("/shared/runs/x/logs/attempt_0")
FENCE = ("/begun", "1")


def hardware(**values: Any) -> HardwareSettings:
    return HardwareSettings.model_validate(values)


def test_steps_of_split_nodes_take_the_gpus_that_the_layout_gives_them():
    split = hardware(
        nodes=2,
        gpus_per_node=4,
        cpus_per_node=32,
        placement="split_node",
        server_gpus_per_node=2,
        gpu_type="h100",
    )
    layout = plan_layout(split, ParallelSettings(tp=2, dp=2), 2)
    common: dict[str, Any] = {"python": "/p", "logs": LOGS, "fence": FENCE}
    trainer = trainer_step(layout, split, ["a", "b"], arguments=["x.yaml", "optimizer.lr=1"], **common)
    assert trainer.hosts == ("a", "b")
    program = trainer.command[trainer.command.index("/p") :]
    assert program == (
        *("/p", "-m", "sdpo_megatron.job.rank", *FENCE, "a", "15000", "2,3"),
        *("x.yaml", "optimizer.lr=1"),
    )
    for option in ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--nodelist=a,b", "--cpus-per-task=16"):
        assert option in trainer.command
    for option in ("--overlap", "--mem=0", "--gpus-per-node=h100:4", f"--output={LOGS}/rank%t.log"):
        assert option in trainer.command
    key: dict[str, Any] = {"key_file": Path("/k"), "world_size": 4}
    server = server_step(layout.servers[1], split, ["a", "b"], arguments=["x.yaml"], **common, **key)
    assert (server.name, server.hosts) == ("server1", ("b",))
    program = server.command[server.command.index("/p") :]
    assert program == (
        *("/p", "-m", "sdpo_megatron.job.server", *FENCE, "b", "15001", "0,1", "/k"),
        *(f"{LOGS}/server1.log", "4", "nobody", "x.yaml"),
    )
    assert "--ntasks=1" in server.command and f"--output={LOGS}/server1.out" in server.command


def test_steps_on_cpus_ask_for_no_gpus_and_a_container_is_every_steps():
    cpu = hardware(srun_args=["--container-image=x.sqsh"])
    layout = plan_layout(cpu, ParallelSettings(), 1)
    for step in (
        trainer_step(layout, cpu, ["a"], python="/p", fence=FENCE, arguments=[], logs=LOGS),
        server_step(
            *(layout.servers[0], cpu, ["a"]),
            python="/p",
            fence=FENCE,
            arguments=[],
            logs=LOGS,
            key_file=Path("/k"),
            world_size=1,
        ),
    ):
        assert not any("gpus" in part for part in step.command)
        assert step.command.index("--container-image=x.sqsh") < step.command.index("/p")
        assert step.command[step.command.index("/p") + 7] == "-"
    # a server that shares its machine with ranks leaves memory to them
    assert step.name == "server0" and step.program[-1] == "trainer"


def test_what_the_job_asks_for():
    asked = hardware(
        nodes=4,
        gpus_per_node=8,
        cpus_per_node=96,
        partition="gpu",
        account="us",
        exclusive=True,
        grace_s=300.0,
        sbatch_args={"comment": "x", "contiguous": True, "requeue": True, "hold": False},
    )
    assert job_options(asked, "run") == {
        "job-name": "run",
        "nodes": "4",
        "ntasks-per-node": "1",
        "cpus-per-task": "96",
        "time": "24:00:00",
        "signal": "B:USR2@300",
        "open-mode": "append",
        "requeue": "",
        "mem": "0",
        "gpus-per-node": "8",
        "partition": "gpu",
        "account": "us",
        "exclusive": "",
        "comment": "x",
        "contiguous": "",
    }


@pytest.mark.parametrize(("gb", "mem"), [(None, "0"), (500.0, "500000M"), (0.5, "500M")])
def test_memory_is_the_nodes_or_what_is_asked_for(gb: float | None, mem: str):
    assert job_options(hardware(memory_gb_per_node=gb), "run")["mem"] == mem
