"""One rank of an all-reduce among several: adds up what each has, and says how long that took.

    PYTHON ring_rank.py BACKEND DEVICE MEETING RANK SIZE LIMIT_S

MEETING is where the ranks find each other: file:///PATH on one machine, tcp://HOST:PORT on several. It prints a line of
JSON, or ends with the reason."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta

SMALL, LARGE = 1, 4 << 20
"""Numbers of 4 bytes."""
SMALL_TIMES, LARGE_TIMES = 20, 5


def main(argv: list[str]) -> None:
    backend, device, meeting, rank, size, limit_s = argv
    import torch
    import torch.distributed as dist

    if device != "cpu":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=float(limit_s))
    dist.init_process_group(backend, init_method=meeting, rank=int(rank), world_size=int(size), timeout=limit)

    def seconds(count: int) -> float:
        numbers = torch.full((count,), int(rank) + 1.0, device=device)
        synchronize: Callable[[], None] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        synchronize()
        taken = time.perf_counter() - start
        expected = int(size) * (int(size) + 1) / 2
        if not bool((numbers == expected).all()):
            sys.exit(
                f"rank {rank}: the sum of 1 to {size} came to {numbers[numbers != expected][0].item():g}"
            )
        return taken

    # connections are made at the first
    seconds(SMALL)
    small = statistics.median(seconds(SMALL) for _ in range(SMALL_TIMES))
    large = statistics.median(seconds(LARGE) for _ in range(LARGE_TIMES))
    print(json.dumps({"small_s": small, "large_s": large, "large_bytes": 4 * LARGE}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
