"""What Slurm says to a task, as ranks and devices read it."""

import pytest

from sdpo_megatron.errors import UserError
from sdpo_megatron.job.task import device_variables, job_name, rank_variables

TASK = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


def test_what_a_job_is_called():
    assert job_name({"SLURM_JOB_ID": "12"}) == "12"
    # of an array's last element the number is the array's, and would mean them all
    element = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_name(element) == "12_3"


def test_a_rank():
    assert rank_variables(TASK, "host", "15000") == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "15000",
    }
    with pytest.raises(UserError, match="SLURM_PROCID is not set: a rank of a job is started by srun"):
        rank_variables({}, "host", "15000")


@pytest.mark.parametrize(
    ("environment", "gpus", "visible"),
    [
        ({}, "-", None),
        ({}, "2,3", "2,3"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "0,1", "4,5"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "1", "GPU-b"),
    ],
)
def test_devices_are_those_of_the_plan_among_those_of_the_step(environment, gpus, visible):
    assert device_variables(environment, gpus).get("CUDA_VISIBLE_DEVICES") == visible


def test_a_step_with_too_few_gpus_is_named():
    with pytest.raises(
        UserError, match=r"GPU 3 is planned for, but the step sees 2 .* hardware\.gpus_per_node"
    ):
        device_variables({"CUDA_VISIBLE_DEVICES": "0,1"}, "2,3")
