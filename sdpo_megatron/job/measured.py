"""How long a stop of this run takes, from what its steps took, and when it is time for one."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_megatron.errors import UserError
from sdpo_megatron.job.scheduler import Scheduler
from sdpo_megatron.run_dir.metrics_file import read_rows
from sdpo_megatron.terminal import tell

LOOK_S = 30.0

NOT_OF_A_STOP = ("time/rollout", "time/eval", "time/server_start", "time/checkpoint")
"""What a wish to stop ends at once, or does not wait for; the last is counted by itself."""
MARGIN = 1.5


def stop_takes_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns how many seconds a run needs to end a step and save, at most, with a margin; 0 before anything was
    measured. `rows` are those of its metrics."""
    # a time that was not finite is null
    steps = [
        (row.get("time/total") or 0.0) - sum(row.get(key) or 0.0 for key in NOT_OF_A_STOP) for row in rows
    ]
    saves = [row.get("time/checkpoint") or 0.0 for row in rows]
    return MARGIN * (max(steps, default=0.0) + max(saves, default=0.0))


class Clock:
    """Looks how long the job may still run, and how long its stop takes."""

    def __init__(self, scheduler: Scheduler, metrics: Path) -> None:
        self._scheduler, self._metrics = scheduler, metrics
        self._looked = -LOOK_S
        self._is_compared = False
        self.stop_takes_s = 0.0
        """0 before a step was measured."""

    def is_over(self) -> bool:
        """Returns whether it is time to stop, by what was seen within LOOK_S."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        try:
            self.stop_takes_s = stop_takes_s(read_rows(self._metrics))
        # the trainer says it
        except (OSError, UserError):
            return False
        self._compare()
        left_s = self._scheduler.time_left_s()
        # whoever looks the next time is to be in time as well
        if self.stop_takes_s == 0.0 or left_s > self.stop_takes_s + LOOK_S:
            return False
        tell(f"{left_s:.0f} s of the job's time are left, and a stop takes up to {self.stop_takes_s:.0f} s.")
        return True

    def _compare(self) -> None:
        """Says, once, where a preemption leaves too little time."""
        if self._is_compared or self.stop_takes_s == 0.0:
            return
        self._is_compared = True
        grace_s = self._scheduler.preemption_grace_s()
        if grace_s is not None and grace_s < self.stop_takes_s:
            tell(
                f"warning: a stop of this run takes up to {self.stop_takes_s:.0f} s, and a preemption in this "
                f"partition leaves {grace_s:.0f} s (GraceTime): the steps behind the last checkpoint may be lost; "
                "a smaller checkpoint.every makes that less."
            )
