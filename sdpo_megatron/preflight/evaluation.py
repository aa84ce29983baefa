"""What can be refused of an evaluation before anything is started."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from sdpo_megatron.config import load_config
from sdpo_megatron.envs import build_environment
from sdpo_megatron.errors import UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.preflight.boundary import reading
from sdpo_megatron.preflight.checked import (
    SETTINGS_LIMIT_S,
    Checked,
    build_suite_environments,
    choose_device,
    count_gpus,
    parse_arguments,
    settings_parser,
)
from sdpo_megatron.preflight.conversations import check_conversations
from sdpo_megatron.preflight.open_files import allow_open_files
from sdpo_megatron.preflight.settings import check_sampling
from sdpo_megatron.run_dir.checkpoint_files import check_format, find_checkpoint, read_manifest
from sdpo_megatron.run_dir.directory import RunDirectory

EVALUATE = settings_parser(
    "python -m sdpo_megatron.evaluate",
    """\
Evaluates a model on the held-out problems of task.env and on eval.suites, as training does: the Hugging Face
directory model.path, a run's checkpoint, or what the servers of server.urls serve.""",
    """\
Examples:

    python -m sdpo_megatron.evaluate yaml/demo_cpu.yaml
    python -m sdpo_megatron.evaluate yaml/demo_cpu.yaml --checkpoint runs/demo_cpu
    python -m sdpo_megatron.evaluate yaml/demo_cpu.yaml eval.samples=8 server.urls=[http://127.0.0.1:30000]""",
)
EVALUATE.add_argument(
    "--checkpoint",
    help="a run directory, of which the newest checkpoint is taken, RUN@STEP, or one checkpoint in it",
)
EVALUATE.add_argument("--out", help="the directory of the results; by default evaluations/ and a name")


def preflight_evaluation(
    argv: Sequence[str], announce: Callable[[str], None]
) -> tuple[Checked, Path | None, str]:
    """Checks the command line; returns what it asks for, the checkpoint to evaluate, None for none, and the name of
    what is evaluated.

    The directory in what is returned is that of the results. Raises UserError; exits with code 0 for --help."""
    with reading("the command line"):
        checked, checkpoint, name = _checked(parse_arguments(argv, EVALUATE), announce)
        check_conversations(checked, announce, trains=False)
        return checked, checkpoint, name


def _checked(arguments: Namespace, announce: Callable[[str], None]) -> tuple[Checked, Path | None, str]:
    with reading("the settings", SETTINGS_LIMIT_S):
        config, origins = load_config(arguments.files, arguments.overrides)
    allow_open_files(config.rollout)
    snapshots: dict[str, str] = {}
    gpus = count_gpus()
    with reading(f"model.path={config.model.path}", announce=announce):
        model_directory = resolve_model_path(
            config.model.path, revision=config.model.revision, snapshots=snapshots, announce=announce
        )
        shape = check_sampling(config, model_directory, gpus=gpus)
    checkpoint, name = None, model_directory.name
    if arguments.checkpoint is not None:
        if config.server.urls:
            raise UserError("--checkpoint and server.urls are two things to evaluate: leave one out.")
        checkpoint, name = _checkpoint(expand_user(arguments.checkpoint, "--checkpoint"), config.model.path)
    elif config.server.urls:
        name = ", ".join(config.server.urls)
    out = expand_user(arguments.out, "--out") if arguments.out else Path("evaluations") / _file_name(name)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory.")
    if (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out} is the directory of a run; name another one.")
    with reading(f"task.env={config.task.env}, with its task.options", announce=announce):
        env = build_environment(config.task, origins)
    checked = Checked(
        config=config,
        origins=origins,
        model_directory=model_directory,
        shape=shape,
        teacher_directory=model_directory,
        teacher_shape=None,
        env=env,
        suite_envs=build_suite_environments(config.eval, origins, announce),
        device=choose_device(config.run, gpus),
        directory=RunDirectory(out),
        snapshots=snapshots,
    )
    return checked, checkpoint, name


def _checkpoint(path: Path, model_path: str) -> tuple[Path, str]:
    """The checkpoint that `path` means, and what it is called."""
    checkpoint = find_checkpoint(str(path))
    manifest = None if checkpoint is None else read_manifest(checkpoint)
    if checkpoint is None or manifest is None:
        raise UserError(
            f"--checkpoint {path} holds no complete checkpoint: name a run directory, or a directory under its "
            "checkpoints/."
        )
    check_format(checkpoint, manifest)
    began_with = manifest["identity"].get("model.path")
    if began_with != model_path:
        raise UserError(
            f"{checkpoint} was trained from model.path={began_with}, but model.path is {model_path}; set that."
        )
    name = checkpoint.absolute().parent.parent.name
    return checkpoint, f"{name} after {manifest['step']} steps"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip("-.") or "model"
