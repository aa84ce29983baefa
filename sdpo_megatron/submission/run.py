"""A run becomes a job: checked as a whole, laid into its run directory, and sent to Slurm."""

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import plan_layout
from sdpo_megatron.cluster.setup import setup_lines
from sdpo_megatron.cluster.steps import job_options
from sdpo_megatron.config import LogSettings, RunSettings, ServerSettings, load_config
from sdpo_megatron.errors import ConfigError, RunFailed, UserError
from sdpo_megatron.files import expand_user, write_atomically
from sdpo_megatron.job import keeper
from sdpo_megatron.job.description import Job, JobDirectory, write_job
from sdpo_megatron.job.inputs import InputFile, describe_inputs, input_files, read_inputs, write_inputs
from sdpo_megatron.job.place import check_free, check_place
from sdpo_megatron.preflight.checked import Checked, parse_arguments, preflight
from sdpo_megatron.run_dir.checkpoint_files import newest_checkpoint
from sdpo_megatron.run_dir.directory import RunDirectory, stored_values
from sdpo_megatron.run_dir.identity import changes
from sdpo_megatron.run_dir.snapshots_file import write_snapshots

PACKAGE = Path(__file__).resolve().parents[1]
Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that can be submitted."""

    run: Path
    checked: Checked

    @property
    def directory(self) -> JobDirectory:
        return JobDirectory(self.run / "job")


def run_path(run: RunSettings) -> Path:
    return (expand_user(run.dir, "run.dir") / run.name).absolute()


def check_offline(server: ServerSettings, log: LogSettings) -> None:
    """Raises ConfigError for what a job without internet, which starts its own servers, cannot have."""
    if server.urls:
        raise ConfigError(
            "server.urls names servers that run already, and a job starts its own: leave it out."
        )
    if log.wandb == "online":
        raise ConfigError(
            "log.wandb=online needs the internet, which jobs go without; set log.wandb=offline."
        )


def check_submission(
    arguments: Sequence[str],
    hardware: HardwareSettings,
    announce: Announce,
    own_job: str | None = None,
    *,
    here: bool = False,
) -> Submission:
    """Checks the run of the `arguments` of sdpo_megatron.train, and changes nothing. `own_job` is the job that this
    process is in; `here`: whether it will run on this machine. Raises UserError."""
    parsed = parse_arguments(arguments)
    config, _ = load_config(parsed.files, parsed.overrides)
    check_offline(config.server, config.log)
    run = run_path(config.run)
    remark = None if here else check_place(run, hardware.nodes)
    if remark is not None:
        announce(remark)
    check_free(run, own_job)
    ranks = config.parallel.ranks
    checked = preflight(arguments, world_size=ranks, rank=0, gpus=hardware.gpus_per_node, announce=announce)
    plan_layout(hardware, config.parallel, config.server.tp)
    _check_goes_on(checked, announce)
    return Submission(run=run, checked=checked)


def _check_goes_on(checked: Checked, announce: Announce) -> None:
    """Says what is not as it was when the run last started. Raises ConfigError where nothing is left of it to do."""
    directory, steps = checked.directory, checked.config.run.steps
    newest = newest_checkpoint(directory.checkpoints)
    if newest is None:
        return
    if int(newest.name) >= steps:
        raise ConfigError(
            f"{directory.path} is finished: it has {int(newest.name)} of {steps} steps; raise run.steps to go on, or "
            "choose another run.name."
        )
    for change in changes(stored_values(directory), checked.config.model_dump()):
        announce(f"{directory.path.name} goes on after step {int(newest.name)} with {change}")


def read_all(submissions: Sequence[Submission], announce: Announce) -> dict[Path, InputFile]:
    """Returns all files that the runs read, with their hashes, by path. What a run's directory has of an earlier
    submission is taken from there where the file is as it was."""
    known: dict[str, InputFile] = {}
    for submission in submissions:
        known |= read_inputs(submission.directory.inputs)
    paths = dict.fromkeys(path for submission in submissions for path in input_files(submission.checked))
    return {Path(one.path): one for one in describe_inputs([*paths], known, announce)}


def lay_down(submission: Submission, hardware: HardwareSettings, inputs: Mapping[Path, InputFile]) -> None:
    """Writes all that a job needs into its run directory. Raises UserError where that cannot be."""
    directory, run, checked = submission.directory, submission.run, submission.checked
    settings = directory.settings
    # what was not said is left to be known by default
    values = checked.config.model_dump(mode="json", exclude_unset=True)
    values["run"]["dir"] = str(run.parent)
    job = Job(
        name=checked.config.run.name, hardware=hardware, arguments=(str(settings),), python=sys.executable
    )
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            PACKAGE,
            directory.code / PACKAGE.name,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        write_atomically(settings, yaml.safe_dump(values, sort_keys=False))
        # what an id of the Hub means is asked once, here
        write_snapshots(RunDirectory(run).snapshots, checked.snapshots)
        write_inputs(directory.inputs, [inputs[path] for path in input_files(checked)])
        write_atomically(directory.setup, "\n".join(setup_lines(hardware, directory.code)) + "\n")
        write_job(directory, job)
        # of a job before, whose number stands there until the new one is known
        directory.asked.unlink(missing_ok=True)
    # of shutil's own nothing but the text says why
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise UserError(f"The run directory {run} cannot be written: {why}; set run.dir.") from None


def send(
    name: str, hardware: HardwareSettings, submissions: Sequence[Submission], submitit_folder: Path
) -> list[str]:
    """Submits one job, or one array where there are several. Returns the number that Slurm gives each, such as 12 or
    12_3. Raises RunFailed where Slurm refuses."""
    import submitit
    from submitit.core.utils import FailedJobError

    # what a signal is for, the batch shell, is then ours
    executor = submitit.SlurmExecutor(folder=submitit_folder, python=f"exec {shlex.quote(sys.executable)}")
    options = {key: value or True for key, value in job_options(hardware, name).items()}
    executor.update_parameters(
        # submitit has a name of its own for it
        job_name=options.pop("job-name"),
        use_srun=False,
        stderr_to_stdout=True,
        setup=setup_lines(hardware, *(submission.directory.code for submission in submissions)),
        additional_parameters=options,
    )
    runs = [str(submission.run) for submission in submissions]
    try:
        return [job.job_id for job in executor.map_array(keeper.in_job, runs)]
    except FailedJobError as error:
        raise RunFailed(f"Slurm does not take the job: {' '.join(str(error).split())}") from None
