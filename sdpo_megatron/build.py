"""The only wiring: a checked configuration -> a Run whose parts were each handed what they need."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch

from sdpo_megatron.algorithm.examination import TeacherExaminer
from sdpo_megatron.algorithm.guards import Guards
from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.reprompt import reprompt_warnings
from sdpo_megatron.chat import Chat, load_chat
from sdpo_megatron.config import Config, RolloutSettings
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.envs.remarks import Remarks
from sdpo_megatron.errors import UserError
from sdpo_megatron.evaluate import Evaluator
from sdpo_megatron.preflight.checked import Checked
from sdpo_megatron.problems import ProblemOrder, canonical, check_answers_fit, check_prompts_fit
from sdpo_megatron.records import Problem
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.run import Run
from sdpo_megatron.run_dir.checkpoint_files import passed_over
from sdpo_megatron.run_dir.directory import RunDirectory, identity
from sdpo_megatron.run_dir.log import NullLog, RunLog, line_writer
from sdpo_megatron.run_dir.metrics_file import rows_before
from sdpo_megatron.run_dir.phases import PhaseFile
from sdpo_megatron.run_dir.server_files import ServerFiles
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.canary import Canary, rounding
from sdpo_megatron.serving.push import WeightSync
from sdpo_megatron.serving.recovery import Servers, Serving
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.terminal import tell
from sdpo_megatron.trainer.build import HfModel, Learning, Trainer, build_trainer, reference_of
from sdpo_megatron.trainer.checkpoint import Checkpoints
from sdpo_megatron.trainer.export import export_hf
from sdpo_megatron.trainer.parallel import ParallelState, initialize, own_device, seed_everything

CANARY_TOKENS = 256
"""The most tokens that the canary has: enough to pass through every weight many times, cheap beside a step."""


def build_chat(directory: Path, rollout: RolloutSettings, vocab: int) -> Chat:
    """Loads the tokenizer and its template. Raises UserError where it has ids that a model of `vocab` tokens does
    not."""
    chat = load_chat(directory, rollout.system_prompt, rollout.chat_template_kwargs)
    if chat.largest_id >= vocab:
        raise UserError(
            f"The tokenizer in {directory} has token ids up to {chat.largest_id}, but config.json says vocab_size "
            f"{vocab}: take the tokenizer that belongs to the model."
        )
    return chat


def build_run(checked: Checked, directory: RunDirectory, stop: StopRequest) -> Run:
    """Wires the run, on every rank: loads the model or the newest checkpoint, and waits for the servers."""
    config, env, model_directory = checked.config, checked.env, checked.model_directory
    seed_everything(config.run.seed)
    parallel = initialize(config.parallel, device=own_device(checked.device), seed=config.run.seed)
    learning = learning_of(checked)
    trainer = trainer_of(checked, learning, parallel)
    assert trainer.learner is not None
    checkpoints = Checkpoints(
        directory.checkpoints,
        keep=config.checkpoint.keep,
        shape=checked.shape,
        identity=identity(config.model_dump()),
        reference=reference_of(learning, parallel, tell),
        parallel=parallel,
    )
    first_step, skipped = load_newest(checkpoints, trainer)
    log = build_log(config, directory, parallel, first_step)
    for path in skipped:
        log.message(f"{path} is incomplete, left by a crash or damaged; going on from step {first_step}.")
    chat = build_chat(model_directory, config.rollout, checked.shape.vocab)
    problems = fitting_problems(config, env, chat, parallel)
    grader = GradingPool(config.task, env, config.grading)
    if parallel.is_main:
        grader.start()
    serving = build_serving(config, trainer, chat, problems[0], directory, stop, log)
    earlier = rows_before(directory.metrics, first_step)
    examiner, guards, remarks = build_watchers(config, trainer, chat, earlier, serving.canary.noise.mean)
    return Run(
        first_step=first_step,
        completed=first_step,
        saved=first_step,
        steps=config.run.steps,
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        stop_grace_s=config.run.stop_grace_s,
        log=log,
        parallel=parallel,
        problems=problems,
        order=ProblemOrder(len(problems), config.run.seed, config.rollout.problems_per_step),
        env=env,
        grader=grader,
        chat=chat,
        serving=serving,
        evaluator=build_evaluator(config, env, grader, chat, serving, trainer),
        teacher=trainer.teacher,
        learner=trainer.learner,
        examiner=examiner,
        guards=guards,
        remarks=remarks,
        stop=stop,
        rollout=config.rollout,
        recorded_groups=config.log.recorded_groups(config.rollout.problems_per_step),
        reprompt=config.reprompt,
        seed=config.run.seed,
        max_context_length=config.model.max_context_length,
        save_state=lambda step: checkpoints.save(step, trainer.state),
        export=export(config, trainer, model_directory, directory),
    )


def build_evaluator(
    config: Config,
    env: Environment,
    grader: GradingPool,
    chat: Chat,
    serving: Serving,
    trainer: Trainer,
) -> Evaluator:
    return Evaluator(
        *(env.test_problems(), grader, chat, serving, trainer.scorer, trainer.parallel),
        settings=config.eval,
        max_tokens=config.rollout.max_tokens,
        success_threshold=config.reprompt.success_reward_threshold,
    )


def build_watchers(
    config: Config, trainer: Trainer, chat: Chat, earlier: list[dict[str, float]], noise: float
) -> tuple[TeacherExaminer, Guards, Remarks]:
    """Returns what looks at the steps and warns; `earlier` are the rows of those that a resumed run has behind it,
    `noise` what rounding makes of log-probabilities in the mean."""
    examiner = TeacherExaminer(
        every=config.eval.every,
        refuse_worse=config.teacher.refuse_worse,
        raises_unsampled=build_terms(config.loss)[0].loss.raises_unsampled,
        decode=chat.decode_all,
        earlier=earlier,
    )
    feedback_is_shown = trainer.teacher is not None and config.reprompt.feedback != "never"
    threshold, max_failed = config.reprompt.success_reward_threshold, config.grading.max_failed
    remarks = Remarks(threshold, max_failed, feedback_is_shown=feedback_is_shown)
    # log-probabilities of softmax(logits / temperature) are as much further apart
    largest_gap = config.weight_sync.canary_factor * noise / config.rollout.temperature
    return examiner, Guards(earlier, largest_gap=largest_gap), remarks


def learning_of(checked: Checked) -> Learning:
    """Returns what the trainer has to know of the settings besides its model."""
    config, teacher_model = checked.config, None
    if checked.teacher_shape is not None:
        key = "model.path" if config.teacher.path is None else "teacher.path"
        teacher_model = HfModel(checked.teacher_directory, checked.teacher_shape, key)
    return Learning(
        loss=config.loss,
        optimizer=config.optimizer,
        teacher=config.teacher,
        teacher_model=teacher_model,
        group_size=config.rollout.group_size,
        steps=config.run.steps,
    )


def trainer_of(checked: Checked, learning: Learning | None, parallel: ParallelState) -> Trainer:
    """Loads the model's weights; without `learning` neither optimizer nor teacher is made: evaluation needs none."""
    config = checked.config
    return build_trainer(
        HfModel(checked.model_directory, checked.shape),
        parallel,
        dtype=getattr(torch, config.model.dtype),
        layout=config.parallel,
        temperature=config.rollout.temperature,
        learning=learning,
    )


