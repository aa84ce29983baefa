"""The only wiring: a checked configuration -> a Run whose parts were each handed what they need."""

import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from sdpo_megatron.algorithm.examination import TeacherExaminer
from sdpo_megatron.algorithm.guards import Guards
from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.reprompt import reprompt_warnings
from sdpo_megatron.chat import Chat, build_chat
from sdpo_megatron.config import Config
from sdpo_megatron.envs.grading.pool import GradingPool
from sdpo_megatron.envs.remarks import Remarks
from sdpo_megatron.evaluation.build import build_suites, common_conditions
from sdpo_megatron.evaluation.in_training import Evaluator
from sdpo_megatron.evaluation.suite import Suite
from sdpo_megatron.preflight.checked import Checked
from sdpo_megatron.preflight.same_problems import problem_digests
from sdpo_megatron.problems import ProblemOrder
from sdpo_megatron.records import Problem
from sdpo_megatron.report import write_report
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.rollout.weight_mark import WeightMark
from sdpo_megatron.run import Run
from sdpo_megatron.run_dir.checkpoint_files import passed_over
from sdpo_megatron.run_dir.directory import RunDirectory, rendezvous_of
from sdpo_megatron.run_dir.identity import identity
from sdpo_megatron.run_dir.inflight import InflightResponses
from sdpo_megatron.run_dir.log import Log, RunLog, line_writer
from sdpo_megatron.run_dir.metrics_file import rows_before
from sdpo_megatron.run_dir.phases import START, PhaseFile, write_stacks_when_asked
from sdpo_megatron.serving.build import build_canary, connect_servers
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.serving.memory_release import MemoryRelease
from sdpo_megatron.serving.push import WeightSync
from sdpo_megatron.serving.recovery import Serving
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.terminal import tell
from sdpo_megatron.trainer.build import HfModel, Learning, Trainer, build_trainer, reference_of
from sdpo_megatron.trainer.checkpoint import Checkpoints
from sdpo_megatron.trainer.export import export_hf
from sdpo_megatron.trainer.parallel import ParallelState, initialize, own_device, seed_everything

INCOMPLETE = (
    "is incomplete, left by a crash or damaged; going on from step {}, and the next checkpoint removes it."
)


def build_run(checked: Checked, directory: RunDirectory, stop: StopRequest, rank: int) -> Run:
    """Wires the run, on every rank: loads the model or the newest checkpoint, and waits for the servers."""
    config, env, model_directory = checked.config, checked.env, checked.model_directory
    phases = PhaseFile(directory.phase(rank), rank, config.log.phases_every_s)
    parallel = meet_others(checked, directory, phases, rank)
    learning = learning_of(checked)
    trainer = trainer_of(checked, learning, parallel)
    assert trainer.learner is not None
    checkpoints = Checkpoints(
        directory.checkpoints,
        keep=config.checkpoint.keep,
        shape=checked.shape,
        identity=identity(config.model_dump()) | (problem_digests(env) if parallel.is_main else {}),
        reference=reference_of(learning, parallel, tell),
        parallel=parallel,
    )
    first_step, skipped = load_newest(checkpoints, trainer)
    log = build_log(config, directory, parallel, phases, first_step)
    for path in skipped:
        log.message(f"{path} {INCOMPLETE.format(first_step)}")
    chat = build_chat(model_directory, config.rollout, checked.shape.vocab)
    problems = env.train_problems()
    grader = GradingPool(config.task, env, config.grading)
    suites = suites_of(checked, grader, chat, parallel)
    serving = build_serving(config, trainer, chat, problems[0], directory, stop, log, phases.progress)
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
        inflight=InflightResponses(directory.inflight, first_step, log.message) if parallel.is_main else None,
        chat=chat,
        serving=serving,
        evaluator=build_evaluator(checked, suites, serving, trainer),
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


def meet_others(checked: Checked, directory: RunDirectory, phases: PhaseFile, rank: int) -> ParallelState:
    settings, seed = checked.config.parallel, checked.config.run.seed
    seed_everything(seed)
    device, place = own_device(checked.device), rendezvous_of(directory)
    parallel = initialize(settings, device=device, seed=seed, rendezvous=place, on_progress=phases.progress)
    # by now rank 0 has made the directory
    write_stacks_when_asked(directory.stacks(rank))
    phases.enter(None, START)
    return parallel


def suites_of(checked: Checked, grader: GradingPool, chat: Chat, parallel: ParallelState) -> list[Suite]:
    """Returns what is evaluated on, and starts all graders."""
    config = checked.config
    suites = build_suites(
        *(config.task, checked.env, grader, checked.suite_envs, chat),
        settings=config.eval,
        rollout=config.rollout,
        model=config.model,
        grading=config.grading,
    )
    if parallel.is_main:
        for pool in (grader, *(suite.grader for suite in suites)):
            pool.start()
    return suites


def build_evaluator(checked: Checked, suites: list[Suite], serving: Serving, trainer: Trainer) -> Evaluator:
    config = checked.config
    conditions = None
    if serving.servers is not None:
        conditions = common_conditions(
            serving.servers.clients,
            checked.model_directory,
            f"{config.model.dtype} on {checked.device}",
            config.reprompt.success_reward_threshold,
        )
    return Evaluator(
        *(suites, serving, trainer.scorer, trainer.parallel),
        name=config.run.name,
        conditions=conditions,
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


def build_log(
    config: Config, directory: RunDirectory, parallel: ParallelState, phases: PhaseFile, first_step: int
) -> Log:
    def build() -> Log:
        if not parallel.is_main:
            return Log(phases, first_step)
        run = {"name": config.run.name, "steps": config.run.steps, "first_step": first_step}
        log = RunLog(
            *(directory, config.log, phases),
            **run,
            memory_root=os.getppid(),
            report=lambda: write_report(directory.path),
        )
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
    log: Log,
    while_waiting: Callable[[], None],
) -> Serving:
    """Connects to the servers, on which rank 0 waits until they are healthy. `example` makes the canary's text;
    `while_waiting` is called again and again while rank 0 waits for servers."""
    parallel, calls = trainer.parallel, Calls(stop)
    mark = WeightMark(parallel.share(secrets.token_hex(4)))
    with log.timed("server_start"):
        clients, servers = connect_servers(
            config.server, config.weight_sync.timeout_s, directory, trainer, stop, while_waiting
        )
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
            while_waiting=while_waiting,
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
        release=MemoryRelease(mark) if config.server.release_memory else None,
    )
    place, factor = directory.rounding, config.weight_sync.canary_factor
    canary = build_canary(factor, trainer, chat, example, place, calls, clients, log.message)
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


def export(
    config: Config, trainer: Trainer, model_directory: Path, directory: RunDirectory
) -> Callable[[], None]:
    if not config.checkpoint.export_hf:
        return lambda: None
    return partial(
        export_hf,
        directory.hf_export,
        trainer.policy,
        trainer.shape,
        model_directory,
        trainer.parallel,
        steps=config.run.steps,
    )
