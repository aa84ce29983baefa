"""Weights of this rank's model in a torch_dist directory: under which names, and read back in any layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.trainer import safe_reading
from sdpo_megatron.trainer.dist_reading import in_short
from sdpo_megatron.trainer.model import unwrap
from sdpo_megatron.trainer.parallel import ParallelState

from megatron.core import dist_checkpointing  # isort: skip

safe_reading.install()

STATE = "_extra_state"
"""The end of the names of what modules store beside their weights."""


def load_weights(path: Path, chunks: list[nn.Module], parallel: ParallelState, *, prefix: str) -> None:
    """Brings `chunks`, of this rank, to the weights that the torch_dist directory `path` holds, whatever the layout
    that it was written in; `prefix` is what stands before megatron-core's own names there. Raises RunFailed where they
    cannot be read."""
    described = sharded_weights(chunks, parallel, prefix=prefix)
    # an average of weights has no states of modules, and those that there are hold nothing
    wanted = [{key: one for key, one in chunk.items() if not key.endswith(STATE)} for chunk in described]
    fill_weights(chunks, load_described(path, {"chunks": wanted})["chunks"], prefix=prefix)


def sharded_weights(chunks: list[nn.Module], parallel: ParallelState, *, prefix: str) -> list[dict[str, Any]]:
    """Returns megatron's description of each chunk's weights: their names, and which part of each this rank holds."""
    metadata = metadata_of(parallel)
    return [unwrap(chunk).sharded_state_dict(prefix=prefix, metadata=metadata) for chunk in chunks]


def metadata_of(parallel: ParallelState) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # gathered over data-parallel ranks to the first of them only, on the host
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel.groups.dp_cp,
    }


def fill_weights(chunks: list[nn.Module], loaded: list[dict[str, Any]], *, prefix: str) -> None:
    """Gives the chunks the weights that were loaded by `sharded_weights`' descriptions."""
    for chunk, values in zip(chunks, loaded, strict=True):
        own = {key.removeprefix(prefix): value for key, value in values.items()}
        found = unwrap(chunk).load_state_dict(own, strict=False)
        missing = [key for key in found.missing_keys if not key.endswith(STATE)]
        if missing or found.unexpected_keys:
            raise RuntimeError(f"Weights do not fit the model: {missing}, {found.unexpected_keys}.")


def load_described(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns what the descriptions in `wanted` describe. Raises RunFailed where it cannot be read."""

    def read_it() -> dict[str, Any]:
        safe_reading.check_metadata(path)
        return cast(dict[str, Any], dist_checkpointing.load(wanted, str(path)))

    return read_checkpoint(path, read_it)


def read_checkpoint(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of `work`, which reads the checkpoint `path`; RunFailed stands for whatever it raises."""
    try:
        return work()
    # whatever a parser that meets damaged bytes raises
    except (Exception, CheckpointException) as error:
        cause = min(error.failures.items())[1][0] if isinstance(error, CheckpointException) else error
        raise RunFailed(
            f"{path} cannot be read ({in_short(cause)}); if it is damaged, move it away to go on from "
            "the checkpoint before it."
        ) from error