def load_newest(checkpoints: Checkpoints, trainer: Trainer) -> tuple[int, list[Path]]:
    """Loads the newest complete checkpoint. Returns how many training steps the run has behind it, 0 where there is no
    checkpoint, and the newer checkpoints, which are incomplete."""
    newest = checkpoints.newest()
    skipped = passed_over(checkpoints.directory, newest)
    step = 0 if newest is None else checkpoints.load(newest, trainer.state)
    trainer.refresh_teacher()
    return step, skipped


def fitting_problems(config: Config, env: Environment, chat: Chat, parallel: ParallelState) -> list[Problem]:
    """Returns the problems to train on. Raises UserError where one of them or of the held-out ones is too long, or one
    of the canonical answers that are measured."""
    longest = config.model.max_context_length
    problems, held_out = list(env.train_problems()), list(env.test_problems())

    def check() -> None:
        if not parallel.is_main:
            return
        check_prompts_fit([*problems, *held_out], chat.prompt_ids, longest)
        measured = canonical(held_out)[: config.eval.exact_problems]
        check_answers_fit(measured, chat.prompt_ids, chat.answer_ids, longest)

    parallel.everywhere(check)
    return problems


def build_log(config: Config, directory: RunDirectory, parallel: ParallelState, first_step: int) -> NullLog:
    phases = PhaseFile(directory.phase(parallel.rank), parallel.rank, config.log.phases_every_s)

    def build() -> NullLog:
        if not parallel.is_main:
            return NullLog(phases, first_step)
        run = {"name": config.run.name, "steps": config.run.steps, "first_step": first_step}
        log = RunLog(directory, config.log, phases, **run, memory_root=os.getppid())
        for warning in reprompt_warnings(config.reprompt):
            log.message(f"warning: {warning}")
        return log

    return parallel.everywhere(build)


