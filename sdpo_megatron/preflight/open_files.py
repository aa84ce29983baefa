"""How many files and connections this process and its children may have open: one for each request under way."""

import resource

from sdpo_megatron.config import RolloutSettings
from sdpo_megatron.errors import ConfigError

BESIDE_REQUESTS = 256
"""Files that a rank has open besides its requests' connections: libraries, logs, weights, process groups."""
ENOUGH = 65_536
"""No more is asked for: some programs walk through all that they may open."""


def allow_open_files(rollout: RolloutSettings) -> None:
    """Raises the limit of open files as far as the system lets us; processes that are started later inherit it.

    Raises ConfigError where that is less than the requests under way need."""
    needed = rollout.max_concurrent_requests + BESIDE_REQUESTS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH + needed if hard == resource.RLIM_INFINITY else hard
    if allowed < needed:
        raise ConfigError(
            f"rollout.max_concurrent_requests is {rollout.max_concurrent_requests}, which takes {needed} open files, "
            f"but this system allows {hard}; raise that limit (ulimit -Hn), or set rollout.max_concurrent_requests to "
            f"at most {max(1, hard - BESIDE_REQUESTS)}."
        )
    wanted = min(allowed, max(needed, ENOUGH))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
