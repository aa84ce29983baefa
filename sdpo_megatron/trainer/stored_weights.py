"""The weights in a checkpoint, tensor by tensor under their Hugging Face names, without building the model.

megatron-core keeps a parameter of all layers as one tensor with the layer as first dimension, whole and in no layout's
order, and torch keeps that in chunks; each is read where it lies.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sdpo_megatron.errors import RunFailed, UserError
from sdpo_megatron.models.families.base import LAYERS, Parameter
from sdpo_megatron.run_dir.checkpoint_files import check_format, read_manifest
from sdpo_megatron.trainer.checkpoint import POLICY
from sdpo_megatron.trainer.checkpoint_metadata import read_metadata, stored_shape
from sdpo_megatron.trainer.hf_weights import ARRANGEMENTS
from sdpo_megatron.trainer.optimizer import AVERAGE

PREFIXES = {"policy": "", "teacher": f"optimizer.state.{AVERAGE}."}
"""What stands before the policy's name of a tensor."""
NUMBERED = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.")


class StoredWeights:
    """The policy's weights in a complete checkpoint, or those of its teacher where that is an average."""

    def __init__(self, checkpoint: Path, which: Literal["policy", "teacher"] = "policy"):
        """Raises UserError where it is no complete checkpoint of this version or has no such teacher, and RunFailed
        where it is damaged."""
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise UserError(f"{checkpoint} is no complete checkpoint; name another one.")
        check_format(checkpoint, manifest)
        self.checkpoint = checkpoint
        self.step: int = manifest["step"]
        self.shape = stored_shape(checkpoint, manifest)
        metadata = read_metadata(checkpoint)
        self._entries = metadata.state_dict_metadata
        self._places: dict[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in (metadata.storage_data or {}).items()
        }
        self._prefix = PREFIXES[which]
        if not any(name.startswith(f"{self._prefix}{POLICY}.") for name in self._entries):
            teacher = manifest["identity"].get("teacher.name", "unknown")
            raise UserError(
                f"{checkpoint} holds no weights of a teacher (teacher.name is {teacher}): only that of ema is an "
                "average, which a checkpoint keeps; leave --weights teacher out."
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields Hugging Face name and tensor, in the order of the network; in memory are those of one parameter.
        Raises RunFailed where one is missing or damaged."""
        for parameter in self.shape.family.parameters(self.shape.layers, tied=self.shape.tie_embeddings):
            found = NUMBERED.match(next(iter(parameter.parts)))
            full = self._read(self._key(parameter, found is not None), int(found[1]) if found else None)
            parts = ARRANGEMENTS[parameter.rule].split(full, self.shape)
            yield from zip(parameter.parts, parts, strict=True)

    def _key(self, parameter: Parameter, in_layer: bool) -> str:
        place = f"{self._prefix}{POLICY}.{'decoder.layers.' if in_layer else ''}"
        keys = [f"{place}{name}" for name in (parameter.fused, parameter.megatron) if name]
        found = next((key for key in keys if isinstance(self._entries.get(key), TensorStorageMetadata)), None)
        if found is None:
            raise RunFailed(f"{self.checkpoint} is damaged: it has no {keys[-1]}. Put it back from a copy.")
        return found

    def _read(self, key: str, layer: int | None) -> Tensor:
        """One tensor; of those of all layers, that of `layer`."""
        entry: Any = self._entries[key]
        first, last = (0, entry.size[0]) if layer is None else (layer, layer + 1)
        full = torch.empty((last - first, *entry.size[1:]), dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            if begin >= last or end <= first:
                continue
            held = self._chunk(key, tuple(chunk.offsets))[max(first - begin, 0) : last - begin]
            rows = slice(max(begin, first) - first, min(end, last) - first)
            rest = [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            target = full[(rows, *rest)]
            # copy_ would broadcast
            if target.shape != held.shape:
                raise self._damaged(key, f"a part has the shape {list(held.shape)}, not {list(target.shape)}")
            target.copy_(held)
            filled += held.numel()
        if filled != full.numel():
            raise self._damaged(key, f"its parts hold {filled} numbers of {full.numel()}")
        return full if layer is None else full[0]

    def _chunk(self, key: str, offset: tuple[int, ...]) -> Tensor:
        try:
            info = self._places[key, offset]
            with (self.checkpoint / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = file.read(info.length)
            return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        # whatever a parser that meets damaged bytes raises
        except Exception as error:
            raise self._damaged(
                key, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            ) from error

    def _damaged(self, key: str, why: str) -> RunFailed:
        return RunFailed(
            f"{self.checkpoint} is damaged: {key} cannot be read ({why}). Put it back from a copy."
        )
