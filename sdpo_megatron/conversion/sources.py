"""What is converted: which directories, and which weights in them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.conversion.placement import Place, Placement
from sdpo_megatron.conversion.sums import check_sums
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.run_dir.checkpoint_files import (
    CHECKPOINTS,
    MANIFEST,
    check_format,
    damaged,
    find_checkpoint,
    read_manifest,
)
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.snapshots_file import read_snapshots
from sdpo_megatron.trainer.dist_reading import DistReader
from sdpo_megatron.trainer.manifest import unlike
from sdpo_megatron.trainer.stored_weights import PREFIXES, Which

Announce = Callable[[str], None]
NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state")
"""Begins of the names of what else megatron-core's trainers store."""


@dataclass(frozen=True, kw_only=True)
class MegatronWeights:
    """A model's weights in a torch_dist directory, and the Hugging Face directory that says what model it is."""

    directory: Path
    prefix: str
    """What stands before megatron-core's own names."""
    model: Path
    shape: ModelShape
    steps: int | None
    """How many steps a run trained them; None where nothing says so."""
    reader: DistReader

    def key_of(self, place: Place) -> str:
        return f"{self.prefix}{place.key}"

    def rows(self, placement: Placement) -> int:
        """Returns how many rows the vocabulary has here, padding included."""
        first = next(place for place in placement.places if place.is_vocabulary)
        return self.reader.sizes_of(self.key_of(first))[len(first.before)]


def find_megatron(src: str, whose: Which, model: str | None, announce: Announce) -> MegatronWeights:
    """Returns the weights that `src` means: RUN, RUN@STEP, a checkpoint, or a directory that megatron-core wrote.
    `model` names the Hugging Face model that they are of, by default the one that says so itself.

    Raises UserError for what is not there or not whole, RunFailed where it is damaged."""
    path = _directory(src)
    if not (path / MANIFEST).exists():
        if whose == "teacher":
            raise UserError(
                f"{path} is no checkpoint of a run, and so has no teacher: leave --weights teacher out."
            )
        incomplete = UserError(f"{path} is no complete checkpoint (it has no {MANIFEST}); name another one.")
        if path.absolute().parent.name == CHECKPOINTS:
            raise incomplete
        reader = DistReader(path)
        if any(key.startswith(PREFIXES["policy"]) for key in reader.keys()):
            raise incomplete
        if model is None and not (path / "config.json").is_file():
            raise UserError(
                f"{path} does not say which model it is (there is no config.json in it): name the Hugging Face "
                "directory of the model by --model."
            )
        check_sums(path, announce)
        like = path if model is None else resolve_model_path(model, key="--model", announce=announce)
        return MegatronWeights(
            directory=path,
            prefix="",
            model=like,
            shape=read_model_shape(like, "--model"),
            steps=None,
            reader=reader,
        )
    return _of_run(path, whose, model, announce)


def _directory(src: str) -> Path:
    path = expand_user(src, "SRC")
    if (found := find_checkpoint(str(path))) is not None:
        return found
    if not path.is_dir():
        raise UserError(f"SRC: there is no directory {path}; name a run, RUN@STEP, or a checkpoint.")
    return path


def _of_run(path: Path, whose: Which, model: str | None, announce: Announce) -> MegatronWeights:
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} is no complete checkpoint; name another one.")
    check_format(path, manifest)
    identity: dict[str, Any] = manifest["identity"]
    if model is not None:
        like = resolve_model_path(model, key="--model", announce=announce)
    elif "model.path" in identity:
        like = resolve_model_path(
            identity["model.path"],
            key="--model (the run's model.path)",
            revision=identity.get("model.revision"),
            snapshots=read_snapshots(RunDirectory(path.absolute().parents[1]).snapshots),
            announce=announce,
        )
    else:
        raise UserError(f"{path} does not say which model it is: name its Hugging Face directory by --model.")
    shape = read_model_shape(like, "--model")
    if (found := unlike(manifest, shape)) is not None:
        key, saved, own = found
        raise UserError(
            f"{path} holds a model whose {key} is {saved}, but {like} has {own}: name the model that training began "
            "with by --model."
        )
    announce(f"Checking {path} against its SHA-256")
    if names := damaged(path, manifest, sorted(manifest["files"])):
        raise RunFailed(f"{path} is damaged: {', '.join(sorted(names))}. Put it back from a copy.")
    reader = DistReader(path)
    prefix = PREFIXES[whose]
    if whose == "teacher" and not any(key.startswith(prefix) for key in reader.keys()):
        raise UserError(
            f"{path} holds no teacher: only teacher.name=ema has weights of its own that change"
            f"{_reference(manifest)}; leave --weights teacher out."
        )
    return MegatronWeights(
        directory=path, prefix=prefix, model=like, shape=shape, steps=manifest["step"], reader=reader
    )


def _reference(manifest: dict[str, Any]) -> str:
    named = manifest["reference"]
    return "" if named is None else f", and this run's teacher is {named['directory']}"


def check_content(source: MegatronWeights, placement: Placement) -> None:
    """Raises UserError unless `source` holds all weights of its model, in their sizes, and no others."""
    there = source.reader.keys()
    rows: set[int] = set()
    expected: set[str] = set()
    for place in placement.places:
        key = source.key_of(place)
        expected.add(key)
        if key not in there:
            raise UserError(
                f"{source.directory} has no {key}, which a {source.shape.architecture} with the config.json in "
                f"{source.model} needs; take both from the same model."
            )
        found = source.reader.sizes_of(key)
        padded = found[len(place.before)] if place.is_vocabulary and len(found) > len(place.before) else None
        if found != place.whole(padded):
            raise UserError(
                f"{source.directory} has {key} in the shape {list(found)}, but the config.json in {source.model} "
                f"describes {list(place.whole(padded))}; take both from the same model."
            )
        if padded is not None:
            rows.add(padded)
    if min(rows) < source.shape.vocab or len(rows) > 1:
        raise UserError(
            f"{source.directory} has {' and '.join(map(str, sorted(rows)))} rows for tokens, but the config.json in "
            f"{source.model} has a vocabulary of {source.shape.vocab}; take both from the same model."
        )
    others = [key for key in there if _is_weight(key, source.prefix) and key not in expected]
    if others:
        raise UserError(
            f"{source.directory} holds {others[0]}, which a {source.shape.architecture} with the config.json in "
            f"{source.model} does not have: it would be left out; take both from the same model."
        )


def _is_weight(key: str, prefix: str) -> bool:
    if prefix:
        return key.startswith(prefix)
    return not key.startswith(NOT_WEIGHTS) and not key.endswith("_extra_state")
