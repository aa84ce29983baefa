"""The launcher: `python -m sdpo_megatron.train` without rank variables.

    check everything > take the run directory > start server and ranks > supervise them > exit code

Exit codes: 0 finished; 2 the user's to mend; 1 the run cannot go on; 128 + signal stopped by that signal."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sdpo_megatron.config import Config
from sdpo_megatron.errors import EXIT_FAILED, EXIT_USER_ERROR, RunFailed, UserError
from sdpo_megatron.launch.server import CONTEXT_MARGIN, ServedModel, ServerProcess
from sdpo_megatron.launch.supervisor import Ranks, Server, Supervisor
from sdpo_megatron.preflight.checked import Checked, claim_run_directory, preflight
from sdpo_megatron.preflight.memory import ServerMemory, bytes_free, plan_server_memory, rank_count
from sdpo_megatron.run_dir.checkpoint_files import newest_checkpoint
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.export_record import exported_steps
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.terminal import tell

ServerFactory = Callable[[Checked, ServerMemory, Path], Server]
"""(what was checked, the memory it may take, log file) -> a server that is not started yet."""


def launch(
    argv: Sequence[str],
    rank_command: Sequence[str] = (sys.executable, "-m", "sdpo_megatron.train"),
    make_server: ServerFactory | None = None,
) -> int:
    """Runs what the command line `argv` asks for and returns its exit code. `rank_command` gets `argv` as well."""
    try:
        checked = preflight(argv, world_size=None, announce=tell)
        config = checked.config
        if is_finished(checked.directory, config.run.steps) and not lacks_export(checked):
            show_finished(checked.directory)
            return 0
        return start(checked, [*rank_command, *argv], make_server or server_process)
    except UserError as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR
    except RunFailed as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_FAILED


def start(checked: Checked, command: Sequence[str], make_server: ServerFactory) -> int:
    config = checked.config
    memory = None if config.server.urls else server_memory(checked)
    directory = claim_run_directory(checked)
    try:
        count = rank_count(config.parallel)
        own_server = memory is not None
        server = make_server(checked, memory, directory.logs / "server0.log") if memory is not None else None
        ranks = Ranks(command=command, count=count, device=checked.device, environment=os.environ)
        parts = f"{count} rank{'s' if count > 1 else ''}{' and an SGLang server' if own_server else ''}"
        tell(f"Starting {parts}. Run directory: {directory.path}")
        return Supervisor(
            directory,
            ranks,
            server,
            max_restarts=config.server.max_restarts,
            stop_grace_s=config.run.stop_grace_s,
        ).run()
    finally:
        directory.close()


def server_memory(checked: Checked) -> ServerMemory:
    """Raises ConfigError where what would be started does not fit."""
    config = checked.config
    return plan_server_memory(
        config,
        checked.shape,
        checked.teacher_shape,
        device=checked.device,
        bytes_free=bytes_free(checked.device, config.server),
        responses=most_responses(config),
        tokens_each=config.model.max_context_length + CONTEXT_MARGIN,
    )


def server_process(checked: Checked, memory: ServerMemory, log: Path) -> Server:
    config = checked.config
    model = ServedModel(
        path=checked.model_directory,
        dtype=config.model.dtype,
        device=checked.device,
        context_length=config.model.max_context_length,
        max_responses=most_responses(config),
        memory=memory,
        seed=config.run.seed,
    )
    return ServerProcess(config.server, model, log)


def most_responses(config: Config) -> int:
    """Returns how many responses training or evaluation asks for at once, at most."""
    training = config.rollout.problems_per_step * config.rollout.group_size
    evaluation = config.eval.problems * config.eval.samples
    return min(config.rollout.max_concurrent_requests, max(training, evaluation))


def is_finished(directory: RunDirectory, steps: int) -> bool:
    """Returns whether the row of the last evaluation and the last checkpoint are there."""
    newest = newest_checkpoint(directory.checkpoints)
    if newest is None or int(newest.name) < steps or not directory.metrics.is_file():
        return False
    rows = read_rows(directory.metrics)
    return bool(rows) and rows[-1]["step"] >= steps


def lacks_export(checked: Checked) -> bool:
    """Returns whether the settings ask for an export that is not there, or is of another number of steps."""
    steps = checked.config.run.steps
    return checked.config.checkpoint.export_hf and exported_steps(checked.directory.hf_export) != steps


def show_finished(directory: RunDirectory) -> None:
    from sdpo_megatron.run_dir.display import print_summary

    newest = newest_checkpoint(directory.checkpoints)
    # a complete run has one
    assert newest is not None
    steps = int(newest.name)
    tell(f"{directory.path.name} is complete: {steps} steps.")
    print_summary(directory.metrics)
    tell(
        f"A new run: add run.name=ANOTHER_NAME to the command, or remove {directory.path}. "
        f"To train on: run.steps=MORE_THAN_{steps}."
    )
