"""The weights in a checkpoint, tensor by tensor under their Hugging Face names, without building the model.

megatron-core keeps a parameter of all layers as one tensor with the layer as first dimension, and one of all experts
with the expert as second, whole and in no layout's order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from torch import Tensor

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.models.families.base import Parameter
from sdpo_megatron.run_dir.checkpoint_files import check_format, read_manifest
from sdpo_megatron.trainer.checkpoint_contents import POLICY, stored_shape
from sdpo_megatron.trainer.dist_reading import DistReader
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS
from sdpo_megatron.trainer.optimizer import AVERAGE

Which = Literal["policy", "teacher"]
PREFIXES: dict[Which, str] = {"policy": f"{POLICY}.", "teacher": f"optimizer.state.{AVERAGE}.{POLICY}."}
"""What stands before megatron-core's name of a tensor."""


class StoredWeights:
    """The policy's weights in a complete checkpoint, or those of its teacher where that is an average."""

    def __init__(self, checkpoint: Path, which: Which = "policy"):
        """Raises UserError where it is no complete checkpoint of this version or has no such teacher, and RunFailed
        where it is damaged."""
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise UserError(f"{checkpoint} is no complete checkpoint; name another one.")
        check_format(checkpoint, manifest)
        self.checkpoint = checkpoint
        self.step: int = manifest["step"]
        self.shape = stored_shape(checkpoint, manifest)
        self._reader = DistReader(checkpoint)
        self._keys = self._reader.keys()
        self._prefix = PREFIXES[which]
        if not any(name.startswith(self._prefix) for name in self._keys):
            teacher = manifest["identity"].get("teacher.name", "unknown")
            raise UserError(
                f"{checkpoint} holds no weights of a teacher (teacher.name is {teacher}): only that of ema is an "
                "average, which a checkpoint keeps; leave --weights teacher out."
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields Hugging Face name and tensor, in the order of the network; in memory are those of one parameter.
        Raises RunFailed where one is missing or damaged."""
        for parameter in self.shape.parameters():
            full = self._read(self._key(parameter), parameter)
            parts = ARRANGEMENTS[parameter.rule].split(full, self.shape)
            yield from zip(parameter.parts, parts, strict=True)

    def _key(self, parameter: Parameter) -> str:
        keys = [f"{self._prefix}{name}" for name in parameter.stored()]
        found = next((key for key in keys if key in self._keys), None)
        if found is None:
            raise RunFailed(f"{self.checkpoint} is damaged: it has no {keys[-1]}. Put it back from a copy.")
        return found

    def _read(self, key: str, parameter: Parameter) -> Tensor:
        before = [number for number in (parameter.layer, parameter.expert) if number is not None]
        own = self._reader.sizes_of(key)[len(before) :]
        part = self._reader.read(key, (*before, *(0 for _ in own)), (*(1 for _ in before), *own))
        return part.view(own)
