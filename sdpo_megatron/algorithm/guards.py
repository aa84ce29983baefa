"""Named warnings for the ways in which users saw self-distillation collapse, each with what to change.

Reported of other implementations: gradient norms that go to 1e-5 while the loss stays flat (a loss without gradient),
entropy and responses that shrink until nothing is left to sample, and steps without a group to learn from. Seen here: a
teacher that prefers wrong responses, which takes the form and then the answers from its student within a few steps.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

_WINDOW = 3
"""Steps whose mean is compared; the first ones are what the run began with."""
_IDLE_STEPS = 5
_SHARES = {
    "vanishing_gradient": ("optim/grad_norm", 0.01),
    "entropy_collapse": ("policy/entropy", 0.1),
    "length_collapse": ("env/all/response_length/mean", 0.3),
    "format_collapse": ("env/all/format_fraction", 0.7),
}
"""A warning's name -> (metric, the share of its first value under which it is given)."""
_HELD_OUT = {
    "held_out_accuracy": "test/env/all/correct",
    "held_out_probability": "test/exact_answer_prob",
}
"""A warning's name -> the metric that falls, over two evaluations, below this share of what it was."""
_FALL = 0.75
_RIGHT, _WRONG = "sdpo/advantage_right", "sdpo/advantage_wrong"
_UNLEARNED = (
    "The policy unlearns the task: lower optimizer.lr, raise loss.group_advantage_weight, or change what the teacher "
    "reads; checkpoints hold the weights of before."
)
_MOST_CUT_THOUGHTS = 0.5
_ADVICE = {
    "unfinished_thoughts": "They have no answer and reward 0: raise rollout.max_tokens, or have the template leave "
    "thoughts out (rollout.chat_template_kwargs).",
    "server_apart": "The server computes otherwise: look at its config.json, its quantisation and its version.",
    "vanishing_gradient": "The policy has become its teacher, or the loss has no gradient: try teacher.name=ema, "
    "loss.group_advantage_weight above 0, or stop here.",
    "entropy_collapse": "Little is left to explore: lower optimizer.lr, raise rollout.temperature, or take "
    "loss.alpha=0.5.",
    "length_collapse": "Responses lose what made them long: look at rollouts/train, lower optimizer.lr, or raise "
    "loss.group_advantage_weight.",
    "format_collapse": "Responses lose the form that the grader reads: look at rollouts/train, and ask the teacher for "
    "an answer in the form of the solution (reprompt.template, or the environment's show).",
    "advantage_order": "The teacher prefers wrong responses to right ones: change what it reads "
    "(reprompt.template, or the environment's show), raise loss.group_advantage_weight, or take "
    "loss.name=grpo.",
    "held_out_accuracy": _UNLEARNED,
    "held_out_probability": _UNLEARNED,
    "no_signal": "No response had anything to be learned from: take easier problems, a larger rollout.group_size, "
    "or an environment with feedback.",
}


class Guards:
    """Reads the metrics of every training step, in order, and gives each warning when it begins, and again only after
    it has ended."""

    def __init__(self, earlier: Sequence[Mapping[str, float]] = (), *, largest_gap: float = math.inf) -> None:
        """`earlier` holds the metrics of the steps that a resumed run has behind it; warnings that began there are not
        given again. `largest_gap`, in nats, is what rounding explains of `rollout_gap/mean`."""
        self._largest_gap = largest_gap
        self._values: defaultdict[str, list[float]] = defaultdict(list)
        """What there was so far of each metric that is watched for its fall."""
        self._idle = 0
        self._falling: dict[str, str] = {}
        self._reversed: list[tuple[float, float]] = []
        self._standing: set[str] = set()
        for metrics in earlier:
            self.check(metrics)

    def check(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Returns the warnings that begin with this step: by name, a line that says what is and what to change."""
        found = (
            self._shrunk(metrics)
            | self._without_signal(metrics)
            | self._fallen(metrics)
            | self._wrong_preferred(metrics)
            | self._apart(metrics)
            | _cut_thoughts(metrics)
        )
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
            # a step without signal has no gradient
            if metrics.get(key) is None or not metrics.get("perf/trained_tokens"):
                continue
            values = self._values[name]
            values.append(metrics[key])
            if len(values) < 2 * _WINDOW:
                continue
            first, last = statistics.mean(values[:_WINDOW]), statistics.mean(values[-_WINDOW:])
            if last < share * first:
                found[name] = (
                    f"{key} was {first:.3g} in the first {_WINDOW} steps and is {last:.3g} in the last."
                )
        return found

    def _fallen(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Holds between evaluations, which not every step has."""
        for name, key in _HELD_OUT.items():
            if key not in metrics:
                continue
            self._values[name].append(metrics[key])
            values = self._values[name][-3:]
            self._falling.pop(name, None)
            if len(values) == 3 and values[0] > values[1] > values[2] and values[2] < _FALL * values[0]:
                self._falling[name] = (
                    f"{key} fell over two evaluations, {values[0]:.3f}, {values[1]:.3f}, {values[2]:.3f}."
                )
        return dict(self._falling)

    def _wrong_preferred(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if _RIGHT in metrics and _WRONG in metrics:
            pair = (metrics[_RIGHT], metrics[_WRONG])
            self._reversed = [*self._reversed, pair] if pair[0] < pair[1] else []
        if len(self._reversed) < _WINDOW:
            return {}
        right, wrong = self._reversed[-1]
        return {
            "advantage_order": f"{_RIGHT} was below {_WRONG} in the last {len(self._reversed)} steps, now {right:.3f} "
            f"and {wrong:.3f} nats."
        }

    def _without_signal(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if "perf/trained_tokens" not in metrics:
            return {}
        self._idle = 0 if metrics["perf/trained_tokens"] else self._idle + 1
        if self._idle < _IDLE_STEPS:
            return {}
        return {"no_signal": f"nothing was learned from in the last {self._idle} steps."}

    def _apart(self, metrics: Mapping[str, float]) -> dict[str, str]:
        gap = metrics.get("rollout_gap/mean", 0.0)
        if gap <= self._largest_gap:
            return {}
        by_depth = ", ".join(
            f"{value:.2g} from token {key.rpartition('_')[2]}"
            for key, value in metrics.items()
            if key.startswith("rollout_gap/depth_")
        )
        return {
            "server_apart": f"server and trainer differ by {gap:.2g} nats on what was sampled ({by_depth}), where "
            f"rounding explains {self._largest_gap:.2g}."
        }


def _cut_thoughts(metrics: Mapping[str, float]) -> dict[str, str]:
    share = metrics.get("env/all/unfinished_thought_fraction", 0.0)
    if share <= _MOST_CUT_THOUGHTS:
        return {}
    return {"unfinished_thoughts": f"{share:.0%} of the responses ended inside their thought."}
