"""Graded responses to samples, each with the prompt under which its teacher reads it."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

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
    samples = _carried(p, group)
    if len(group.grades_G) < 2 and group.ungraded:
        return samples

    # a prompt holds a whole response: it is tokenised once for all who read it
    @cache
    def prompt_of(hints: Hints) -> list[int]:
        return prompt_ids(show(group.problem, hints))

    @cache
    def fitted_to(limit: int, hints: Hints) -> Fitted | None:
        return fit(hints, limit, prompt_of)

    # not divided by the standard deviation (arXiv 2503.20783)
    mean = sum(grade.reward for grade in group.grades_G) / len(group.grades_G)
    for g, grade, rollout, choice in zip(
        group.places_G, group.grades_G, group.rollouts_G, choose(group, settings, seed), strict=True
    ):
        tokens = len(rollout.response_ids_T)
        fitted, demonstration_id = None, None
        if choice is not None:
            fitted = fitted_to(prompt_limit(settings, max_context_length, tokens), choice.hints)
            if choice.demonstration is not None and fitted is not None and fitted.hints.solution is not None:
                demonstration_id = samples[choice.demonstration].id
        room = 0 if fitted is None else max(0, max_context_length - len(fitted.prompt_ids))
        samples[g] = replace(
            samples[g],
            loss_mask_T=rollout.loss_mask_T,
            teacher_prompt_ids=None if fitted is None else fitted.prompt_ids,
            teacher_tokens=min(room, tokens),
            success=grade.reward >= settings.success_reward_threshold,
            group_advantage=grade.reward - mean,
            demonstration_id=demonstration_id,
            hints_lost=choice is not None and (fitted is None or fitted.hints != choice.hints),
        )
    return samples


def _carried(p: int, group: Group) -> list[Sample]:
    """Returns all responses as samples from which nothing is learned."""
    rollouts = dict(zip(group.places_G, group.rollouts_G, strict=True))
    rollouts |= {g: left.rollout for g, left in group.ungraded.items()}
    return [
        Sample(
            id=p * group.size + g,
            prompt_ids=rollout.prompt_ids,
            response_ids_T=rollout.response_ids_T,
            rollout_logprobs_T=rollout.rollout_logprobs_T,
            loss_mask_T=array("B", bytes(len(rollout.response_ids_T))),
            teacher_prompt_ids=None,
            teacher_tokens=0,
            success=False,
            group_advantage=0.0,
        )
        for g, rollout in sorted(rollouts.items())
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
