"""What can be refused before a model loads: settings that are possible one by one and impossible together.

Each check reads only what it needs and raises ConfigError in one line that says what to write.
`check_settings` runs all that need no data; `check_problem_counts` follows once the environment is built.
"""

import importlib.util
from math import gcd
from pathlib import Path

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import Loss
from sdpo_megatron.algorithm.reprompt import RepromptSettings
from sdpo_megatron.config import (
    PRESET,
    Config,
    EvalSettings,
    LogSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RolloutSettings,
    RunSettings,
    TaskSettings,
    TeacherSettings,
)
from sdpo_megatron.envs.base import Environment
from sdpo_megatron.errors import ConfigError
from sdpo_megatron.files import check_downloaded, read_text
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.models.weight_files import check_weights
from sdpo_megatron.preflight.server import (
    check_feed_forward,
    check_model_path,
    check_released_memory,
    check_server,
    check_server_layout,
    divisors,
)
from sdpo_megatron.strict_yaml.explain import DEFAULT, Origins

TEMPLATE_ARGUMENTS = {
    *("conversation", "messages", "tokenize", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Arguments of `apply_chat_template` that the trainer sets itself."""


TOKENIZER_BYTES = 300_000_000
"""The most that a file of a tokenizer may have, many times what any has."""


def check_settings(
    config: Config, model_directory: Path, *, world_size: int | None, gpus: int, loss_is_chosen: bool
) -> ModelShape:
    """Makes every check that needs no data; returns the shape of the model in `model_directory`.

    `world_size` is the number of ranks that were started, None where the launcher will start them. `gpus` is
    the number that this machine has. `loss_is_chosen` says that loss.name was given, and is not just the default.
    """
    check_parallel(config.parallel)
    if world_size is not None:
        check_world_size(config.parallel, world_size)
    check_batch(config.rollout, config.optimizer, config.parallel)
    loss = build_terms(config.loss)[0].loss
    check_teaching(config.rollout, config.reprompt, loss)
    check_teacher(loss, config.teacher)
    check_mini_batches(loss, config.optimizer, chosen=loss_is_chosen)
    check_optimizer(config.optimizer)
    check_log(config.log, config.rollout)
    shape = check_sampling(config, model_directory, gpus=gpus)
    check_layout(config.parallel, shape)
    check_feed_forward(config.server, shape, on_gpus=gpus > 0 and config.run.device != "cpu")
    check_top_k(loss, shape)
    return shape


def check_sampling(config: Config, model_directory: Path, *, gpus: int) -> ModelShape:
    """Makes those of the checks that whoever only samples needs; returns the model's shape."""
    check_device(config.run, gpus)
    check_template_arguments(config.rollout)
    check_server(config.server)
    check_released_memory(config.server, on_gpus=gpus > 0 and config.run.device != "cpu")
    shape = read_model_shape(model_directory)
    check_weights(model_directory, shape)
    check_tokenizer_file(model_directory)
    check_server_layout(config.server, shape)
    check_model_path(config.server, model_directory)
    check_lengths(config.model, config.rollout, config.eval, shape)
    return shape


def check_parallel(parallel: ParallelSettings) -> None:
    for key in ("cp", "ep", "vpp"):
        if getattr(parallel, key) != 1:
            raise ConfigError(
                f"parallel.{key} is {getattr(parallel, key)}, which is not supported yet; set "
                f"parallel.{key}=1."
            )
    if parallel.sequence_parallel and parallel.tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel is on with parallel.tp=1, where there is nothing to split; "
            "set parallel.sequence_parallel=false or a larger parallel.tp."
        )


def check_world_size(parallel: ParallelSettings, world_size: int) -> None:
    if world_size != parallel.ranks:
        raise ConfigError(
            f"The number of ranks that were started is {world_size}, but parallel.tp * pp * cp * dp = "
            f"{parallel.tp} * {parallel.pp} * {parallel.cp} * {parallel.dp} = {parallel.ranks}; start "
            f"{parallel.ranks} ranks."
        )


def check_device(run: RunSettings, gpus: int) -> None:
    if run.device == "cuda" and gpus == 0:
        raise ConfigError(
            "run.device is cuda, but torch sees no GPU on this machine; set run.device=cpu or auto."
        )


def check_batch(rollout: RolloutSettings, optimizer: OptimizerSettings, parallel: ParallelSettings) -> None:
    """Raises ConfigError where the batch cannot be divided. Groups are divided, not single responses: the members of a
    group share their prompt."""
    problems, parts, dp = rollout.problems_per_step, optimizer.mini_batches, parallel.dp
    if problems % (parts * dp):
        raise ConfigError(
            f"rollout.problems_per_step is {problems}, which does not divide into optimizer.mini_batches={parts} times "
            f"parallel.dp={dp}; set rollout.problems_per_step to a multiple of {parts * dp}."
        )


def check_teaching(rollout: RolloutSettings, reprompt: RepromptSettings, loss: Loss) -> None:
    if rollout.group_size > 1:
        return
    if loss.uses_rewards:
        raise ConfigError(
            f"rollout.group_size is 1 with loss.name={loss.settings.name}, where every advantage is 0 (reward minus "
            "the group's mean); set rollout.group_size to 2 or more."
        )
    if reprompt.own_success == "never":
        raise ConfigError(
            "rollout.group_size is 1, so no response has a sibling to learn from; "
            "set rollout.group_size to 2 or more, or reprompt.own_success=always."
        )


def check_mini_batches(loss: Loss, optimizer: OptimizerSettings, *, chosen: bool) -> None:
    if optimizer.mini_batches > 1 and not loss.bounds_policy_ratio and not chosen:
        raise ConfigError(
            f"optimizer.mini_batches is {optimizer.mini_batches}, and nothing clips the default "
            f"loss.name={loss.settings.name} against the policy that sampled; set loss.name=clipped_divergence, or "
            f"loss.name={loss.settings.name} to keep it."
        )


def check_teacher(loss: Loss, teacher: TeacherSettings) -> None:
    if teacher.revision is not None and teacher.path is None:
        raise ConfigError(
            f"teacher.revision is '{teacher.revision}', but there is no teacher.path that it could be of; give one, or "
            "remove teacher.revision."
        )
    if not loss.teacher_views:
        return
    if teacher.name == "off":
        raise ConfigError(
            f"loss.name={loss.settings.name} learns from a teacher, but teacher.name is off; set teacher.name to "
            "frozen, ema, trust_region or live, or loss.name=grpo."
        )
    if teacher.path is not None and teacher.name in ("ema", "live"):
        raise ConfigError(
            f"teacher.path is set, but teacher.name={teacher.name} teaches with the policy's own weights; remove "
            "teacher.path, or set teacher.name to frozen or trust_region."
        )
    if teacher.offload and teacher.name == "live":
        raise ConfigError(
            "teacher.offload is on, but teacher.name=live has no weights of its own to put away; set "
            "teacher.offload=false."
        )


def check_top_k(loss: Loss, shape: ModelShape) -> None:
    if loss.top_k_tokens > shape.vocab:
        raise ConfigError(
            f"loss.top_k is {loss.top_k_tokens}, but the vocabulary has {shape.vocab} tokens; set it lower."
        )


def check_teacher_model(directory: Path, config: Config, student: ModelShape) -> ModelShape:
    """Returns the shape of `teacher.path`'s model, which must fit the layout, the context and the student's
    vocabulary."""
    shape = read_model_shape(directory, key="teacher.path")
    check_weights(directory, shape, key="teacher.path")
    check_tokenizer_file(directory, key="teacher.path")
    check_layout(config.parallel, shape)
    if shape.vocab != student.vocab:
        raise ConfigError(
            f"teacher.path has a vocabulary of {shape.vocab} tokens, model.path one of {student.vocab}: their "
            "distributions cannot be compared; give a teacher with the same tokenizer."
        )
    if config.model.max_context_length > shape.max_positions:
        raise ConfigError(
            f"model.max_context_length is {config.model.max_context_length}, but the model of teacher.path was made "
            f"for {shape.max_positions} positions; set model.max_context_length to at most that."
        )
    return shape


def check_optimizer(optimizer: OptimizerSettings) -> None:
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr is {optimizer.min_lr:g}, above optimizer.lr={optimizer.lr:g}; set it to at "
            "most that."
        )


