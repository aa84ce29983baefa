"""What is submitted, and what is refused before it is; a stand-in takes the place of sbatch."""

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdpo_megatron.cluster.hardware import is_hardware, load_hardware
from sdpo_megatron.config import load_config
from sdpo_megatron.job import place
from sdpo_megatron.job.description import JobDirectory, ask_to_stop, is_asked_to_stop, read_job
from sdpo_megatron.job.inputs import read_inputs
from sdpo_megatron.job.state import number_of
from sdpo_megatron.models import hub
from sdpo_megatron.preflight.checked import preflight
from sdpo_megatron.run_dir.checkpoint_files import checkpoint_path, seal, write_manifest
from sdpo_megatron.run_dir.directory import open_run
from sdpo_megatron.terminal import script
from slurm import submit
from tests.unit.launch.launching import ROOT, Project, make_project
from tests.unit.test_yaml_files import QWEN3_8B

SBATCH = """#!/bin/sh
cp "$1" {script}
[ -e {refusal} ] && { cat {refusal} >&2; exit 1; }
echo "Submitted batch job 4711"
"""
SINFO = """#!/bin/sh
echo 'main*|up|infinite|1-infinite|UNLIMITED|4|idle|16|16000|gpu:8|(null)'
echo 'short|up|2:00|1-infinite|UNLIMITED|4|idle|16|16000|gpu:8|(null)'
"""
NOTHING = "#!/bin/sh\n[ -e {queue} ] && cat {queue}; exit 0\n"
NO_ACCOUNTING = "#!/bin/sh\necho 'no slurmdbd here' >&2; exit 1\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    (tmp_path / "p").mkdir()
    project = make_project(tmp_path / "p")
    values = json.loads(project.yaml.read_text())
    values["task"]["options"] = {"train_size": 50, "test_size": 5}
    project.yaml.write_text(json.dumps(values))
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = dict.fromkeys(("sbatch", "srun", "scontrol", "sacct"), SBATCH)
    texts |= {"sinfo": SINFO, "squeue": NOTHING, "sacctmgr": NO_ACCOUNTING}
    for name, text in texts.items():
        for file in ("script", "refusal", "queue"):
            text = text.replace(f"{{{file}}}", str(tmp_path / file))
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    # the directories of tests lie below /tmp
    monkeypatch.setattr(place, "NODE_LOCAL", ())
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield project


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "hardware:\n  nodes: 3\n  placement: separate_nodes\n  server_nodes: 1\n  partition: main\n"
    )
    return path


def test_a_dry_run_shows_the_plan_and_leaves_nothing(
    project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (project.path / "model" / "model.safetensors").unlink()
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "hardware.account=us", "--dry-run"]
    assert submit.main(arguments) == 0
    out = capsys.readouterr().out
    for line in ("NODE0    rank 0", "NODE1    rank 1", "NODE2    server0", "    --partition=main"):
        assert f"{line}\n" in out
    assert "    --account=us\n" in out and "server0 on NODE2\n    srun --job-name=server0 " in out
    assert "trainer on NODE0, NODE1\n    srun --job-name=trainer --nodes=2 --ntasks=2 " in out
    assert out.endswith(
        "Nothing was submitted. Not looked at: the problems, the tokenizer, the weights, what Slurm has.\n"
    )
    assert not project.run.exists()
    # it may be made on another machine
    monkeypatch.setattr(place, "NODE_LOCAL", ("/tmp",))
    assert submit.main([*arguments, "run.dir=/tmp/runs"]) == 0
    assert capsys.readouterr().out.endswith(
        "\nwarning: The run directory /tmp/runs/x is below /tmp, of which each node has its own: set run.dir to a "
        "directory that all nodes see.\n"
    )


