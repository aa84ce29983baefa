"""What a job would be, from its settings and the model's config.json alone: who runs where, by which commands."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdpo_megatron.cluster.hardware import HardwareSettings
from sdpo_megatron.cluster.layout import Layout
from sdpo_megatron.cluster.steps import job_options
from sdpo_megatron.config import load_config
from sdpo_megatron.errors import UserError
from sdpo_megatron.job.attempt import Allocation, plan_steps
from sdpo_megatron.job.description import Job, JobDirectory
from sdpo_megatron.job.place import check_place
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.preflight.checked import parse_arguments
from sdpo_megatron.preflight.settings import check_batch, check_layout, check_parallel
from sdpo_megatron.run_dir.directory import check_run
from sdpo_megatron.submission.run import check_offline, run_path, setup_lines
from sdpo_megatron.terminal import tell


def show(experiment: Sequence[str], hardware: HardwareSettings) -> None:
    """Prints the plan of the run of the arguments `experiment`. Raises UserError for what cannot be."""
    arguments = parse_arguments(experiment)
    config, _ = load_config(arguments.files, arguments.overrides)
    check_offline(config.server, config.log)
    check_parallel(config.parallel)
    check_batch(config.rollout, config.optimizer, config.parallel)
    model, unseen = Path(config.model.path).expanduser(), ["the problems", "the tokenizer", "the weights"]
    if (model / "config.json").is_file():
        check_layout(config.parallel, read_model_shape(model))
    else:
        unseen.append(f"config.json of {config.model.path}, which is not here")
    run = run_path(config.run)
    check_run(run, config.model_dump())
    job = Job(name=config.run.name, hardware=hardware, arguments=tuple(experiment), python=sys.executable)
    nodes = hardware.nodes
    hosts = [f"NODE{number}" for number in range(nodes)]
    logs = run / "logs" / "attempt_000"
    directory = JobDirectory(run / "job")
    allocation = Allocation(job=0, number=0, hosts=hosts)
    layout, steps = plan_steps(job, allocation, config.parallel, config.server, directory, logs)
    tell(f"{job.name}: {nodes} {'node' if nodes == 1 else 'nodes'}, {hardware.placement}\n")
    for number, host in enumerate(hosts):
        tell(f"{host:8} {on_node(number, layout)}")
    tell("\nsbatch")
    for key, value in job_options(hardware, job.name).items():
        tell(f"    --{key}{f'={value}' if value else ''}")
    for line in setup_lines(hardware, directory.code):
        tell(f"    {line}")
    for step in steps:
        tell(f"\n{step.name} on {', '.join(step.hosts)}\n    {' '.join(step.command)}")
    unseen.append("what Slurm has")
    tell(f"\nNothing was submitted. Not looked at: {', '.join(unseen)}.")
    warn_of_place(run, nodes)


def warn_of_place(run: Path, nodes: int) -> None:
    """A plan may be made on another machine than that which submits: what this one would refuse is a warning."""
    try:
        check_place(run, nodes)
    except UserError as error:
        tell(f"warning: {error.message}")


def on_node(number: int, layout: Layout) -> str:
    """Returns what runs on node `number`, in words."""
    own = [place for place in layout.ranks if place.node == number]
    parts = []
    if own:
        gpus = [place.gpu for place in own if place.gpu is not None]
        parts.append(f"{_span('rank', [place.rank for place in own])}{_on_gpus(gpus)}")
    parts += [
        f"server{place.index}{_on_gpus(place.gpus)}" for place in layout.servers if place.node == number
    ]
    return "; ".join(parts)


def _on_gpus(gpus: Sequence[int]) -> str:
    return f" on {_span('GPU', gpus)}" if gpus else ""


def _span(what: str, numbers: Sequence[int]) -> str:
    return f"{what} {numbers[0]}" if len(numbers) == 1 else f"{what}s {numbers[0]}-{numbers[-1]}"
