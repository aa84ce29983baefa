"""All that can be refused before anything is started, in one process; the tokenizer and all problems come last.

The launcher calls it first; every rank calls it again, for what torchrun or srun started."""

import ctypes
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.config import Config, EvalSettings, ParallelSettings, RunSettings, load_config
from sdpo_megatron.envs import Environment, build_environment
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.preflight.boundary import reading
from sdpo_megatron.preflight.conversations import check_conversations
from sdpo_megatron.preflight.open_files import allow_open_files
from sdpo_megatron.preflight.same_problems import check_same_problems
from sdpo_megatron.preflight.settings import (
    check_problem_counts,
    check_settings,
    check_teacher_model,
    check_template,
)
from sdpo_megatron.run_dir.directory import RunDirectory, check_run, open_run, parent_holds
from sdpo_megatron.run_dir.snapshots_file import read_snapshots, write_snapshots
from sdpo_megatron.strict_yaml.explain import DEFAULT, Origins

CUDA_DRIVER = "libcuda.so.1"
SETTINGS_LIMIT_S = 5.0
RUN_LIMIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A configuration that can be started, and what was found on the way."""

    config: Config
    origins: Origins
    model_directory: Path
    """A directory of Hugging Face's format with safetensors, whatever `model.path` names."""
    shape: ModelShape
    teacher_directory: Path
    teacher_shape: ModelShape | None
    """The shape of the model whose weights teach; None where no teacher is needed."""
    env: Environment
    suite_envs: dict[str, Environment]
    """Those of eval.suites, by name."""
    device: Literal["cpu", "cuda"]
    directory: RunDirectory
    """The run directory, which is only named so far: `claim_run_directory` makes it."""
    snapshots: dict[str, str]
    """Where models of the Hugging Face Hub lie, by id and revision."""
    only_check: bool = False
    """Whether nothing is to be started (--check)."""


