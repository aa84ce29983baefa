"""Evaluation without training, by the same suites, sampling and graders, and with the same ruler:

    python -m sdpo_megatron.evaluate yaml/demo_cpu.yaml key.sub=value ... [--checkpoint RUN] [--out DIR]

evaluates the Hugging Face directory `model.path`, a run's checkpoint, or what the servers of `server.urls` serve.
"""

import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

from sdpo_megatron.chat import Chat, build_chat
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.envs.grading.thread import BackgroundThread
from sdpo_megatron.errors import UserError
from sdpo_megatron.evaluation.alone import exact_metrics, sampled_groups
from sdpo_megatron.evaluation.build import build_suites, common_conditions
from sdpo_megatron.evaluation.suite import Suite
from sdpo_megatron.evaluation.summary import summary_lines
from sdpo_megatron.launch.launcher import memory_of_server, server_process
from sdpo_megatron.launch.processes import Guard
from sdpo_megatron.models.megatron_weights import convert_in_process
from sdpo_megatron.models.weight_files import weights_sha256
from sdpo_megatron.preflight.checked import Checked
from sdpo_megatron.preflight.evaluation import preflight_evaluation
from sdpo_megatron.preflight.server import read_api_key
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.weight_mark import UnchangedWeights
from sdpo_megatron.run_dir.directory import RunDirectory, open_run
from sdpo_megatron.run_dir.evaluations_file import Evaluation, EvaluationsFile, read_evaluations
from sdpo_megatron.run_dir.records_file import StepRecord, write_record
from sdpo_megatron.serving.recovery import check_served_model
from sdpo_megatron.terminal import interruptible, tell


def main(argv: Sequence[str]) -> int:
    """Evaluates and returns the exit code: 0 done; 2 the user's to mend; 1 it could not be done."""
    return interruptible(lambda: evaluate(argv))


def evaluate(argv: Sequence[str]) -> int:
    """Evaluates what the command line `argv` asks for, and shows and stores what it came to. Returns the exit code."""
    checked, checkpoint, name = preflight_evaluation(argv, tell)
    config = checked.config
    chat = build_chat(checked.model_directory, config.rollout, checked.shape.vocab)
    grader = GradingPool(config.task, checked.env, config.grading)
    suites = build_suites(
        *(config.task, checked.env, grader, checked.suite_envs, chat),
        settings=config.eval,
        rollout=config.rollout,
        model=config.model,
        grading=config.grading,
    )
    if not suites:
        raise UserError(
            "there is nothing to evaluate: the task has no held-out problems; raise eval.problems, or add eval.suites."
        )
    directory = open_run(checked.directory.path, config.model_dump(), checked.origins)
    with ExitStack() as at_the_end:
        at_the_end.callback(directory.close)
        served = running_servers(checked) if config.server.urls else None
        for suite in suites:
            suite.grader.start()
        served = served or start_server(checked, checkpoint, name, directory, at_the_end)
        measure(checked, suites, chat, *served, directory)
    return 0


def measure(
    checked: Checked,
    suites: list[Suite],
    chat: Chat,
    clients: list[Client],
    subject: dict[str, str],
    weights: Future[str] | None,
    directory: RunDirectory,
) -> None:
    """Samples, grades, stores and shows; `subject` says what is evaluated, `weights` is its SHA-256."""
    config, file = checked.config, directory.evaluations
    number = len({one.subject["number"] for one in read_evaluations(file)}) if file.is_file() else 0
    sampler = Sampler(
        clients,
        stop_token_ids=chat.stop_token_ids,
        max_context_length=config.model.max_context_length,
        max_concurrent=config.rollout.max_concurrent_requests,
        idle_timeout_s=config.rollout.idle_timeout_s,
        separate=chat.separate,
        train_truncated=True,
        mark=UnchangedWeights(),
    )
    threshold = config.reprompt.success_reward_threshold
    # the ruler's hash is of the weights themselves, or of those that their training began with
    conditions = common_conditions(
        clients, checked.model_directory, f"{config.model.dtype} on {checked.device}", threshold
    )()
    groups_by_suite = sampled_groups(suites, sampler, tell)
    subject |= {"number": str(number)} | ({} if weights is None else {"weights": weights.result()})
    evaluations: list[Evaluation] = []
    for suite, groups_P in zip(suites, groups_by_suite, strict=True):
        exact = exact_metrics(suite, clients)
        evaluation = suite.evaluation(groups_P, conditions, step=None, subject=subject, more=exact)
        write_record(directory.rollouts(suite.split, number), StepRecord(groups_P=groups_P))
        evaluations.append(evaluation)
    stored = EvaluationsFile(file)
    for evaluation in evaluations:
        stored.append(evaluation)
        for line in summary_lines(evaluation):
            tell(line)
    tell(f"Numbers and their rulers: {file}; responses: {directory.path / 'rollouts'}")


def running_servers(checked: Checked) -> tuple[list[Client], dict[str, str], None]:
    """Returns clients of the servers, and what they serve, of files that are not
    known. Raises UserError where one does not answer, or serves
    another kind of model."""
    config = checked.config
    key = read_api_key(config.server)
    clients = [Client(url, key, config.weight_sync.timeout_s) for url in config.server.urls]
    served: dict[str, None] = {}
    for client in clients:
        if not client.healthy():
            raise UserError(f"no server answers at {client.url}; start it, or correct server.urls.")
        info = client.model_info()
        check_served_model(Path(info["model_path"]), checked.shape, client.url)
        served[f"{info['model_path']}, weight version {info.get('weight_version', 'unknown')}"] = None
    if len(served) > 1:
        raise UserError(f"the servers of server.urls serve different weights: {'; '.join(served)}.")
    subject = {"name": ", ".join(config.server.urls), "served": next(iter(served))}
    return clients, subject, None


def start_server(
    checked: Checked, checkpoint: Path | None, name: str, directory: RunDirectory, at_the_end: ExitStack
) -> tuple[list[Client], dict[str, str], Future[str]]:
    """Starts a server of the weights and waits for it; `at_the_end` stops it. Returns the same of it,
    and the SHA-256 of the weights, which large ones are waited for."""
    config, weights = checked.config, checked.model_directory
    memory = memory_of_server(checked, trains=False)
    assert memory is not None
    if checkpoint is not None:
        weights = directory.path / ".weights"
        at_the_end.callback(shutil.rmtree, weights, ignore_errors=True)
        # an evaluation that was killed may have left it
        shutil.rmtree(weights, ignore_errors=True)
        model = ["--model", str(checked.model_directory)]
        convert_in_process(
            ["megatron-to-hf", str(checkpoint), str(weights), *model], directory.logs / "conversion.log"
        )
    guard = Guard()
    at_the_end.callback(guard.close)
    log = directory.logs / "server0.log"
    server = server_process(checked, memory, log, weights=weights, trains=False)
    at_the_end.callback(server.stop)
    tell(f"Starting an SGLang server of {name}. Results: {directory.path}")
    server.start(guard)
    sha256: Future[str] = Future()
    BackgroundThread("hash of the weights").run(lambda: weights_sha256(weights), sha256)
    server.wait_healthy()
    client = Client(server.url, server.api_key, config.weight_sync.timeout_s)
    return [client], {"name": name}, sha256


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
