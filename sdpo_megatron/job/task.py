"""What Slurm says to a job and to one task of a step: names, and the variables that ranks and devices are known by."""

from collections.abc import Mapping

from sdpo_megatron.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def rank_variables(environment: Mapping[str, str], master: str, port: str) -> dict[str, str]:
    """Returns what torchrun would set for this task of an srun step. Raises UserError outside of one."""
    try:
        return {
            "RANK": environment["SLURM_PROCID"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
        }
    except KeyError as error:
        raise UserError(
            f"{error.args[0]} is not set: a rank of a job is started by srun, as slurm/submit.py has it done."
        ) from None


def job_name(environment: Mapping[str, str]) -> str:
    """Returns what Slurm's commands call the job: of an element of an array its number and its place, such as 12_3. The
    number alone may mean the whole array."""
    array, place = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return environment["SLURM_JOB_ID"] if array is None else f"{array}_{place}"


def device_variables(environment: Mapping[str, str], gpus: str) -> dict[str, str]:
    """Returns the variable by which a task sees no other than `gpus`, numbers with commas in between, of those that its
    step has; nothing for "-", on CPUs. Raises UserError where the step has too few."""
    if gpus == "-":
        return {}
    wanted = [int(number) for number in gpus.split(",")]
    visible = environment.get(VISIBLE)
    given = [*map(str, range(max(wanted) + 1))] if visible is None else visible.split(",")
    if max(wanted) >= len(given):
        raise UserError(
            f"GPU {max(wanted)} is planned for, but the step sees {len(given)} ({VISIBLE}={visible}): "
            "hardware.gpus_per_node is more than the job was given."
        )
    return {VISIBLE: ",".join(given[number] for number in wanted)}