def build_serving(
    config: Config,
    trainer: Trainer,
    chat: Chat,
    example: Problem,
    directory: RunDirectory,
    stop: StopRequest,
    log: NullLog,
) -> Serving:
    """Connects to the servers, on which rank 0 waits until they are healthy. `example` makes the canary's text."""
    parallel, calls = trainer.parallel, Calls(stop)
    mark = WeightMark(parallel.share(secrets.token_hex(4)))
    clients, servers = connect_servers(config, trainer, directory, stop, log)
    sampler = None
    if parallel.is_main:
        sampler = Sampler(
            clients,
            stop_token_ids=chat.stop_token_ids,
            max_context_length=config.model.max_context_length,
            max_concurrent=config.rollout.max_concurrent_requests,
            idle_timeout_s=config.rollout.idle_timeout_s,
            separate=chat.separate,
            train_truncated=config.rollout.train_truncated,
            mark=mark,
        )
    weights = WeightSync(
        trainer.policy,
        trainer.shape,
        parallel,
        clients,
        dtype=getattr(torch, config.model.dtype),
        server_tp=config.server.tp,
        bucket_bytes=config.weight_sync.bucket_mb << 20,
        timeout_s=config.weight_sync.timeout_s,
        mark=mark,
        calls=calls,
        log=line_writer(directory.logs / f"push_stage{parallel.pp_rank}.log"),
    )
    canary = build_canary(
        config, trainer, chat, example, directory.rounding, calls, clients, message=log.message
    )
    return Serving(
        sampler,
        servers,
        weights,
        canary,
        parallel,
        stop,
        max_restarts=config.server.max_restarts,
        message=log.message,
    )


def build_canary(
    config: Config,
    trainer: Trainer,
    chat: Chat,
    example: Problem,
    path: Path,
    calls: Calls,
    clients: list[Client],
    message: Callable[[str], None],
) -> Canary:
    """`example` makes the canary's text; `path` keeps the noise."""
    parallel = trainer.parallel

    def text() -> list[int]:
        if not parallel.is_main:
            return []
        return (chat.prompt_ids(example.messages, example.tools) + chat.answer_ids(example.answer))[
            -CANARY_TOKENS:
        ]

    ids = parallel.share(parallel.everywhere(text))
    noise = rounding(ids, trainer.policy, trainer.scorer, trainer.shape, parallel, path)
    return Canary(ids, trainer.scorer, calls, clients, noise, config.weight_sync.canary_factor, message)


def connect_servers(
    config: Config, trainer: Trainer, directory: RunDirectory, stop: StopRequest, log: NullLog
) -> tuple[list[Client], Servers | None]:
    """Returns rank 0's clients and servers, nothing elsewhere. Raises Stopped where the run is asked to stop before
    they are healthy."""
    parallel, urls, files = trainer.parallel, config.server.urls, None
    clients: list[Client] = []
    servers = None
    if parallel.is_main:
        if not urls:
            files = ServerFiles(directory.servers)
            # the launcher's server, whose address its file will give
            urls = [""]
        clients = [Client(url, config.server.api_key, config.weight_sync.timeout_s) for url in urls]
        servers = Servers(clients, files, trainer.shape, config.server.start_timeout_s, stop)
    with log.timed("server_start"):
        parallel.everywhere(lambda: servers.wait_until_healthy() if servers else None)
    return clients, servers


def export(
    config: Config, trainer: Trainer, model_directory: Path, directory: RunDirectory
) -> Callable[[], None]:
    def write() -> None:
        if config.checkpoint.export_hf:
            export_hf(
                directory.hf_export,
                trainer.policy,
                trainer.shape,
                model_directory,
                trainer.parallel,
                steps=config.run.steps,
            )

    return write
