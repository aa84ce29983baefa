"""The launcher: `python -m sdpo_megatron.train` without rank variables.

    check everything > take the run directory > start server and ranks > supervise them > exit code

Exit codes: 0 finished; 2 the user's to mend; 1 the run cannot go on; 128 + signal stopped by that signal."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdpo_megatron.config import Config
from sdpo_megatron.launch.server import CONTEXT_MARGIN, ServedModel, ServerProcess
from sdpo_megatron.launch.supervisor import Supervisor
from sdpo_megatron.preflight.checked import Checked, claim_run_directory, preflight
from sdpo_megatron.preflight.memory import ServerMemory, bytes_free, plan_server_memory
from sdpo_megatron.preflight.server import are_on_loopback
from sdpo_megatron.run_dir.checkpoint_files import newest_checkpoint
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.export_record import exported_steps
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.terminal import reported, tell

HANG_TIMEOUT_S = 1800.0


def launch(
    argv: Sequence[str],
    rank_command: Sequence[str] = (sys.executable, "-m", "sdpo_megatron.train"),
) -> int:
    """Runs what the command line `argv` asks for and returns its exit code. `rank_command` gets `argv` as well."""

    def check_and_start() -> int:
        checked = preflight(argv, world_size=None, announce=tell)
        if checked.only_check:
            memory_of_server(checked)
            tell(f"{checked.directory.path} can be started: everything is in order.")
            return 0
        finished = finished_steps(checked.directory)
        if finished >= checked.config.run.steps and not lacks_export(checked):
            show_finished(checked.directory, finished)
            return 0
        return start(checked, [*rank_command, *argv])

    return reported(check_and_start)


def start(checked: Checked, command: Sequence[str]) -> int:
    config = checked.config
    memory = memory_of_server(checked)
    directory = claim_run_directory(checked)
    try:
        count = config.parallel.ranks
        server = None if memory is None else server_process(checked, memory, directory.logs / "server0.log")
        parts = f"{count} rank{'s' if count > 1 else ''}{' and an SGLang server' if server else ''}"
        tell(f"Starting {parts}. Run directory: {directory.path}")
        return Supervisor(
            directory=directory,
            command=command,
            count=count,
            device=checked.device,
            server=server,
            on_loopback=are_on_loopback(config.server),
            max_restarts=config.server.max_restarts,
            stop_grace_s=config.run.stop_grace_s,
            hang_timeout_s=HANG_TIMEOUT_S if config.run.hang_timeout_s is None else config.run.hang_timeout_s,
        ).run()
    finally:
        directory.close()


def memory_of_server(
    checked: Checked, *, trains: bool = True, beside_trainer: bool = True
) -> ServerMemory | None:
    """Returns the memory of the server that is to be started, None for none; unless it `trains`, nothing but
    evaluation asks it. Raises ConfigError where that, and what a trainer `beside_trainer` takes, does not fit."""
    config = checked.config
    if config.server.urls:
        return None
    return plan_server_memory(
        config,
        checked.shape,
        checked.teacher_shape,
        device=checked.device,
        bytes_free=bytes_free(checked.device, config.server),
        responses=most_responses(config, trains=trains),
        tokens_each=config.model.max_context_length + CONTEXT_MARGIN,
        trains=trains and beside_trainer,
    )


def server_process(
    checked: Checked,
    memory: ServerMemory,
    log: Path,
    *,
    weights: Path | None = None,
    trains: bool = True,
    port: int | None = None,
    api_key: str | None = None,
) -> ServerProcess:
    """Returns a server that is not started yet, of the Hugging Face directory `weights`, by default the model's."""
    config = checked.config
    model = ServedModel(
        path=weights or checked.model_directory,
        dtype=config.model.dtype,
        device=checked.device,
        context_length=config.model.max_context_length,
        max_responses=most_responses(config, trains=trains),
        memory=memory,
        seed=config.run.seed,
    )
    return ServerProcess(config.server, model, log, port, api_key)


def most_responses(config: Config, *, trains: bool = True) -> int:
    """Returns how many responses are asked for at once, at most: by evaluation, and by training where it `trains`."""
    training = config.rollout.problems_per_step * config.rollout.group_size if trains else 1
    suites = [config.eval, *(config.eval.of_suite(suite) for suite in config.eval.suites.values())]
    evaluation = sum(suite.problems * suite.samples for suite in suites)
    return min(config.rollout.max_concurrent_requests, max(training, evaluation))


def finished_steps(directory: RunDirectory) -> int:
    """Returns how many steps have both their row and a checkpoint behind them."""
    newest = newest_checkpoint(directory.checkpoints)
    rows = read_rows(directory.metrics) if newest is not None and directory.metrics.is_file() else []
    return min(int(newest.name), int(rows[-1]["step"])) if newest is not None and rows else 0


def lacks_export(checked: Checked) -> bool:
    """Returns whether the settings ask for an export that is not there, or is of another number of steps."""
    steps = checked.config.run.steps
    return checked.config.checkpoint.export_hf and exported_steps(checked.directory.hf_export) != steps


def show_finished(directory: RunDirectory, steps: int) -> None:
    from sdpo_megatron.run_dir.display import print_summary

    tell(f"{directory.path.name} is complete: {steps} steps.")
    print_summary(directory.metrics)
    tell(
        f"A new run: add run.name=ANOTHER_NAME to the command, or remove {directory.path}. "
        f"To train on: run.steps=MORE_THAN_{steps}."
    )
