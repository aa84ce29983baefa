"""Shows after a push that servers compute what the trainer computes: both give a fixed text nearly the same
probability.

Two right computations in bfloat16 differ by tenths of a nat on single tokens. So the mean and a high quantile of the
difference are held against what this model's own rounding makes of the same text (`Noise`).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sdpo_megatron.errors import PolicyBroken, RunFailed
from sdpo_megatron.files import write_atomically
from sdpo_megatron.models.shape import ModelShape
from sdpo_megatron.rollout.client import Client
from sdpo_megatron.serving.calls import Calls
from sdpo_megatron.trainer.parallel import ParallelState
from sdpo_megatron.trainer.score import Scorer, in_float32

HIGH = 0.9
"""The quantile that is looked at beside the mean: of 64 tokens six lie above it, so that none decides alone."""


@dataclass(frozen=True)
class Noise:
    """How far two computations of a text's log-probabilities are from each other, in nats."""

    mean: float
    """Of the absolute differences."""
    high: float
    """Their quantile HIGH."""

    @classmethod
    def between(cls, a_T: Sequence[float], b_T: Sequence[float]) -> "Noise":
        gaps_T = torch.tensor([abs(a - b) for a, b in zip(a_T, b_T, strict=True)], dtype=torch.float64)
        # an infinite minus an infinite one
        gaps_T = gaps_T.nan_to_num(nan=math.inf, posinf=math.inf)
        return cls(float(gaps_T.mean()), float(gaps_T.quantile(HIGH, interpolation="higher")))

    def at_least(self, other: "Noise") -> "Noise":
        """Returns the larger of both."""
        return Noise(max(self.mean, other.mean), max(self.high, other.high))

    def beyond(self, other: "Noise", factor: float) -> bool:
        """Returns whether this is more than `factor` times the other, in the mean or the quantile."""
        return self.mean > factor * other.mean or self.high > factor * other.high


def kept_noise(path: Path, measure: Callable[[], Noise], parallel: ParallelState) -> Noise:
    """Returns the noise in the file `path`, which is measured and written where there is none: a run that goes on is
    held to what it began with. All ranks must call it, as `measure` is."""

    def read() -> dict[str, float] | None:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None

    found = parallel.share(read() if parallel.is_main else None)
    if isinstance(found, dict) and {"mean", "high"} <= found.keys():
        return Noise(found["mean"], found["high"])
    noise = measure()
    if parallel.is_main:
        write_atomically(path, json.dumps(asdict(noise)) + "\n")
    return noise


def rounding(
    ids: list[int],
    scorer: Scorer,
    shape: ModelShape,
    parallel: ParallelState,
    path: Path,
) -> Noise:
    """Returns what the policy's type makes of the text's log-probabilities, by float32 beside it; kept in `path`. All
    ranks must call it."""
    if next(scorer.chunks[0].parameters()).dtype == torch.float32:
        return FLOAT32

    def measure() -> Noise:
        pairs, wide = [(ids[:1], ids[1:])], in_float32(scorer, shape)
        return Noise.between(*scorer.response_logprobs(pairs), *wide.response_logprobs(pairs))

    return FLOAT32.at_least(kept_noise(path, measure, parallel))


FLOAT32 = Noise(2.5e-5, 1e-4)
"""What counts as noise in float32, and in any type at least: 2e-6 was measured on canaries, 9e-5 at most on the 21,600
tokens that the demo trained."""


@dataclass(frozen=True)
class Canary:
    """A fixed text whose log-probabilities must be the same from server and trainer, but for rounding."""

    ids: list[int]
    scorer: Scorer
    """Scores the policy at temperature 1, as servers score prompts."""
    calls: Calls
    clients: Sequence[Client]
    noise: Noise
    factor: float
    """So many times `noise` is allowed."""
    message: Callable[[str], None]

    def check(self, version: int, *, strict: bool) -> Noise:
        """Returns the largest difference of all servers from the trainer. Where one is beyond what is allowed, this
        raises RunFailed, or is a warning if not `strict`.

        Raises PolicyBroken where the trainer's own numbers are not finite, ServerLost as the client does."""
        (trainer_T,) = self.scorer.response_logprobs([(self.ids[:1], self.ids[1:])])
        if not all(math.isfinite(logprob) for logprob in trainer_T):
            raise PolicyBroken(
                f"The policy of weights version {version} gives log-probabilities that are not finite: the run stops, "
                "its last checkpoint is intact. Lower optimizer.lr."
            )
        worst = Noise(0.0, 0.0)
        for client in self.clients:
            gap = Noise.between(self.calls.one(client.prompt_logprobs, self.ids), trainer_T)
            if gap.beyond(self.noise, self.factor):
                self._complain(version, client.url, gap, strict)
            worst = worst.at_least(gap)
        return worst

    def _complain(self, version: int, url: str, gap: Noise, strict: bool) -> None:
        text = (
            f"After the push of weights version {version}, the log-probabilities of {url} and of the trainer differ by "
            f"{gap.mean:.2g} nats in the mean over the canary's {len(self.ids) - 1} tokens, and by {gap.high:.2g} on a "
            f"tenth of them; this model's own rounding makes {self.noise.mean:.2g} and {self.noise.high:.2g}, of which "
            f"{self.factor:g} times are allowed (weight_sync.canary_factor)."
        )
        if strict:
            raise RunFailed(
                f"{text} The server does not hold the trainer's weights, computes in another precision than "
                "model.dtype, or reads another config.json (rope, norm) than model.path's."
            )
        self.message(f"warning: {text} It holds the trainer's weights: rounding has grown with them.")
