"""Named warnings for the ways in which users saw self-distillation collapse, each with what to change.

Reported of other implementations: gradient norms that go to 1e-5 while the loss stays flat (a loss without gradient),
entropy and responses that shrink until nothing is left to sample, and steps without a group to learn from.
"""

import statistics
from collections.abc import Mapping, Sequence

_WINDOW = 3
"""Steps whose mean is compared; the first ones are what the run began with."""
_IDLE_STEPS = 5
_SHARES = {
    "vanishing_gradient": ("optim/grad_norm", 0.01),
    "entropy_collapse": ("policy/entropy", 0.1),
    "length_collapse": ("env/all/response_length/mean", 0.3),
}
"""A warning's name -> (metric, the share of its first value under which it is given)."""
_ADVICE = {
    "vanishing_gradient": "The policy has become its teacher, or the loss has no gradient: try teacher.name=ema, "
    "loss.group_advantage_weight above 0, or stop here.",
    "entropy_collapse": "Little is left to explore: lower optimizer.lr, raise rollout.temperature, or take "
    "loss.alpha=0.5.",
    "length_collapse": "Responses lose what made them long: look at rollouts/train, lower optimizer.lr, or raise "
    "loss.group_advantage_weight.",
    "no_signal": "No response had anything to be learned from: take easier problems, a larger rollout.group_size, "
    "or an environment with feedback.",
}


class Guards:
    """Reads the metrics of every training step, in order, and gives each warning when it begins, and again only after
    it has ended."""

    def __init__(self, earlier: Sequence[Mapping[str, float]] = ()) -> None:
        """`earlier` holds the metrics of the steps that a resumed run has behind it; warnings that began there are not
        given again."""
        self._first: dict[str, list[float]] = {name: [] for name in _SHARES}
        self._last: dict[str, list[float]] = {name: [] for name in _SHARES}
        self._idle = 0
        self._standing: set[str] = set()
        for metrics in earlier:
            self.check(metrics)

    def check(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Returns the warnings that begin with this step: by name, a line that says what is and what to change."""
        found = self._shrunk(metrics) | self._without_signal(metrics)
        new = {
            name: f"{name}: {text} {_ADVICE[name]}"
            for name, text in found.items()
            if name not in self._standing
        }
        self._standing = set(found)
        return new

    @property
    def standing(self) -> frozenset[str]:
        """The names of the warnings that hold after the last step."""
        return frozenset(self._standing)

    def _shrunk(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = {}
        for name, (key, share) in _SHARES.items():
            value = metrics.get(key)
            # a step without signal has no gradient
            learned = metrics.get("perf/trained_tokens")
            if value is None or not learned:
                continue
            if len(self._first[name]) < _WINDOW:
                self._first[name].append(value)
                continue
            self._last[name] = [*self._last[name], value][-_WINDOW:]
            first, last = statistics.mean(self._first[name]), statistics.mean(self._last[name])
            if len(self._last[name]) == _WINDOW and last < share * first:
                found[name] = (
                    f"{key} was {first:.3g} in the first {_WINDOW} steps and is {last:.3g} in the last."
                )
        return found

    def _without_signal(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if "perf/trained_tokens" not in metrics:
            return {}
        self._idle = 0 if metrics["perf/trained_tokens"] else self._idle + 1
        if self._idle < _IDLE_STEPS:
            return {}
        return {"no_signal": f"nothing was learned from in the last {self._idle} steps."}
