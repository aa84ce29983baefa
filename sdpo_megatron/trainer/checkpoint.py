"""Saving and loading all that a run needs to go on, in any layout, with megatron's dist_checkpointing.

The format is torch_dist: each rank writes the shards it owns, under names and offsets that do not depend on the
layout. megatron's own writer starts a spawned manager and forked writers for that; here torch's synchronous writer
writes the same format in the calling process, and reports a failure (a full disk) on all ranks together.
"""

import random
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.run_dir.checkpoint_files import (
    checkpoint_path,
    damaged,
    newest_checkpoint,
    read_manifest,
    remove_checkpoint,
    remove_incomplete,
    remove_older,
    seal,
    write_manifest,
    written_files,
)
from sdpo_megatron.trainer.checkpoint_contents import POLICY
from sdpo_megatron.trainer.disk import together, write_failed
from sdpo_megatron.trainer.dist_weights import (
    fill_weights,
    load_described,
    metadata_of,
    read_checkpoint,
    sharded_weights,
)
from sdpo_megatron.trainer.manifest import Reference, check_model, check_reference, manifest_of
from sdpo_megatron.trainer.parallel import ParallelState

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config  # isort: skip
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # isort: skip
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import (  # isort: skip
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker  # isort: skip


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What training changes. It is saved from and loaded into, in place."""

    policy: list[nn.Module]
    """This rank's chunks of the policy, wrapped or not."""
    optimizer: Any
    schedule: Any


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. Every rank calls every method, with the same arguments."""

    directory: Path
    _: KW_ONLY
    keep: int
    shape: ModelShape
    identity: dict[str, Any]
    """The settings that make the experiment, for the manifest; JSON-serialisable."""
    reference: Reference | None
    """Weights that only teach and never change; None where no teacher has such."""
    parallel: ParallelState

    def newest(self) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it."""
        found = newest_checkpoint(self.directory) if self.parallel.is_main else None
        name = self.parallel.share(found.name if found else "")
        return self.directory / name if name else None

    def save(self, step: int, state: TrainerState) -> None:
        """Saves the state after `step` training steps, then removes all but the newest `keep` checkpoints.

        A complete checkpoint of that step stays as it is.

        Raises:
            RunFailed: on all ranks, where the disk does not take it; what was written of it is removed, and the
                older checkpoints are intact.
        """
        path = checkpoint_path(self.directory, step)
        if not self._begin(path):
            return
        try:
            self._write(path, step, state)
        except (RunFailed, CheckpointException) as error:
            together(self.parallel, f"remove {path}", lambda: self._discard(path))
            if isinstance(error, RunFailed):
                raise
            raise write_failed(path, error) from error

    def _begin(self, path: Path) -> bool:
        """Whether there is anything to save. Frees the space of what crashes left behind."""

        def prepare() -> None:
            if self.parallel.is_main:
                self.directory.mkdir(parents=True, exist_ok=True)
                remove_incomplete(self.directory)

        together(self.parallel, f"prepare {self.directory}", prepare)
        if self.parallel.share(path.is_dir()):
            return False
        together(self.parallel, f"make {path}", lambda: path.mkdir() if self.parallel.is_main else None)
        return True

    def _write(self, path: Path, step: int, state: TrainerState) -> None:
        def write_common() -> dict[str, Any]:
            tensors = _sharded_state(state, self.parallel, is_loading=False)
            sharded, common = save_preprocess(tensors)
            by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
                cast(dict[str, Any], sharded), keep_only_main_replica=True
            )
            TorchCommonSaveStrategy("torch", 1).save_common(common, str(path))
            torch.save(_random_states(), path / f"rng_{self.parallel.rank:05d}.pt")
            return by_key

        shards = together(self.parallel, f"write {path}", write_common)
        save(
            mcore_to_pyt_state_dict(shards),
            storage_writer=FileSystemWriter(path),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )

        self._complete(path, step)

    def _complete(self, path: Path, step: int) -> None:
        """All tensors are written; what says so comes last."""

        def name_format() -> list[str] | None:
            if self.parallel.is_main:
                save_config(CheckpointingConfig("torch_dist", 1), str(path))
                return written_files(path)

        def finish() -> None:
            if self.parallel.is_main:
                about = manifest_of(step, _layout(self.parallel), self.shape, self.identity, self.reference)
                write_manifest(path, about, sealed)
                remove_older(self.directory, self.keep)

        names = self.parallel.share(together(self.parallel, f"write {path}", name_format))
        digests = together(self.parallel, f"read {path} back", lambda: seal(path, self._share_of(names)))
        sealed = {name: digest for part in self.parallel.gather(digests) for name, digest in part.items()}
        together(self.parallel, f"finish {path}", finish)

    def _share_of(self, names: list[str]) -> list[str]:
        """Returns those of a checkpoint's files that this rank reads, so that all ranks together read each of them
        once."""
        return names[self.parallel.rank :: self.parallel.world_size]

    def _discard(self, path: Path) -> None:
        if self.parallel.is_main and path.is_dir():
            remove_checkpoint(path)

    def load(self, path: Path, state: TrainerState) -> int:
        """Brings `state` to what `path` holds, whatever the layout it was saved in; returns the number of training
        steps that it has behind it.

        The optimizer's settings stay those of `state`: only its moments and its progress come from the checkpoint.

        Raises:
            UserError: where the checkpoint is of another format or model, or the teacher's weights have changed.
            RunFailed: where it is incomplete or damaged inside.
        """
        manifest = read_manifest(path)
        if manifest is None:
            raise RunFailed(f"{path} is not complete any more; start the same command again.")
        check_model(path, manifest, self.shape)
        check_reference(path, manifest, self.reference)
        self._check_content(path, manifest)
        wanted = _sharded_state(state, self.parallel, is_loading=True)
        loaded = load_described(path, wanted)
        fill_weights(state.policy, loaded[POLICY], prefix=f"{POLICY}.")
        self._load_optimizer(state, loaded)
        if manifest["layout"] == _layout(self.parallel):
            file = path / f"rng_{self.parallel.rank:05d}.pt"
            _set_random_states(read_checkpoint(path, lambda: torch.load(file, weights_only=True)))
        return manifest["step"]

    def _check_content(self, path: Path, manifest: dict[str, Any]) -> None:
        """Checks the checkpoint's files on all ranks, before any of them loads."""
        found = self.parallel.gather(damaged(path, manifest, self._share_of(sorted(manifest["files"]))))
        names = sorted(name for part in found for name in part)
        if names:
            raise RunFailed(
                f"{path} is damaged: {', '.join(names)} {'does' if len(names) == 1 else 'do'} not hold what was saved. "
                "Put it back from a copy, or move the directory away to go on from the checkpoint before it."
            )

    def _load_optimizer(self, state: TrainerState, loaded: dict[str, Any]) -> None:
        def settings(group: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in group.items() if key not in ("params", "step")}

        # megatron would bring back the saved run's learning rates and betas with the progress
        own = [settings(group) for group in state.optimizer.param_groups]
        state.optimizer.load_state_dict(loaded["optimizer"])
        for group, values in zip(state.optimizer.param_groups, own, strict=True):
            group.update(values)
        state.schedule.num_steps = 0
        state.schedule.step(loaded["schedule"]["num_steps"])


def _layout(parallel: ParallelState) -> dict[str, int]:
    return {"tp": parallel.tp, "pp": parallel.pp, "dp": parallel.dp}


def _sharded_state(state: TrainerState, parallel: ParallelState, *, is_loading: bool) -> dict[str, Any]:
    """megatron's description of every tensor: its name, and which part of it this rank holds."""
    policy = sharded_weights(state.policy, parallel, prefix=f"{POLICY}.")
    optimizer = state.optimizer.sharded_state_dict(
        {POLICY: policy}, is_loading=is_loading, metadata=metadata_of(parallel)
    )
    return {POLICY: policy, "optimizer": optimizer, "schedule": {"num_steps": state.schedule.num_steps}}


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    # `parallel.initialize` has seeded it
    assert tracker is not None
    return tracker


def _random_states() -> dict[str, Any]:
    kind, keys, *position = np.random.get_state()  # noqa: NPY002  what numpy users of this process share
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *position],
        "torch": torch.get_rng_state(),
        "megatron": _tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    kind, keys, *position = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(states["torch"])
    _tracker().set_states(states["megatron"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