def test_what_is_submitted_runs_a_copy_of_the_package_with_all_settings(
    project: Project, hardware: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2", "optimizer.lr=3e-6"]) == 0
    out = capsys.readouterr().out
    assert "Submitted as job 4711." in out and script("slurm/stop.py", project.run) in out
    assert f"has not been examined yet: {script('slurm/doctor.py', hardware)} (two minutes)" in out
    batch = (tmp_path / "script").read_text()
    for line in ("--nodes=3", "--partition=main", "--signal=B:USR2@120", "--requeue", "--mem=0"):
        assert f"#SBATCH {line}\n" in batch
    assert "#SBATCH --signal=USR2" not in batch
    assert re.findall("--job-name=.*", batch) == ["--job-name=x"]
    directory = JobDirectory(project.run / "job")
    assert f"code={directory.code}\n" in batch and "export HF_HUB_OFFLINE=1\n" in batch
    # the signal is for what takes the shell's place
    assert "\nexec " in batch and "submitit.core._submit" in batch
    assert (directory.code / "sdpo_megatron" / "train.py").is_file()
    job = read_job(directory)
    settings = json.dumps(job.arguments)
    assert job.hardware.nodes == 3 and settings == json.dumps([str(directory.path / "settings.yaml")])
    assert "lr: 3.0e-06" in (directory.path / "settings.yaml").read_text()
    # what was resolved is read as it is
    assert submit.main([str(directory.path / "settings.yaml"), str(hardware), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware.nodez=3"], "nodez"),
        (
            ["parallel.dp=3"],
            "The trainer has 3 ranks (parallel.dp * pp * tp), which 2 nodes cannot share evenly",
        ),
        (
            ["hardware.gpus_per_node=8"],
            "but the hardware has 16 GPUs for it (2 nodes with 8): set parallel.dp=16",
        ),
        (["server.urls=[http://127.0.0.1:1]"], "a job starts its own: leave it out"),
        (["log.wandb=online"], "needs the internet, which jobs go without; set log.wandb=offline"),
        (["optimizer.lr=-1"], "optimizer.lr is -1"),
        (["hardware.partition=gpux"], "this cluster does not have: take one of main (the default), short."),
        (["hardware.nodes=9", "parallel.dp=8"], "and partition main has 4 in all: make it 4 or less"),
        (
            ["hardware.partition=short"],
            "hardware.time_limit is 24:00:00, and partition short allows 00:02:00",
        ),
        (["hardware.cpus_per_node=17"], "but a job has 16 CPUs at most on a node of partition main"),
        (["hardware.srun_args=['--container-image=/no.sqsh']"], "names /no.sqsh, which is not there"),
        (
            ["hardware.sbatch_args={partition: high}"],
            "hardware.sbatch_args.partition: write hardware.partition",
        ),
        (["--sweep", "run.name=a,b"], "each run has a name of its own"),
        (["--sweep", "optimizer.lr=1e-5,-1"], "optimizer.lr is -1"),
        (["--sweep", "run.seed=1,2", "--prepare"], "--prepare is for one run, and --sweep makes several"),
    ],
)
def test_what_is_wrong_is_said_before_it_queues(
    project: Project,
    hardware: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not (tmp_path / "script").exists() and not project.run.parent.exists()


def test_a_run_directory_that_nodes_do_not_see(
    project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(place, "NODE_LOCAL", (str(project.path),))
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 2
    errors = capsys.readouterr().err
    assert f"error: The run directory {project.run} is below {project.path}, of which each node has" in errors
    assert not project.run.exists()


def test_a_run_that_is_a_job_already(
    project: Project, hardware: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2"]
    assert submit.main(arguments) == 0
    (tmp_path / "queue").write_text("RUNNING|None|1:00|n[1-3]\n")
    capsys.readouterr()
    assert submit.main(arguments) == 2
    errors = capsys.readouterr().err
    see = script("slurm/status.py", project.run)
    assert errors.startswith(f"error: {project.run} is job 4711 already, which is running: see {see}, end it")
    (tmp_path / "queue").unlink()
    ask_to_stop(JobDirectory(project.run / "job"), "4711")
    assert submit.main(arguments) == 0
    # the model is as it was
    assert "Hashing" not in capsys.readouterr().out
    # the job before was
    assert not is_asked_to_stop(JobDirectory(project.run / "job"))


def test_a_run_that_goes_on_with_other_settings_or_has_nothing_left_to_do(
    project: Project, hardware: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "run.steps=4"]
    values = load_config([project.yaml], ["parallel.dp=2", "run.steps=4", "run.device=cpu"])[0].model_dump()
    directory = open_run(project.run, values, {})
    directory.close()
    checkpoint = checkpoint_path(directory.checkpoints, 2)
    checkpoint.mkdir()
    (checkpoint / "file").touch()
    write_manifest(checkpoint, {}, seal(checkpoint, ["file"]))
    directory.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(3)))
    assert submit.main([*arguments, "optimizer.lr=7e-6"]) == 0
    before, now = f"optimizer.lr={values['optimizer']['lr']}", "optimizer.lr=7e-06"
    assert f"x goes on after step 2 with {before}, now {now}\n" in capsys.readouterr().out
    assert submit.main([*arguments[:-1], "run.steps=2"]) == 2
    assert capsys.readouterr().err == (
        f"error: {project.run} is finished: it has 2 of 2 steps; raise run.steps to go on, or choose another "
        "run.name.\n"
    )


def test_a_full_disk_is_one_line(
    project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last
        == f"error: The run directory {project.run} cannot be written: No space left on device; set run.dir."
    )


def test_accounts_that_nobody_knows_of_are_said_and_it_goes_on(
    project: Project, hardware: Path, capsys: pytest.CaptureFixture[str]
):
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2", "hardware.account=us"]) == 0
    out = capsys.readouterr().out
    assert "\nhardware.account and hardware.qos were not looked at: sacctmgr -nP show assoc" in f"\n{out}"
    assert "format=account,partition,qos failed: no slurmdbd here.\n" in out


def test_the_files_that_a_job_reads_lie_beside_it_with_their_hashes(project: Project, hardware: Path):
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 0
    found = read_inputs(JobDirectory(project.run / "job").inputs)
    weights = project.path / "model" / "model.safetensors"
    assert found[str(weights)].bytes == weights.stat().st_size and len(found[str(weights)].sha256) == 64


def test_what_an_id_of_the_hub_means_is_asked_once(
    project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def download(name: str, revision: str | None, key: str) -> Path:
        asked.append(name)
        return project.path / "model"

    monkeypatch.setattr(hub, "_download", download)
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "model.path=Org/Name"]
    assert submit.main(arguments) == 0
    # as each rank of the job does
    settings = str(JobDirectory(project.run / "job").settings)
    checked = preflight([settings], world_size=2, rank=1)
    assert checked.model_directory == project.path / "model" and asked == ["Org/Name"]


def test_a_sweep_is_one_array_with_a_run_directory_each(
    project: Project, hardware: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sweep = ["--sweep", "optimizer.lr=1e-5,1e-6", "--sweep", "run.seed=0,1"]
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2", *sweep]) == 0
    out = capsys.readouterr().out
    batch = (tmp_path / "script").read_text()
    assert "#SBATCH --array=0-3%" in batch and "#SBATCH --job-name=x\n" in batch
    assert 'code="${codes[$SLURM_ARRAY_TASK_ID]}"\n' in batch
    (copies,) = re.findall(r"^codes=\((.*)\)$", batch, re.MULTILINE)
    names = [f"x-optimizer.lr_{lr}-run.seed_{seed}" for lr in ("1e-5", "1e-6") for seed in (0, 1)]
    runs = [project.run.parent / name for name in names]
    assert copies.split() == [str(run / "job" / "code") for run in runs]
    for number, run in enumerate(runs):
        assert number_of(run) == f"4711_{number}"
        assert f"Submitted as job 4711_{number}. Run directory: {run}, " in out
        settings = (run / "job" / "settings.yaml").read_text()
        assert f"name: {run.name}\n" in settings and f"seed: {number % 2}\n" in settings
        assert (run / "job" / "code" / "sdpo_megatron" / "train.py").is_file()
        assert len(read_inputs(JobDirectory(run / "job").inputs)) > 3
    assert f"State: {script('slurm/status.py', *runs)}\n" in out
    assert out.count("Hashing ") == 1 and out.count("looks like a disk of this machine") == 1


def test_a_dry_run_of_a_sweep_shows_the_names(
    project: Project, hardware: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "--sweep", "run.seed=0,1", "--dry-run"]
    assert submit.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("An array of 2 runs:\n    x-run.seed_0\n    x-run.seed_1\n\nThe first of them:\n\n")
    assert "x-run.seed_0: 3 nodes, separate_nodes\n" in out and not project.run.parent.exists()


def test_one_combination_that_is_wrong_leaves_nothing(
    project: Project, hardware: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # a setting is refused before anything else is looked at
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "--sweep", "optimizer.lr=1e-5,-1"]
    assert submit.main(arguments) == 2 and capsys.readouterr().out == ""
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "--sweep", "rollout.max_tokens=8,999999"]
    assert submit.main(arguments) == 2
    assert not (tmp_path / "script").exists() and not project.run.parent.exists()


def test_what_is_prepared_lacks_the_submission_alone(
    project: Project,
    hardware: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments = [str(project.yaml), str(hardware), "parallel.dp=2", "--prepare"]
    assert submit.main(arguments) == 0
    # nothing else is on standard output, which a script reads
    assert capsys.readouterr().out == f"{project.run}\n"
    directory = JobDirectory(project.run / "job")
    assert read_job(directory).hardware.nodes == 3 and not (tmp_path / "script").exists()
    assert f"code={directory.code}\n" in directory.setup.read_text()
    assert not directory.number.exists()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert submit.main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: This job has 2 nodes, and hardware.nodes is 3: give sbatch --nodes=3, or set hardware.nodes=2.\n"
    )
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert submit.main(arguments) == 0
    assert number_of(project.run) == "12"


README = (Path(submit.__file__).parent / "README.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^    \$ python slurm/submit\.py (.+)\n((?:    .+\n)+)", README, re.MULTILINE)
MODELS = {
    "Qwen3-8B": QWEN3_8B,
    "Qwen3-32B": QWEN3_8B
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}


@pytest.mark.parametrize(("command", "plan"), PLANS, ids=[str(number) for number in range(len(PLANS))])
def test_the_readmes_plans_are_what_the_command_shows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    plan: str,
):
    for name, shape in MODELS.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(shape))
    (tmp_path / "yaml").symlink_to(ROOT / "yaml")
    monkeypatch.chdir(tmp_path)
    assert submit.main(command.split()) == 0
    shown = capsys.readouterr().out.partition("\nsbatch")[0]
    assert [line for line in shown.splitlines() if line] == [line.strip() for line in plan.splitlines()]