def check_template_arguments(rollout: RolloutSettings) -> None:
    for name in rollout.chat_template_kwargs:
        if name in TEMPLATE_ARGUMENTS:
            raise ConfigError(
                f"rollout.chat_template_kwargs holds {name}, which the trainer sets itself; remove it."
            )


def check_log(log: LogSettings, rollout: RolloutSettings) -> None:
    packages = {"tensorboard": log.tensorboard, "wandb": log.wandb != "off"}
    for package, wanted in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.{package} is on, but the package {package} is not installed; run: pip install {package}"
            )
    if log.rollout_json_export and not log.rollouts:
        raise ConfigError(
            "log.rollout_json_export is true, but log.rollouts=false records no responses that it could export; set "
            "log.rollouts=true, or log.rollout_json_export=false."
        )
    if (log.num_groups_to_log or 0) > rollout.problems_per_step:
        raise ConfigError(
            f"log.num_groups_to_log is {log.num_groups_to_log}, but a step has as many groups as "
            f"rollout.problems_per_step={rollout.problems_per_step} says; set log.num_groups_to_log="
            f"{rollout.problems_per_step} or less."
        )


def check_tokenizer_file(directory: Path, key: str = "model.path") -> None:
    """Raises ConfigError where there is none, or what a download left in its place."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    files = [directory / name for name in names if (directory / name).is_file()]
    for file in files:
        check_downloaded(file)
        size = file.stat().st_size
        if not 0 < size <= TOKENIZER_BYTES:
            is_so = "is empty" if size == 0 else f"has {size:,} bytes, as no tokenizer has"
            raise ConfigError(f"{file} {is_so}; download it again.")
    config = directory / "tokenizer_config.json"
    try:
        has_code = config.is_file() and "auto_map" in read_text(config, TOKENIZER_BYTES)
    except UnicodeDecodeError:
        raise ConfigError(f"{config} is not text in UTF-8; download it again.") from None
    if has_code:
        raise ConfigError(
            f"{config}: auto_map names code of the tokenizer's own, which is not run here; remove it where "
            "tokenizer.json says all."
        )
    if not files:
        raise ConfigError(
            f"{key}: {directory} has no tokenizer.json; download the model's tokenizer into it."
        )


def check_layout(parallel: ParallelSettings, shape: ModelShape) -> None:
    """Raises ConfigError unless tp divides what tensor parallelism splits, and pp the layers, and the model can be
    trained so."""
    split = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "feed-forward columns": shape.columns,
    }
    for what, count in split.items():
        if count % parallel.tp:
            raise ConfigError(
                f"parallel.tp={parallel.tp} does not divide the model's {count} {what}; "
                f"set parallel.tp to {divisors(gcd(*split.values()))}."
            )
    if shape.experts is not None and parallel.tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tp={parallel.tp} and a model with experts: megatron-core trains them only with the "
            "sequence split over the ranks; set parallel.sequence_parallel=true."
        )
    if shape.layers % parallel.pp:
        raise ConfigError(
            f"parallel.pp={parallel.pp} does not divide the model's {shape.layers} layers; "
            f"set parallel.pp to {divisors(shape.layers)}."
        )


def check_lengths(
    model: ModelSettings, rollout: RolloutSettings, evaluation: EvalSettings, shape: ModelShape
) -> None:
    if model.max_context_length > shape.max_positions:
        raise ConfigError(
            f"model.max_context_length is {model.max_context_length}, but the model was made for "
            f"{shape.max_positions} "
            f"positions; set model.max_context_length to at most {shape.max_positions}."
        )
    for key, max_tokens in [
        ("rollout.max_tokens", rollout.max_tokens),
        ("eval.max_tokens", evaluation.max_tokens),
        *((f"eval.suites.{name}.max_tokens", suite.max_tokens) for name, suite in evaluation.suites.items()),
    ]:
        if max_tokens is not None and max_tokens >= model.max_context_length:
            raise ConfigError(
                f"{key} is {max_tokens}, which leaves no room for a prompt in "
                f"model.max_context_length={model.max_context_length}; set {key} lower."
            )


def check_template(env: Environment, task: TaskSettings, origins: Origins) -> None:
    """Raises ConfigError where words are set for an environment that has its own."""
    given = [
        key
        for key, origin in origins.items()
        if key.startswith("reprompt.template.") and origin not in (DEFAULT, PRESET)
    ]
    if given and type(env).show is not Environment.show:
        raise ConfigError(
            f"{given[0]} is set, but task.env={task.env} shows its problems to the teacher in its own words (its "
            "`show`); remove it."
        )


def check_problem_counts(rollout: RolloutSettings, *, train: int) -> None:
    """Raises ConfigError unless the data holds as many training problems as a step asks."""
    if train == 0:
        raise ConfigError("the task has no problem to train on; give task.options.train_file.")
    if rollout.problems_per_step > train:
        are = "is 1 training problem" if train == 1 else f"are {train} training problems"
        raise ConfigError(
            f"rollout.problems_per_step is {rollout.problems_per_step}, but there {are}; set it to at most {train}."
        )
