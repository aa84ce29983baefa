"""All that can be refused before anything is started, in one process and with nothing heavy imported.

The launcher calls it first; every rank calls it again, for what torchrun or srun started."""

import ctypes
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.config import Config, ParallelSettings, RunSettings, load_config
from sdpo_megatron.envs import Environment, build_environment
from sdpo_megatron.errors import ConfigError, UserError
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.preflight.open_files import allow_open_files
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

HELP = """\
Trains a language model by self-distillation (SDPO). Started by itself, it checks every setting and then
starts the SGLang server and the training ranks on this machine; started by torchrun or srun, it is one rank.

The same command after an interruption goes on from the newest checkpoint in runs/NAME."""
HELP_END = """\
All keys, with their defaults, are in sdpo_megatron/config.py. Example:

    python -m sdpo_megatron.train yaml/demo_cpu.yaml run.name=mine optimizer.lr=1e-5"""


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
    device: Literal["cpu", "cuda"]
    directory: RunDirectory
    """The run directory, which is only named so far: `claim_run_directory` makes it."""
    snapshots: dict[str, str]
    """Where models of the Hugging Face Hub lie, by id and revision."""


def preflight(
    argv: Sequence[str], *, world_size: int | None, announce: Callable[[str], None] = lambda message: None
) -> Checked:
    """Checks the command line `argv` (without the program) and everything that it leads to.

    `world_size` is the number of ranks that were started, None where the launcher will start them. `announce`
    is told, in one line, before anything that takes long. Raises UserError; exits with code 0 for --help.
    """
    arguments = parse_arguments(argv)
    try:
        return _checked(arguments, world_size, announce)
    except UnicodeEncodeError as error:
        raise UserError(
            f"A path holds {error.object[error.start]!r}, which this locale ({error.encoding}) cannot write; set "
            "LC_ALL=C.UTF-8, or name another."
        ) from None
    # a file of any kind cannot be read or written
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(
            f"{error.filename} cannot be used: {error.strerror}; correct that, or name another."
        ) from None


def _checked(arguments: Namespace, world_size: int | None, announce: Callable[[str], None]) -> Checked:
    config, origins = load_config(arguments.files, arguments.overrides)
    allow_open_files(config.rollout)
    run_path = Path(config.run.dir).expanduser() / config.run.name
    snapshots = read_snapshots(RunDirectory(run_path).snapshots)
    model_directory = resolve_model_path(
        config.model.path, revision=config.model.revision, snapshots=snapshots, announce=announce
    )
    gpus = count_gpus()
    shape = check_settings(
        config,
        model_directory,
        world_size=world_size,
        gpus=gpus,
        loss_is_chosen=origins["loss.name"] != DEFAULT,
    )
    has_teacher = build_terms(config.loss)[0].loss.teacher_views > 0
    teacher_directory, teacher_shape = model_directory, shape if has_teacher else None
    if teacher_shape is not None and config.teacher.path is not None:
        teacher_directory = resolve_model_path(
            config.teacher.path,
            key="teacher.path",
            revision=config.teacher.revision,
            snapshots=snapshots,
            announce=announce,
        )
        teacher_shape = check_teacher_model(teacher_directory, config, shape)
    device = choose_device(config.run, gpus)
    if world_size is None and device == "cuda":
        check_gpus(config.parallel, gpus)
    env = build_environment(config.task, origins)
    check_problem_counts(config.rollout, train=len(env.train_problems()))
    check_template(env, config.task, origins)
    return Checked(
        config=config,
        origins=origins,
        model_directory=model_directory,
        shape=shape,
        teacher_directory=teacher_directory,
        teacher_shape=teacher_shape,
        env=env,
        device=device,
        directory=check_run(run_path, config.model_dump()),
        snapshots=snapshots,
    )


def claim_run_directory(checked: Checked, rank: int | None = None) -> RunDirectory:
    """Makes and locks the run directory, once per run: in the launcher (`rank` None), or else in rank 0.

    For the other ranks, and for those that a launcher started, it only names the directory. Raises UserError
    where another process holds it.
    """
    path = checked.directory.path
    if rank not in (None, 0) or (rank == 0 and parent_holds(path)):
        return checked.directory
    directory = open_run(path, checked.config.model_dump(), checked.origins)
    write_snapshots(directory.snapshots, checked.snapshots)
    return directory


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Returns `files` and `overrides`, each in the given order. Raises ConfigError; exits with code 0 for --help."""
    parser = _Parser(
        prog="python -m sdpo_megatron.train",
        usage="%(prog)s FILE.yaml ... section.key=value ...",
        description=HELP,
        epilog=HELP_END,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="FILE.yaml | section.key=value",
        help="settings: later files win over earlier ones, key=value over all files; values are YAML",
    )
    parsed, others = parser.parse_known_intermixed_args(argv)
    options = [argument for argument in others if argument.startswith("-")]
    if options:
        raise ConfigError(f"unknown option {options[0]}; settings are written section.key=value, see --help.")
    arguments = parsed.arguments + others
    files = [argument for argument in arguments if _is_file(argument)]
    if not files:
        raise ConfigError(
            "no settings: give a YAML file, for example: python -m sdpo_megatron.train yaml/demo_cpu.yaml "
            "(--help says more)."
        )
    return Namespace(files=files, overrides=[argument for argument in arguments if not _is_file(argument)])


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
    ranks = parallel.tp * parallel.pp * parallel.cp * parallel.dp
    if ranks > gpus:
        raise ConfigError(
            f"parallel.tp * pp * cp * dp = {ranks} ranks, but torch sees {gpus} GPUs on this machine; make "
            f"that at most {gpus}, start the ranks with torchrun on several machines, or set run.device=cpu."
        )
