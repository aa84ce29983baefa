"""What is converted: which directories, and which weights in them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdpo_megatron.conversion.placement import places_of
from sdpo_megatron.conversion.stored_weights import PREFIXES, StoredWeights, Which, weights_of_checkpoint
from sdpo_megatron.conversion.sums import check_sums
from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.files import expand_user
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import read_model_shape
from sdpo_megatron.run_dir.checkpoint_files import CHECKPOINTS, MANIFEST, damaged, find_checkpoint
from sdpo_megatron.run_dir.directory import RunDirectory
from sdpo_megatron.run_dir.snapshots_file import read_snapshots
from sdpo_megatron.trainer.dist_reading import DistReader
from sdpo_megatron.trainer.manifest import unlike

Announce = Callable[[str], None]
NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state")
"""Begins of the names of what else megatron-core's trainers store."""


@dataclass(frozen=True, kw_only=True)
class MegatronSource:
    """A model's weights in a torch_dist directory, and what is known of them."""

    weights: StoredWeights
    model: Path
    """The Hugging Face directory that says what model it is."""
    steps: int | None
    """How many steps a run trained them; None where nothing says so."""
    rows: int
    """How many the vocabulary has there, padding included."""


def find_megatron(src: str, whose: Which, model: str | None, announce: Announce) -> MegatronSource:
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
        if any(key.startswith(PREFIXES["policy"]) for key in DistReader(path).keys()):
            raise incomplete
        if model is None and not (path / "config.json").is_file():
            raise UserError(
                f"{path} does not say which model it is (there is no config.json in it): name the Hugging Face "
                "directory of the model by --model."
            )
        check_sums(path, announce)
        like = path if model is None else resolve_model_path(model, key="--model", announce=announce)
        return _checked(StoredWeights(path, read_model_shape(like, "--model")), like, None)
    return _of_run(path, whose, model, announce)


def _directory(src: str) -> Path:
    path = expand_user(src, "SRC")
    if (found := find_checkpoint(str(path))) is not None:
        return found
    if not path.is_dir():
        raise UserError(f"SRC: there is no directory {path}; name a run, RUN@STEP, or a checkpoint.")
    return path


def _of_run(path: Path, whose: Which, model: str | None, announce: Announce) -> MegatronSource:
    weights, manifest = weights_of_checkpoint(path, whose)
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
    if (found := unlike(manifest, read_model_shape(like, "--model"))) is not None:
        key, saved, own = found
        raise UserError(
            f"{path} holds a model whose {key} is {saved}, but {like} has {own}: name the model that training began "
            "with by --model."
        )
    announce(f"Checking {path} against its SHA-256")
    if names := damaged(path, manifest, sorted(manifest["files"])):
        raise RunFailed(f"{path} is damaged: {', '.join(sorted(names))}. Put it back from a copy.")
    return _checked(weights, like, manifest["step"])


def _checked(weights: StoredWeights, model: Path, steps: int | None) -> MegatronSource:
    """Raises UserError unless all weights of the model are there, in their sizes, and no others."""
    shape, sizes_of = weights.shape, weights.reader.sizes_of
    rows = {sizes_of(weights.key_of(place))[0] for place in weights.places if place.is_vocabulary}
    if min(rows) < shape.vocab or len(rows) > 1:
        raise UserError(
            f"{weights.directory} has {' and '.join(map(str, sorted(rows)))} rows for tokens, but the config.json in "
            f"{model} has a vocabulary of {shape.vocab}; take both from the same model."
        )
    (padded,), known = rows, set[str]()
    for place in places_of(shape, padded):
        key = weights.key_of(place)
        known.add(key)
        if sizes_of(key) != place.whole:
            raise UserError(
                f"{weights.directory} has {key} in the shape {list(sizes_of(key))}, but the config.json in {model} "
                f"describes {list(place.whole)}; take both from the same model."
            )
    others = [key for key in weights.keys if _is_weight(key, weights.prefix) and key not in known]
    if others:
        raise UserError(
            f"{weights.directory} holds {others[0]}, which a {shape.architecture} with the config.json in {model} does "
            "not have: it would be left out; take both from the same model."
        )
    return MegatronSource(weights=weights, model=model, steps=steps, rows=padded)


def _is_weight(key: str, prefix: str) -> bool:
    if prefix:
        return key.startswith(prefix)
    return not key.startswith(NOT_WEIGHTS) and not key.endswith("_extra_state")
