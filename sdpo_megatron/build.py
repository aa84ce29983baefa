"""The only wiring: a checked configuration -> a Run whose parts were each handed what they need."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdpo_megatron.chat import Chat, load_chat
from sdpo_megatron.config import Config
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.evaluate import Evaluator
from sdpo_megatron.model_shape import ModelShape
from sdpo_megatron.phases import PhaseFile
from sdpo_megatron.preflight import Checked
from sdpo_megatron.problems import ProblemOrder, check_prompts_fit
from sdpo_megatron.records import Problem
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.rollout.sampler import Sampler
from sdpo_megatron.run import Run, loop_state
from sdpo_megatron.run_dir import RunDirectory, identity
from sdpo_megatron.run_log import NullLog, RunLog
from sdpo_megatron.server_files import ServerFiles
from sdpo_megatron.serving import Servers, Serving
from sdpo_megatron.stopping import StopRequest
from sdpo_megatron.trainer.checkpoint import Checkpoints, TrainerState
from sdpo_megatron.trainer.export import export_hf
from sdpo_megatron.trainer.hf_weights import load_hf_weights, stream_hf_weights
from sdpo_megatron.trainer.model import build_model, unwrap
from sdpo_megatron.trainer.optimizer import build_optimizer, wrap_for_data_parallelism
from sdpo_megatron.trainer.parallel import ParallelState, initialize
from sdpo_megatron.trainer.score import Packer, Scorer, TokenLogprobs
from sdpo_megatron.trainer.step import Learner
from sdpo_megatron.weight_sync import Canary, WeightSync

CANARY_TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2}
"""Measured in float32 on a CPU: 2e-6 on the canary, 9e-5 at most on the 21,600 tokens that the demo trained."""
CANARY_TOKENS = 256
"""Most tokens of the canary: enough to pass through every weight many times, cheap beside a step."""


@dataclass(frozen=True)
class Trainer:
    """The weight sets and what works on them."""

    parallel: ParallelState
    shape: ModelShape
    policy: list[nn.Module]
    reference: list[nn.Module] | None
    optimizer: Any
    schedule: Any
    packer: Packer
    sampled: TokenLogprobs
    """The head at the sampling temperature: for learner and teacher."""
    plain: TokenLogprobs
    """The head at temperature 1: for evaluation and canary."""


def build_run(checked: Checked, directory: RunDirectory, stop: StopRequest) -> Run:
    """On every rank. Loads the model or the newest checkpoint, and waits for the servers."""
    config, env, model_directory = checked.config, checked.env, checked.model_directory
    seed_everything(config.run.seed)
    parallel = initialize(config.parallel, device=own_device(checked.device), seed=config.run.seed)
    trainer = build_trainer(config, model_directory, checked.shape, parallel)
    weights = {"policy": trainer.policy} | ({"reference": trainer.reference} if trainer.reference else {})
    state = TrainerState(weights=weights, optimizer=trainer.optimizer, schedule=trainer.schedule)
    checkpoints = Checkpoints(
        directory.checkpoints,
        keep=config.checkpoint.keep,
        shape=checked.shape,
        identity=identity(config.model_dump()),
        parallel=parallel,
    )
    newest = checkpoints.newest()
    loop = checkpoints.load(newest, state) if newest is not None else {}
    first_step = int(loop.get("weights_version", 0))
    log = build_log(config, directory, parallel, first_step)
    chat = load_chat(model_directory, config.rollout.system_prompt, config.rollout.chat_template_kwargs)
    problems = fitting_problems(env, chat, config.model.max_context_length, parallel)
    serving = build_serving(config, trainer, chat, problems[0], directory, stop, log)
    if serving.sampler is not None and loop.get("sampler"):
        serving.sampler.load_state(loop["sampler"])
    scorer = Scorer(trainer.policy, trainer.plain, trainer.packer, parallel)
    return Run(
        first_step=first_step,
        completed=first_step,
        saved=first_step,
        steps=config.run.steps,
        eval_every=config.eval.every,
        save_every=config.checkpoint.every,
        log=log,
        parallel=parallel,
        problems=problems,
        order=ProblemOrder(len(problems), config.run.seed, config.rollout.problems_per_step),
        env=env,
        chat=chat,
        serving=serving,
        evaluator=Evaluator(
            env.test_problems(),
            env,
            chat,
            serving,
            scorer,
            settings=config.eval,
            max_tokens=config.rollout.max_tokens,
            success_threshold=config.reprompt.success_reward_threshold,
        ),
        reference=build_reference(trainer),
        learner=build_learner(config, trainer),
        stop=stop,
        rollout=config.rollout,
        reprompt=config.reprompt,
        max_context_length=config.model.max_context_length,
        save_state=lambda step: checkpoints.save(step, state, loop_state(serving)),
        export=export(config, trainer, model_directory, directory),
    )


def fitting_problems(
    env: Environment, chat: Chat, max_context_length: int, parallel: ParallelState
) -> list[Problem]:
    """Those to train on. UserError on rank 0 where one of them or of the held-out ones is too long."""
    problems = list(env.train_problems())
    if parallel.is_main:
        check_prompts_fit([*problems, *env.test_problems()], chat.prompt_ids, max_context_length)
    return problems


def own_device(kind: str) -> torch.device:
    """Of a machine's GPUs, a rank has the one with its local number."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_trainer(
    config: Config, model_directory: Path, shape: ModelShape, parallel: ParallelState
) -> Trainer:
    dtype = getattr(torch, config.model.dtype)

    def loaded() -> list[nn.Module]:
        chunks = build_model(shape, dtype, parallel)
        for chunk in chunks:
            load_hf_weights(unwrap(chunk), model_directory, shape, parallel)
        return chunks

    policy = wrap_for_data_parallelism(loaded())
    reference = None
    if config.loss.name == "sdpo":
        reference = loaded()
        for chunk in reference:
            chunk.requires_grad_(False).eval()
    optimizer, schedule = build_optimizer(
        policy, config.optimizer, config.run.steps * config.optimizer.mini_batches, parallel
    )
    heads = [
        TokenLogprobs(shape, parallel, temperature=temperature, chunk_tokens=config.loss.chunk_tokens)
        for temperature in (config.rollout.temperature, 1.0)
    ]
    packer = Packer(
        parallel,
        micro_batch_tokens=config.parallel.micro_batch_tokens,
        share_prefixes=config.parallel.share_prefixes,
    )
    return Trainer(parallel, shape, policy, reference, optimizer, schedule, packer, *heads)