def preflight(
    argv: Sequence[str],
    *,
    world_size: int | None,
    rank: int | None = None,
    gpus: int | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Checked:
    """Checks the command line `argv` (without the program) and everything that it leads to.

    `world_size` is the number of ranks that were started, None where the launcher will start them. The launcher reads
    all problems as the model will, or rank 0 where there is none; `rank` is this process's, if it is one. `gpus` is
    how many there are where it will run, by default here. `announce` is told, in one line, before anything that takes
    long. Raises UserError; exits with code 0 for --help.
    """
    with reading("the command line"):
        arguments = parse_arguments(argv)
        with reading("the settings", SETTINGS_LIMIT_S):
            config, origins = load_config(arguments.files, arguments.overrides)
        gpus = count_gpus() if gpus is None else gpus
        checked = _checked(config, origins, world_size, gpus, announce)
        if world_size is None or (rank == 0 and not parent_holds(checked.directory.path)):
            with reading(f"the run directory {checked.directory.path}", announce=announce):
                check_same_problems(checked.directory, checked.env, config.task.options)
            check_conversations(checked, announce)
        return replace(checked, only_check=arguments.check)


def _checked(
    config: Config, origins: Origins, world_size: int | None, gpus: int, announce: Callable[[str], None]
) -> Checked:
    allow_open_files(config.rollout)
    run_path = expand_user(config.run.dir, "run.dir") / config.run.name
    with reading(f"the run directory {run_path}", RUN_LIMIT_S):
        snapshots = read_snapshots(RunDirectory(run_path).snapshots)
    with reading(f"model.path={config.model.path}", announce=announce):
        model_directory = resolve_model_path(
            config.model.path, revision=config.model.revision, snapshots=snapshots, announce=announce
        )
        shape = check_settings(
            config,
            model_directory,
            world_size=world_size,
            gpus=gpus,
            loss_is_chosen=origins["loss.name"] != DEFAULT,
        )
    teacher_directory, teacher_shape = model_directory, None
    if build_terms(config.loss)[0].loss.teacher_views > 0:
        teacher_directory, teacher_shape = check_teacher(config, model_directory, shape, snapshots, announce)
    device = choose_device(config.run, gpus)
    if world_size is None and device == "cuda":
        check_gpus(config.parallel, gpus)
    with reading(f"task.env={config.task.env}, with its task.options", announce=announce):
        env = build_environment(config.task, origins)
        check_problem_counts(config.rollout, train=len(env.train_problems()))
        check_template(env, config.task, origins)
    with reading(f"the run directory {run_path}", RUN_LIMIT_S):
        directory = check_run(run_path, config.model_dump())
    return Checked(
        config=config,
        origins=origins,
        model_directory=model_directory,
        shape=shape,
        teacher_directory=teacher_directory,
        teacher_shape=teacher_shape,
        env=env,
        suite_envs=build_suite_environments(config.eval, origins, announce),
        device=device,
        directory=directory,
        snapshots=snapshots,
    )


def check_teacher(
    config: Config,
    model_directory: Path,
    shape: ModelShape,
    snapshots: MutableMapping[str, str],
    announce: Callable[[str], None],
) -> tuple[Path, ModelShape]:
    """Returns directory and shape of the model whose weights teach."""
    if config.teacher.path is None:
        return model_directory, shape
    with reading(f"teacher.path={config.teacher.path}"):
        directory = resolve_model_path(
            config.teacher.path,
            key="teacher.path",
            revision=config.teacher.revision,
            snapshots=snapshots,
            announce=announce,
        )
        return directory, check_teacher_model(directory, config, shape)


def build_suite_environments(
    evaluation: EvalSettings, origins: Origins, announce: Callable[[str], None]
) -> dict[str, Environment]:
    """Raises UserError, which names the suite."""
    built: dict[str, Environment] = {}
    for name, suite in evaluation.suites.items():
        key = f"eval.suites.{name}"
        with reading(f"{key}.task.env={suite.task.env}, with its options", announce=announce):
            try:
                built[name] = build_environment(suite.task, origins, f"{key}.task")
            except UserError as error:
                named = key in error.message
                raise type(error)(
                    error.message if named else f"{key}: {error.message}", error.log_end
                ) from None
    return built


def claim_run_directory(checked: Checked, rank: int | None = None) -> RunDirectory:
    """Makes and locks the run directory, once per run: in the launcher (`rank` None), or else in rank 0.

    For the other ranks, and for those that a launcher started, it only names the directory. Raises UserError
    where another process holds it.
    """
    path = checked.directory.path
    if rank not in (None, 0) or (rank == 0 and parent_holds(path)):
        return checked.directory
    with reading(f"the run directory {path}"):
        directory = open_run(path, checked.config.model_dump(), checked.origins)
    write_snapshots(directory.snapshots, checked.snapshots)
    return directory


class Parser(ArgumentParser):
    """Has what is wrong said like any other mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")


def settings_parser(command: str, description: str, end: str) -> Parser:
    """Returns the parser of a command that takes settings; what it takes besides can be added."""
    parser = Parser(
        prog=command,
        description=description,
        epilog=end,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="FILE.yaml | section.key=value",
        help="settings: later files win over earlier ones, key=value over all files; values are YAML",
    )
    return parser


TRAIN = settings_parser(
    "python -m sdpo_megatron.train",
    """\
Trains a language model by self-distillation (SDPO). Started by itself, it checks every setting and then
starts the SGLang server and the training ranks on this machine; started by torchrun or srun, it is one rank.

The same command after an interruption goes on from the newest checkpoint in runs/NAME.""",
    """\
All keys, with their defaults, are in sdpo_megatron/config.py. Example:

    python -m sdpo_megatron.train yaml/demo_cpu.yaml run.name=mine optimizer.lr=1e-5""",
)
TRAIN.add_argument(
    "--check",
    action="store_true",
    help="check everything, start nothing; exit code 0, or 2 for what is to be corrected",
)


def parse_arguments(argv: Sequence[str], parser: Parser = TRAIN) -> Namespace:
    """Returns `files` and `overrides`, each in the given order, and the command's own options. Raises ConfigError;
    exits with code 0 for --help."""
    parsed, others = parser.parse_known_intermixed_args(argv)
    options = [argument for argument in others if argument.startswith("-")]
    if options:
        raise ConfigError(f"unknown option {options[0]}; settings are written section.key=value, see --help.")
    parsed.arguments += others
    parsed.files = [argument for argument in parsed.arguments if _is_file(argument)]
    if not parsed.files:
        raise ConfigError(
            f"no settings: give a YAML file, for example: {parser.prog} yaml/demo_cpu.yaml (--help says more)."
        )
    parsed.overrides = [argument for argument in parsed.arguments if not _is_file(argument)]
    return parsed


def _is_file(argument: str) -> bool:
    return "=" not in argument or (argument.endswith((".yaml", ".yml")) and Path(argument).is_file())


def count_gpus() -> int:
    """Returns how many GPUs torch sees. Without a driver that is none, and torch, which takes seconds, is not asked."""
    try:
        ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def choose_device(run: RunSettings, gpus: int) -> Literal["cpu", "cuda"]:
    if run.device == "auto":
        return "cuda" if gpus else "cpu"
    return run.device


def check_gpus(parallel: ParallelSettings, gpus: int) -> None:
    """Raises ConfigError unless there is a GPU for each rank that the launcher starts on this machine."""
    if parallel.ranks > gpus:
        raise ConfigError(
            f"parallel.tp * pp * cp * dp = {parallel.ranks} ranks, but torch sees {gpus} GPUs on this machine; make "
            f"that at most {gpus}, start the ranks with torchrun on several machines, or set run.device=cpu."
        )
