"""How ranks find each other."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import FileStore, HashStore  # pyright: ignore[reportPrivateImportUsage]


def join(backend: str, timeout: timedelta, file: Path | None) -> None:
    """Makes the default process group: over the new `file` for ranks of one machine; by MASTER_ADDR and MASTER_PORT,
    where torch's store listens on all interfaces, for those of several; a single rank meets nobody."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if file is None and world_size > 1:
        dist.init_process_group(backend, timeout=timeout)
        return
    store = HashStore() if world_size == 1 else FileStore(str(file), world_size)
    store.set_timeout(timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
