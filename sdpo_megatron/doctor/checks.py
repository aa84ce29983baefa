"""What is looked at, in which order, and how long each may take."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdpo_megatron.config import RolloutSettings, RunSettings, ServerSettings, load_config
from sdpo_megatron.doctor.clock import clock
from sdpo_megatron.doctor.environments import SERVER, TRAINER, server_environment, trainer_environment
from sdpo_megatron.doctor.examine import Check
from sdpo_megatron.doctor.gpus import device_here, gpus
from sdpo_megatron.doctor.limits import cores, memory, open_files, shared_memory
from sdpo_megatron.doctor.network import host_name, ports, proxies
from sdpo_megatron.doctor.ring import gloo_ring, nccl_ring
from sdpo_megatron.doctor.run_directory import run_directory
from sdpo_megatron.doctor.sandboxes import sandbox
from sdpo_megatron.doctor.scratch import caches, scratch
from sdpo_megatron.doctor.slurm_commands import slurm_commands
from sdpo_megatron.files import expand_user

RING_S, ENVIRONMENT_S = 40.0, 60.0
OWN_MARGIN_S = 5.0
"""A check that starts programs ends them so long before it would be ended itself, and says which it was."""
FILES_HANG = "see which mount does not answer (df, ls), and have it mended or set run.dir elsewhere"
GPU_HANGS = "see whether nvidia-smi answers; where it does not, the driver or the GPU needs a reset"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The settings that matter here; without an experiment their defaults."""

    server: ServerSettings
    rollout: RolloutSettings
    run_directory: Path
    device: Literal["auto", "cpu", "cuda"]


def subject_of(experiment: str | None, overrides: Sequence[str]) -> Subject:
    """Reads an experiment's YAML. Raises ConfigError for what is wrong in it."""
    if experiment is None:
        run, server, rollout = RunSettings(name="any", steps=1), ServerSettings(), RolloutSettings()
    else:
        config, _ = load_config([experiment], overrides)
        run, server, rollout = config.run, config.server, config.rollout
    directory = expand_user(run.dir, "run.dir")
    return Subject(server=server, rollout=rollout, run_directory=directory, device=run.device)


def checks_of(subject: Subject) -> list[Check]:
    """Returns the checks of one machine, the quick ones first: where the time is up, the fewest go without."""
    environment = os.environ
    inner_ring_s, inner_environment_s = RING_S - OWN_MARGIN_S, ENVIRONMENT_S - OWN_MARGIN_S
    return [
        Check(name="clock", look=clock),
        Check(name="cores", look=cores),
        Check(name="memory", look=memory),
        Check(name="shared memory", look=shared_memory),
        Check(name="open files", look=lambda: open_files(subject.rollout)),
        Check(name="host name", look=host_name, if_it_hangs="see /etc/resolv.conf: the DNS does not answer"),
        Check(name="ports", look=ports),
        Check(name="proxies", look=lambda: proxies(environment)),
        Check(name="Slurm", look=lambda: slurm_commands(environment)),
        Check(name="scratch", look=lambda: scratch(environment), if_it_hangs=FILES_HANG),
        Check(name="caches", look=lambda: caches(environment), if_it_hangs=FILES_HANG),
        Check(
            name="run directory",
            look=lambda: run_directory(subject.run_directory),
            limit_s=40.0,
            if_it_hangs=FILES_HANG,
        ),
        Check(name="sandbox", look=sandbox, limit_s=60.0),
        Check(name="GPU", look=lambda: gpus(subject.device), limit_s=40.0, if_it_hangs=GPU_HANGS),
        Check(name="gloo ring", look=lambda: gloo_ring(inner_ring_s), limit_s=RING_S),
        Check(name="nccl ring", look=lambda: nccl_ring(inner_ring_s), limit_s=RING_S, if_it_hangs=GPU_HANGS),
        Check(name=TRAINER, look=lambda: trainer_environment(inner_environment_s), limit_s=ENVIRONMENT_S),
        Check(
            name=SERVER,
            look=lambda: server_environment(subject.server, device_here(subject.device), inner_environment_s),
            limit_s=ENVIRONMENT_S,
        ),
    ]
