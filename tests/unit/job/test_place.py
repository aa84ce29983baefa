"""Where a run directory may lie, who has a run already, and containers' images."""

import os
from pathlib import Path

import pytest

from sdpo_megatron.doctor import file_systems
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.job import place
from sdpo_megatron.job.description import JobDirectory
from sdpo_megatron.job.place import check_free, check_images, check_place, check_seen
from sdpo_megatron.job.state import Queued, write_number
from sdpo_megatron.run_dir.directory import open_run
from sdpo_megatron.terminal import script

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /run tmpfs rw 0 0
/dev/sdb1 /scratch xfs rw 0 0
server:/x /tmp/bound nfs4 rw 0 0
/dev/sda1 /tmp/mounted ext4 rw 0 0
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(file_systems, "MOUNTS", mounts)
    # as if all of them were there
    monkeypatch.setattr(place, "nearest_existing", lambda path: path)
    monkeypatch.setattr(file_systems, "nearest_existing", lambda path: path)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    monkeypatch.setattr(os, "access", lambda path, mode: True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("/tmp/runs/x", "The run directory /tmp/runs/x is below /tmp, of which each node has its own"),
        ("/var/tmp/x", "is below /var/tmp, of which each node has its own"),
        ("/dev/shm/x", "is in this machine's memory (tmpfs at /dev/shm)"),
        ("/run/user/0/x", "is in this machine's memory (tmpfs at /run)"),
    ],
)
@pytest.mark.parametrize("nodes", [1, 4])
def test_what_each_node_has_of_its_own_is_refused(machine: None, run: str, message: str, nodes: int):
    with pytest.raises(UserError) as caught:
        check_place(Path(run), nodes)
    assert message in str(caught.value)
    assert str(caught.value).endswith(": set run.dir to a directory that all nodes see.")


@pytest.mark.parametrize("run", ["/home/me/runs/x", "/tmp/bound/runs/x"])
def test_a_network_file_system_will_do(machine: None, run: str):
    assert check_place(Path(run), 4) is None


@pytest.mark.parametrize(
    ("run", "where"),
    [("/data/x", "ext4 at /"), ("/scratch/x", "xfs at /scratch"), ("/tmp/mounted/x", "ext4 at /tmp/mounted")],
)
def test_a_disk_of_this_machine_is_said_where_there_are_several_nodes(machine: None, run: str, where: str):
    assert check_place(Path(run), 1) is None
    assert check_place(Path(run), 2) == (
        f"{Path(run).parent} is on {where}, which looks like a disk of this machine: the job looks whether its nodes "
        "see it, and ends where one does not."
    )


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(place, "NODE_LOCAL", ())
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file is a file, where a directory should be for the run: set run.dir"
    ):
        check_place(tmp_path / "file" / "x", 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=rf"you may not write into {tmp_path}; set run.dir"):
        check_place(tmp_path / "runs" / "x", 1)


@pytest.mark.parametrize(
    ("queue", "state"),
    [
        (Queued("PENDING", "Resources", "1:00", ""), "waits (Resources)"),
        (Queued("RUNNING", "None", "1:00", "n1"), "is running"),
    ],
)
def test_a_run_that_is_a_job_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: Queued, state: str
):
    monkeypatch.setattr(place, "queued", lambda number: queue if number == "12_3" else None)
    run = tmp_path / "x"
    check_free(run)
    (run / "job").mkdir(parents=True)
    write_number(JobDirectory(run / "job"), "12_3")
    with pytest.raises(UserError) as caught:
        check_free(run)
    assert str(caught.value) == (
        f"{run} is job 12_3 already, which {state}: see {script('slurm/status.py', run)}, end it with "
        f"{script('slurm/stop.py', run)}, or choose another run.name."
    )
    # the job that this is asked in
    check_free(run, "12_3")
    write_number(JobDirectory(run / "job"), "11")
    check_free(run)


def test_a_run_that_a_process_has(tmp_path: Path):
    directory = open_run(tmp_path / "x", {}, {})
    with pytest.raises(
        UserError, match=rf"x is in use by process {os.getpid()}; stop that run first, or choose"
    ):
        check_free(tmp_path / "x")
    directory.close()
    check_free(tmp_path / "x")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--container-image=/images/torch.sqsh"],
        ["--mpi=none", "--container-image", "/images/torch.sqsh"],
        ["--container=/images/torch.sqsh"],
    ],
)
def test_an_image_that_is_not_there(arguments: list[str]):
    flag = "--container" if arguments[0].startswith("--container=") else "--container-image"
    with pytest.raises(ConfigError) as caught:
        check_images(arguments)
    assert str(caught.value) == (
        f"hardware.srun_args: {flag} names /images/torch.sqsh, which is not there: correct the path."
    )


def test_images_that_are_there_or_in_a_registry(tmp_path: Path):
    check_images(
        [
            f"--container-image={tmp_path}",
            "--container-image",
            "nvidia/pytorch:24.01",
            "--container-mounts=/no",
        ]
    )
    check_images(["--container-image"])


def test_nodes_that_do_not_see_the_directory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []
    said = "n3\nn2\n"

    def run_command(command: list[str]) -> str:
        commands.append(command)
        return said

    monkeypatch.setattr(place, "run_command", run_command)
    directory = JobDirectory(tmp_path / "x" / "job")
    check_seen(directory, ["n1"])
    assert commands == []
    with pytest.raises(UserError) as caught:
        check_seen(directory, ["n1", "n2", "n3"])
    assert str(caught.value) == (
        f"n2, n3 do not see {tmp_path / 'x'}, which must lie where all nodes see it: set run.dir."
    )
    assert {"--nodes=3", "--ntasks=3", "--overlap", str(directory.description)} <= set(commands[0])
    said = ""
    check_seen(directory, ["n1", "n2", "n3"])


def test_a_run_is_submitted_by_one_at_a_time(tmp_path: Path):
    run = tmp_path / "runs" / "x"
    with place.claimed([run]):
        with pytest.raises(UserError, match="is being submitted by another process"), place.claimed([run]):
            pass
    with place.claimed([run]):
        pass
