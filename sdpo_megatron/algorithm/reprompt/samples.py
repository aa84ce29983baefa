"""Graded responses to samples, each with the prompt under which its teacher reads it."""

from array import array
from collections.abc import Callable, Iterable, Sequence

from sdpo_megatron.algorithm.advantages import group_advantages
from sdpo_megatron.algorithm.reprompt.choice import choose
from sdpo_megatron.algorithm.reprompt.fitting import Fitted, fit
from sdpo_megatron.algorithm.reprompt.settings import RepromptSettings
from sdpo_megatron.records import Group, Hints, Message, Problem, Sample

Show = Callable[[Problem, Hints], list[Message]]
"""The teacher's conversation."""


def build_samples(
    p: int,
    group: Group,
    settings: RepromptSettings,
    show: Show,
    prompt_ids: Callable[[list[Message]], list[int]],
    max_context_length: int,
    seed: str = "",
) -> list[Sample]:
    """Returns every response of the step's p-th group as a Sample with id = p * G + g; all groups have G responses,
    graded or not. Nothing is learned from one that could not be graded, nor from a group with fewer than two that were:
    their loss masks are 0.

    `prompt_ids` tokenises a conversation up to where the response begins; `seed` is the run's and the step's. Response
    tokens that do not fit into `max_context_length` behind the teacher's prompt lie beyond `teacher_tokens`.
    """
    if len(group.grades_G) < 2 and group.ungraded:
        return _unlearned(p, group, range(group.size))
    ids_G = [p * group.size + g for g in group.places_G]
    prompts = _Prompts(lambda hints: prompt_ids(show(group.problem, hints)))
    advantages_G = group_advantages([[grade.reward for grade in group.grades_G]])[0]
    samples = []
    for g, (rollout, choice) in enumerate(zip(group.rollouts_G, choose(group, settings, seed), strict=True)):
        tokens = len(rollout.response_ids_T)
        limit = prompt_limit(settings, max_context_length, tokens)
        fitted = None if choice is None else prompts.fitted(choice.hints, limit)
        demonstration = None if choice is None else choice.demonstration
        if fitted is None or fitted.hints.solution is None:
            demonstration = None
        room = 0 if fitted is None else max(0, max_context_length - len(fitted.prompt_ids))
        samples.append(
            Sample(
                id=ids_G[g],
                prompt_ids=rollout.prompt_ids,
                response_ids_T=rollout.response_ids_T,
                rollout_logprobs_T=rollout.rollout_logprobs_T,
                loss_mask_T=rollout.loss_mask_T,
                teacher_prompt_ids=None if fitted is None else fitted.prompt_ids,
                teacher_tokens=min(room, tokens),
                success=group.grades_G[g].reward >= settings.success_reward_threshold,
                group_advantage=advantages_G[g],
                demonstration_id=None if demonstration is None else ids_G[demonstration],
                hints_lost=choice is not None and (fitted is None or fitted.hints != choice.hints),
            )
        )
    return sorted(samples + _unlearned(p, group, group.ungraded), key=lambda sample: sample.id)


def _unlearned(p: int, group: Group, places: Iterable[int]) -> list[Sample]:
    """Returns samples of the responses at these places that the step carries along and does not learn from."""
    rollouts = dict(zip(group.places_G, group.rollouts_G, strict=True))
    rollouts |= {g: left.rollout for g, left in group.ungraded.items()}
    return [
        Sample(
            id=p * group.size + g,
            prompt_ids=rollouts[g].prompt_ids,
            response_ids_T=rollouts[g].response_ids_T,
            rollout_logprobs_T=rollouts[g].rollout_logprobs_T,
            loss_mask_T=array("B", bytes(len(rollouts[g].response_ids_T))),
            teacher_prompt_ids=None,
            teacher_tokens=0,
            success=False,
            group_advantage=0.0,
        )
        for g in places
    ]


def prompt_limit(settings: RepromptSettings, max_context_length: int, response_tokens: int) -> int:
    """Returns how many tokens the prompt may have under which a teacher reads a response of so many."""
    left = max(max_context_length - response_tokens, max_context_length // 2)
    return left if settings.max_prompt_length is None else min(left, settings.max_prompt_length)


def reprompt_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns of how many of a step's responses the teacher can say something, and what does not fit its context.

    `trajectories_trained` have a teacher and a token that both counts for the loss and fits the teacher's context;
    `teacher_truncated_*` are those with a teacher of which at least one token does not fit, and the tokens that do not,
    in the mean over these. `teacher_shortened_count` are those whose teacher is told less than was to be said, for want
    of room, and `teacher_no_room_count` those that have no teacher for want of room."""
    taught = [s for s in samples if s.teacher_prompt_ids is not None]
    lost = [len(s.response_ids_T) - s.teacher_tokens for s in taught]
    truncated = sum(n > 0 for n in lost)
    return {
        "sdpo/trajectories_total": float(len(samples)),
        "sdpo/trajectories_trained": float(sum(any(s.loss_mask_T[: s.teacher_tokens]) for s in taught)),
        "sdpo/teacher_truncated_count": float(truncated),
        "sdpo/teacher_truncated_frac": truncated / max(1, len(taught)),
        "sdpo/teacher_truncated_tokens_avg": sum(lost) / max(1, truncated),
        "sdpo/teacher_shortened_count": float(sum(s.hints_lost for s in taught)),
        "sdpo/teacher_no_room_count": float(
            sum(s.hints_lost for s in samples) - sum(s.hints_lost for s in taught)
        ),
    }


class _Prompts:
    """The teacher's prompts of one group. A prompt holds a whole response: it is tokenised once for all who read it."""

    def __init__(self, prompt_of: Callable[[Hints], list[int]]) -> None:
        self._prompt_of = prompt_of
        self._tokenised: dict[Hints, list[int]] = {}
        self._fitted: dict[tuple[Hints, int], Fitted | None] = {}

    def fitted(self, hints: Hints, limit: int) -> Fitted | None:
        ids = self._ids(hints)
        if len(ids) <= limit:
            return Fitted(hints, ids)
        if (hints, limit) not in self._fitted:
            self._fitted[hints, limit] = fit(hints, limit, self._ids)
        return self._fitted[hints, limit]

    def _ids(self, hints: Hints) -> list[int]:
        if hints not in self._tokenised:
            self._tokenised[hints] = self._prompt_of(hints)
        return self._tokenised[hints]