def build_reference(trainer: Trainer) -> Scorer | None:
    if trainer.reference is None:
        return None
    return Scorer(trainer.reference, trainer.sampled, trainer.packer, trainer.parallel)


def build_learner(config: Config, trainer: Trainer) -> Learner:
    return Learner(
        trainer.policy,
        trainer.optimizer,
        trainer.schedule,
        trainer.sampled,
        trainer.packer,
        trainer.parallel,
        loss=config.loss,
        group_size=config.rollout.group_size,
        mini_batches=config.optimizer.mini_batches,
    )


def build_log(config: Config, directory: RunDirectory, parallel: ParallelState, first_step: int) -> NullLog:
    phases = PhaseFile(directory.phase(parallel.rank), parallel.rank)
    if not parallel.is_main:
        return NullLog(phases, first_step)
    return RunLog(
        directory,
        config.log,
        phases,
        name=config.run.name,
        steps=config.run.steps,
        first_step=first_step,
        memory_root=os.getppid(),
    )


def build_serving(
    config: Config,
    trainer: Trainer,
    chat: Chat,
    example: Problem,
    directory: RunDirectory,
    stop: StopRequest,
    log: NullLog,
) -> Serving:
    """Rank 0 waits here until the servers are healthy. `example` makes the canary's text."""
    parallel = trainer.parallel
    clients: list[Client] = []
    sampler = servers = None
    if parallel.is_main:
        clients, servers = connect_servers(config, directory, stop)
        with log.timed("server_start"):
            servers.wait_until_healthy()
        sampler = Sampler(
            clients,
            stop_token_ids=chat.stop_token_ids,
            max_context_length=config.model.max_context_length,
            max_concurrent=config.rollout.max_concurrent_requests,
            request_timeout_s=config.rollout.request_timeout_s,
            decode=chat.decode,
            train_truncated=config.rollout.train_truncated,
        )
    weights = WeightSync(
        unwrap(trainer.policy[0]),
        trainer.shape,
        parallel,
        clients,
        dtype=getattr(torch, config.model.dtype),
        server_tp=config.server.tp,
        bucket_bytes=config.weight_sync.bucket_mb << 20,
        timeout_s=config.weight_sync.timeout_s,
        log=push_log(directory, parallel),
    )
    canary_ids = (chat.prompt_ids(example.messages) + chat.answer_ids(example.answer))[-CANARY_TOKENS:]
    canary = Canary(
        parallel.share(canary_ids),
        Scorer(trainer.policy, trainer.plain, trainer.packer, parallel),
        clients,
        config.weight_sync.canary_tolerance or CANARY_TOLERANCE[config.model.dtype],
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


def connect_servers(
    config: Config, directory: RunDirectory, stop: StopRequest
) -> tuple[list[Client], Servers]:
    urls, files = config.server.urls, None
    if not urls:
        files = ServerFiles(directory.servers)
        urls = [""]  # the launcher's server; its address comes with its file
    clients = [Client(url, config.server.api_key, config.weight_sync.timeout_s) for url in urls]
    return clients, Servers(clients, files, config.server.start_timeout_s, stop)


def push_log(directory: RunDirectory, parallel: ParallelState) -> Callable[[str], None]:
    """One line per bucket and push; each stage's leader writes its own file."""
    path = directory.logs / f"push_stage{parallel.pp_rank}.log"

    def write(line: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    return write


def export(
    config: Config, trainer: Trainer, model_directory: Path, directory: RunDirectory
) -> Callable[[], None]:
    def write() -> None:
        if config.checkpoint.export_hf:
            tensors = stream_hf_weights(unwrap(trainer.policy[0]), trainer.shape, trainer.parallel)
            export_hf(directory.hf_export, tensors, model_directory, trainer.parallel)

    return write
