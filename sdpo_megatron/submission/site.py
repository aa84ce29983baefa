"""What Slurm says of the cluster before anything is submitted to it."""

import getpass
import shutil
from collections.abc import Callable, Mapping

from sdpo_megatron.cluster.accounts import check_account, parse_associations, sacctmgr
from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.partitions import SINFO, check_request, parse_partitions
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.job.slurm import run_command
from sdpo_megatron.job.this_machine import check_submitit


def check_tools() -> None:
    """Raises UserError where nothing can be submitted from here."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no sbatch on PATH: submit from a login node of the cluster, or see --dry-run."
        )
    check_submitit()


def check_site(hardware: HardwareSettings, announce: Callable[[str], None]) -> None:
    """Asks Slurm whether such a job could ever run; `announce` is told what else there is to say, a line each. Raises
    ConfigError where it could not, RunFailed where Slurm does not answer."""
    remark = check_request(hardware, parse_partitions(run_command(SINFO)))
    if remark is not None:
        announce(remark)
    if hardware.account is None and hardware.qos is None:
        return
    try:
        associations = parse_associations(run_command(sacctmgr(getpass.getuser())))
        why = "Slurm's accounting has no account of yours"
    except RunFailed as error:
        associations, why = [], error.message
    if associations:
        check_account(hardware, associations)
    else:
        announce(f"hardware.account and hardware.qos were not looked at: {why.rstrip('.')}.")


def check_allocation(environment: Mapping[str, str], hardware: HardwareSettings) -> None:
    """Raises UserError where the job that this process is in has another number of nodes than `hardware`."""
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes != hardware.nodes:
        raise UserError(
            f"This job has {nodes} {'node' if nodes == 1 else 'nodes'}, and hardware.nodes is {hardware.nodes}: give "
            f"sbatch --nodes={hardware.nodes}, or set hardware.nodes={nodes}."
        )
