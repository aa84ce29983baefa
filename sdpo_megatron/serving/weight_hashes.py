"""Are these the same weights? Of Hugging Face directories, checkpoints and running servers, by one hash.

The hash is that of SGLang's weights checker (`checksums.py`): of a tensor's bytes, 64 bits. Files have Hugging Face
tensors. A server has joined query, key and value, gate and up, has filled the vocabulary up, and has cut all of it over
its tensor-parallel ranks, and a hash cannot be taken apart: so files are joined and cut as that server does it, and
compared by its parameters.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdpo_megatron.conversion.dtypes import named
from sdpo_megatron.errors import ConfigError, RunFailed, ServerLost, ServerRefused, UserError
from sdpo_megatron.models.families.base import Parameter
from sdpo_megatron.models.hf_tensors import hf_tensors
from sdpo_megatron.models.pretrained import resolve_model_path
from sdpo_megatron.models.shape import ModelShape, read_model_shape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.run_dir.checkpoint_files import find_checkpoint
from sdpo_megatron.serving.checksums import SentChecksums, gpu_tensor_hash, served_parameters, tensor_hash

Which = Literal["policy", "teacher"]
SHOWN_PARTS = 4


@dataclass(frozen=True)
class Hashed:
    """One tensor of files, or one parameter of a server's rank."""

    hash: str
    """16 hexadecimal digits."""
    dtype: str = ""
    size: tuple[int, ...] = ()
    """Type and size; empty for what a server says."""


@dataclass(frozen=True)
class Difference:
    """What two sets of weights do not have in common, by name."""

    compared: int
    differing: list[str]
    only_first: list[str]
    only_second: list[str]
    types: tuple[str, str] | None = None
    """The types of both, where all that differs is of unlike ones."""

    @property
    def same(self) -> bool:
        return bool(self.compared) and not (self.differing or self.only_first or self.only_second)