def test_every_file_of_hardware_is_in_the_readmes_and_loads():
    files = sorted((ROOT / "yaml" / "hardware").glob("*.yaml"))
    assert len(files) >= 4 and len(PLANS) == 5
    for path in files:
        assert is_hardware(path) and load_hardware([path], []).nodes
        assert path.name in README + (ROOT / "yaml" / "README.md").read_text(encoding="utf-8")


def test_a_file_of_hardware_alone_is_no_experiment(hardware: Path, capsys: pytest.CaptureFixture[str]):
    assert submit.main([str(hardware)]) == 2
    assert "no experiment: give its YAML file beside that of hardware" in capsys.readouterr().err


def test_it_says_how_it_is_called(capsys: pytest.CaptureFixture[str]):
    assert submit.main([]) == 2
    assert "for example: python slurm/submit.py yaml/demo_cpu.yaml" in capsys.readouterr().err


def test_what_slurm_refuses_is_one_line(
    project: Project, hardware: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "refusal").write_text("sbatch: error: invalid partition specified: main\n")
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 1
    errors = capsys.readouterr().err
    last = errors.splitlines()[-1]
    assert last.startswith("error: Slurm does not take the job: ") and "invalid partition specified" in last
    assert "Traceback" not in errors


def test_without_slurm(project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin-none")
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 2
    assert "There is no sbatch on PATH" in capsys.readouterr().err


def test_without_submitit(project: Project, hardware: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit.main([str(project.yaml), str(hardware), "parallel.dp=2"]) == 2
    assert "submitit is not installed; run: pip install -e '.[slurm]'" in capsys.readouterr().err


def test_no_hardware_at_all_is_refused(project: Project, capsys: pytest.CaptureFixture[str]):
    assert submit.main([str(project.yaml), "--dry-run"]) == 2
    assert "no hardware: give a YAML file of what the job is given" in capsys.readouterr().err


def test_a_file_that_may_not_be_used_is_one_line(
    project: Project, hardware: Path, capsys: pytest.CaptureFixture[str]
):
    from slurm import status

    assert status.main([str(project.yaml)]) == 2
    errors = capsys.readouterr().err
    assert f"error: {project.yaml}/job/number cannot be used: Not a directory" in errors
    assert errors.count("\n") == 1
