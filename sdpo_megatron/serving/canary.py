"""Proves after a push that the servers hold the trainer's weights: both give a fixed text the same probability."""

import math
from collections.abc import Sequence

from sdpo_megatron.errors import RunFailed
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.trainer.score import Scorer


class Canary:
    """A fixed text whose log-probabilities must be the same from server and trainer, token by token."""

    def __init__(self, ids: list[int], scorer: Scorer, clients: Sequence[Client], tolerance: float):
        """`scorer` scores the policy at temperature 1, as servers score prompts."""
        self.ids = ids
        self.scorer = scorer
        self.clients = clients
        self.tolerance = tolerance

    def check(self, version: int) -> float:
        """Returns the largest difference, in nats. Raises RunFailed beyond the tolerance, ServerLost as the client
        does."""
        (trainer_T,) = self.scorer.response_logprobs([(self.ids[:1], self.ids[1:])])
        if not all(math.isfinite(logprob) for logprob in trainer_T):
            raise RunFailed(
                f"The policy of weights version {version} gives log-probabilities that are not finite: the run stops, "
                "its last checkpoint is intact. Lower optimizer.lr."
            )
        worst = 0.0
        for client in self.clients:
            server_T = client.prompt_logprobs(self.ids)
            gaps_T = [_gap(a, b) for a, b in zip(server_T, trainer_T, strict=True)]
            t = max(range(len(gaps_T)), key=gaps_T.__getitem__)
            if gaps_T[t] > self.tolerance:
                raise RunFailed(
                    f"After the push of weights version {version}, {client.url} gives token {t + 1} of the canary "
                    f"(id {self.ids[t + 1]}) log-probability {server_T[t]:.5f}, the trainer {trainer_T[t]:.5f}: they "
                    f"differ by {gaps_T[t]:.2g}, more than weight_sync.canary_tolerance={self.tolerance:g}. The server "
                    "does not hold the trainer's weights, or computes in another precision than model.dtype."
                )
            worst = max(worst, gaps_T[t])
        return worst


def _gap(a: float, b: float) -> float:
    return math.inf if math.isnan(a - b) else abs(a - b)