class Files:
    """Weights in a Hugging Face directory or a checkpoint."""

    def __init__(self, text: str, which: Which, dtype: torch.dtype | None, announce: Callable[[str], None]):
        """`text` is a directory, the id of a model, RUN or RUN@STEP; `which` is for checkpoints alone. Tensors are
        hashed in `dtype`, None: as they are stored. Raises UserError where it is none of these."""
        self.dtype = dtype
        self.types: set[str] = set()
        """Those in which tensors were hashed by now."""
        self.tensors: Callable[[], Iterator[tuple[str, Tensor]]]
        self.shape: ModelShape | None
        checkpoint = find_checkpoint(text)
        if checkpoint is not None:
            # imports megatron-core, which takes seconds
            from sdpo_megatron.conversion.stored_weights import weights_of_checkpoint

            stored, _ = weights_of_checkpoint(checkpoint, which)
            self.path, self.shape, self.tensors = checkpoint, stored.shape, stored.tensors
            return
        directory = self.path = resolve_model_path(text, announce=announce, key="the weights")
        if not directory.is_dir():
            raise UserError(
                f"{text} is no directory, run or server; give a Hugging Face directory or id, RUN@STEP, or http://HOST:PORT."
            )
        try:
            shape = self.shape = read_model_shape(directory, "the weights")
        # tensors can be compared by their names alone; a server cannot
        except ConfigError:
            shape = self.shape = None
        self.tensors = lambda: hf_tensors(directory, shape)

    def hashes(self) -> dict[str, Hashed]:
        """Reads and hashes every tensor, one after another."""
        return {
            name: Hashed(tensor_hash(tensor), named(tensor.dtype), tuple(tensor.shape))
            for name, tensor in self._in_type()
        }

    def as_served(self, tp: int, hashed: Callable[[Tensor], str] = tensor_hash) -> list[dict[str, str]]:
        """Returns what a server of `tp` tensor-parallel ranks would say of these weights: by rank, parameter -> hash.

        Raises UserError where the model is none that is known, or does not divide over the ranks."""
        shape = self.shape or read_model_shape(self.path, "the weights")
        if shape.heads % tp:
            raise UserError(f"{tp} ranks of a server do not divide the {shape.heads} heads of {self.path}.")
        sent = SentChecksums(shape, tp, hashed)
        missing = {name for parameter in shape.parameters() for name in parameter.parts}
        for name, tensor in self._in_type():
            if name in missing:
                missing.remove(name)
                sent.add(name, tensor)
        if missing:
            raise UserError(f"{self.path} has no tensor {min(missing)}, which a {shape.architecture} needs.")
        return sent.by_rank

    def _in_type(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors():
            typed = tensor if self.dtype is None else tensor.to(self.dtype)
            self.types.add(named(typed.dtype))
            yield name, typed


class Served:
    """Weights that a running server holds."""

    def __init__(self, client: Client):
        """Raises UserError where no server answers, or it cannot say what it holds."""
        self.url = url = client.url
        if not client.healthy():
            raise UserError(f"no server answers at {url}; start it, or correct the URL.")
        try:
            held = client.weight_checksums()
        except ServerLost as error:
            raise RunFailed(str(error)) from None
        if held is None:
            raise UserError(f"{url} has no /weights_checker that we know: give a server of SGLang 0.5.23.")
        self.by_rank: list[dict[str, str]] = [{} for _ in range(1 + max(rank for rank, _ in held))]
        for rank, checksums in held:
            self.by_rank[rank].update(checksums)
        self._info: dict[str, Any] = {}
        # an older server, or a stand-in, says nothing of itself
        with contextlib.suppress(ServerRefused, ServerLost):
            self._info = client.server_info()

    @property
    def tp(self) -> int:
        return len(self.by_rank)

    @property
    def hashed(self) -> Callable[[Tensor], str]:
        """The hash of that server's kind of device."""
        return gpu_tensor_hash if self._info.get("device") == "cuda" else tensor_hash

    @property
    def dtype(self) -> str:
        """The type that it was started with; empty where it does not say."""
        said = str(self._info.get("dtype", "")).removeprefix("torch.")
        return {"half": "float16", "float": "float32", "auto": ""}.get(said, said)


Weights = Files | Served


def open_weights(
    text: str,
    *,
    which: Which = "policy",
    dtype: torch.dtype | None = None,
    api_key: str | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Weights:
    """Returns the weights that `text` names: http(s)://HOST:PORT is a server; for the rest see `Files`."""
    if is_url(text):
        return Served(Client(text, api_key))
    return Files(text, which, dtype, announce)


def is_url(text: str) -> bool:
    """Returns whether `text` names a server."""
    return text.startswith(("http://", "https://"))


def by_name(weights: Weights, server_tp: int | None = None) -> dict[str, Hashed]:
    """Returns the hash of each tensor; with `server_tp` those that a server of so many ranks would say of files. Where
    there are several ranks, names begin with theirs."""
    if isinstance(weights, Served):
        return _of_ranks(weights.by_rank)
    return weights.hashes() if server_tp is None else _of_ranks(weights.as_served(server_tp))


def whole(hashes: Mapping[str, Hashed]) -> str:
    """Returns one SHA-256 of all of them, whatever their order."""
    lines = "".join(f"{name} {hashed.hash}\n" for name, hashed in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def compare(first: Weights, second: Weights) -> Difference:
    """Compares two sets of weights. Raises UserError where they cannot be."""
    if isinstance(first, Served) and isinstance(second, Served) and first.tp != second.tp:
        raise UserError(
            f"{first.url} cuts its weights over {first.tp} ranks and {second.url} over {second.tp}, so that their "
            "hashes are of different parts; compare each with a directory or a checkpoint."
        )
    if isinstance(first, Files) and isinstance(second, Served):
        return _against_server(first, second)
    if isinstance(first, Served) and isinstance(second, Files):
        found = _against_server(second, first)
        types = None if found.types is None else (found.types[1], found.types[0])
        return Difference(found.compared, found.differing, found.only_second, found.only_first, types)
    return _difference(by_name(first), by_name(second))


def _against_server(files: Files, served: Served) -> Difference:
    ours, theirs = _of_ranks(files.as_served(served.tp, served.hashed)), _of_ranks(served.by_rank)
    found = _difference(ours, theirs)
    assert files.shape is not None
    made_of = served_parameters(files.shape)

    def shown(names: Sequence[str]) -> list[str]:
        return [_with_parts(name, made_of) for name in names]

    types = None
    if found.differing and served.dtype and files.types != {served.dtype}:
        types = (" and ".join(sorted(files.types)), served.dtype)
    # what else it lists, such as tables of its own, is no weight
    return Difference(found.compared, shown(found.differing), shown(found.only_first), [], types)


def _with_parts(name: str, made_of: Mapping[str, Sequence[Parameter]]) -> str:
    parameter = name.rpartition(" ")[2]
    parts = [part for one in made_of[parameter] for part in one.parts]
    if len(parts) > SHOWN_PARTS:
        parts = [*parts[: SHOWN_PARTS - 1], "...", parts[-1]]
    return name if parts == [parameter] else f"{name} (which is {' + '.join(parts)})"


def _difference(first: Mapping[str, Hashed], second: Mapping[str, Hashed]) -> Difference:
    both = [name for name in first if name in second]
    differing = [name for name in both if first[name] != second[name]]
    types = {(first[name].dtype, second[name].dtype) for name in differing}
    unlike = next(iter(types)) if len(types) == 1 else ("", "")
    return Difference(
        compared=len(both),
        differing=differing,
        types=unlike if unlike[0] != unlike[1] else None,
        only_first=[name for name in first if name not in second],
        only_second=[name for name in second if name not in first],
    )


def _of_ranks(by_rank: Sequence[Mapping[str, str]]) -> dict[str, Hashed]:
    return {
        name if len(by_rank) == 1 else f"rank {rank} {name}": Hashed(checksum)
        for rank, checksums in enumerate(by_rank)
        for name, checksum in checksums.items()
    }
