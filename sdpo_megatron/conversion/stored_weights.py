"""The weights of a model in a torch_dist directory, tensor by tensor under their Hugging Face names, without building
the model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdpo_megatron.conversion.placement import Place, places_of
from sdpo_megatron.errors import UserError
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.run_dir.checkpoint_files import check_format, read_manifest
from sdpo_megatron.trainer.checkpoint_contents import POLICY, stored_shape
from sdpo_megatron.trainer.dist_reading import DistReader
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS
from sdpo_megatron.trainer.optimizer import AVERAGE

Which = Literal["policy", "teacher"]
PREFIXES: dict[Which, str] = {"policy": f"{POLICY}.", "teacher": f"optimizer.state.{AVERAGE}.{POLICY}."}
"""What stands before megatron-core's own name of a tensor in a run's checkpoint."""


class StoredWeights:
    """Those of one model, in a directory that may hold more."""

    def __init__(self, directory: Path, shape: ModelShape, prefix: str = "") -> None:
        """`prefix` stands before megatron-core's own names. Raises UserError where `directory` holds no such
        checkpoint, or not all of it; RunFailed where it is damaged."""
        self.directory, self.shape, self.prefix = directory, shape, prefix
        self.reader = DistReader(directory)
        self.keys = self.reader.keys()
        self.places = places_of(shape)

    def key_of(self, place: Place) -> str:
        """Returns the name under which a parameter is stored. Raises UserError where there is none."""
        keys = [f"{self.prefix}{name}" for name in place.parameter.stored()]
        found = next((key for key in keys if key in self.keys), None)
        if found is None:
            raise UserError(
                f"{self.directory} has no {keys[-1]}, which a {self.shape.architecture} needs; take the model that it "
                "is of, or put it back from a copy."
            )
        return found

    def parts_of(self, place: Place, begin: int = 0, rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields the Hugging Face tensors that lie at `place`, as they are stored: names and numbers. Of what has a row
        for each token `rows` may be read alone, from `begin` on."""
        sizes = place.sizes if rows is None else (rows, *place.sizes[1:])
        offsets = (*place.before, begin, *(0 for _ in sizes[1:]))
        ones = (1 for _ in place.before)
        joined = self.reader.read(self.key_of(place), offsets, (*ones, *sizes)).view(sizes)
        parts = ARRANGEMENTS[place.parameter.rule].split(joined, self.shape)
        return zip(place.parameter.parts, parts, strict=True)

    def blocks_of(self, place: Place) -> Iterator[tuple[str, int, Tensor]]:
        """Yields name, first row and numbers: what has a row for each token in blocks of rows, anything else whole."""
        blocks: Iterable[tuple[int, int | None]] = [(0, None)]
        if place.is_vocabulary:
            blocks = self.reader.row_blocks(self.key_of(place), len(place.before), self.shape.vocab)
        for begin, rows in blocks:
            for name, part in self.parts_of(place, begin, rows):
                yield name, begin, part

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields Hugging Face name and tensor, in the order of the network; in memory are those of one parameter.
        Raises RunFailed where one is damaged."""
        for place in self.places:
            yield from self.parts_of(place)


def weights_of_checkpoint(path: Path, whose: Which) -> tuple[StoredWeights, dict[str, Any]]:
    """Returns the policy's weights in a complete checkpoint of a run, or those of its teacher where that is an average;
    and the checkpoint's manifest.

    Raises UserError where it is no complete checkpoint of this version or has no such teacher, and RunFailed where it
    is damaged."""
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} is no complete checkpoint; name another one.")
    check_format(path, manifest)
    weights = StoredWeights(path, stored_shape(path, manifest), PREFIXES[whose])
    if whose == "teacher" and not any(key.startswith(weights.prefix) for key in weights.keys):
        named = manifest["reference"]
        own = "" if named is None else f", and this run's teacher is {named['directory']}"
        raise UserError(
            f"{path} holds no teacher: only teacher.name=ema has weights of its own that change{own}; leave --weights "
            "teacher out."
        )
    return weights, manifest
