"""What ranks run: work that rank 0 does for all."""

import torch

from sdpo_megatron.config import ParallelSettings
from sdpo_megatron.errors import ConfigError, RunFailed, UserError
from sdpo_megatron.trainer.parallel import initialize


def on_main() -> list[str | int | None]:
    """What two failures and a success look like on this rank."""
    parallel = initialize(ParallelSettings(dp=2), device=torch.device("cpu"), seed=0)
    seen: list[str | int | None] = []
    for failure in (ConfigError("mend\nthis"), RunFailed("the end")):

        def fail(failure: Exception = failure) -> None:
            raise failure

        try:
            parallel.on_main(fail)
        except UserError as error:
            seen.append(f"user {error}")
        except RunFailed as error:
            seen.append(f"run {error}")
    seen.append(parallel.on_main(lambda: 7 + parallel.rank))
    return seen
