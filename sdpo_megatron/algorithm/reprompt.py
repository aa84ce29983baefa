"""What the teacher reads: the problem plus what the group and the environment found out about it.

Which solution and which feedback is decided here; the words around them are the environment's (`Environment.show`),
which may take them from `envs/templates.py`.

The teacher is the same model, shown a sibling's successful response and/or the environment's feedback, and it
scores the student's own tokens under that prompt (SDPO, arXiv 2601.20802 section 2; structure as in its
template).
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from sdpo_megatron.algorithm.advantages import group_advantages
from sdpo_megatron.records import Group, Message, Problem, Sample
from sdpo_megatron.strict_yaml.section import Fraction, Section

Show = Callable[[Problem, str | None, str | None], list[Message]]
"""(problem, solution, feedback) -> the teacher's conversation; at least one of the last two is given."""


class RepromptSettings(Section):
    own_success: Literal["never", "when_alone", "always"] = "never"
    """Whether a successful response may be its own demonstration: `never` (official code), `when_alone` (only where
    no sibling succeeded), `always` (paper: an attempt that succeeded is shown itself)."""
    success_reward_threshold: Fraction = 0.5
    include_environment_feedback: bool = True
    environment_feedback_only_without_solution: bool = True


def teacher_conversations(group: Group, settings: RepromptSettings, show: Show) -> list[list[Message] | None]:
    """Returns, for each of the G responses, the conversation that the teacher is conditioned on.

    It is None where the teacher would know nothing that the student did not: such a response gets no SDPO loss. Those
    that are shown the same have one conversation, the same object.
    """
    demonstrations = _demonstrations(group, settings)
    conversations_G: list[list[Message] | None] = []
    shown_so_far: dict[tuple[str | None, str], list[Message]] = {}
    for g, grade in enumerate(group.grades_G):
        shown = _shown_to(g, demonstrations, settings)
        solution = None if shown is None else demonstrations[shown]
        failed = grade.reward < settings.success_reward_threshold
        feedback = grade.feedback if failed and settings.include_environment_feedback else ""
        if solution is not None and settings.environment_feedback_only_without_solution:
            feedback = ""
        if solution is None and not feedback:
            conversations_G.append(None)
            continue
        if (solution, feedback) not in shown_so_far:
            shown_so_far[solution, feedback] = show(group.problem, solution, feedback or None)
        conversations_G.append(shown_so_far[solution, feedback])
    return conversations_G


def build_samples(
    p: int,
    group: Group,
    settings: RepromptSettings,
    show: Show,
    prompt_ids: Callable[[list[Message]], list[int]],
    max_context_length: int,
) -> list[Sample]:
    """Returns every response of the step's p-th group as a Sample with id = p * G + g; all groups have G responses,
    graded or not. Nothing is learned from one that could not be graded, nor from a group with fewer than two that were:
    their loss masks are 0.

    `prompt_ids` tokenises a conversation up to where the response begins. Response tokens that do not fit
    into `max_context_length` behind the teacher's prompt lie beyond `teacher_tokens`.
    """
    if len(group.grades_G) < 2 and group.ungraded:
        return _unlearned(p, group, range(group.size))
    ids_G = [p * group.size + g for g in group.places_G]
    conversations_G = teacher_conversations(group, settings, show)
    demonstrations = _demonstrations(group, settings)
    # a teacher's prompt holds a whole response: tokenised once for all that read it
    tokenised = {id(shown): prompt_ids(shown) for shown in _distinct(conversations_G)}
    advantages_G = group_advantages([[grade.reward for grade in group.grades_G]])[0]
    samples = []
    for g, rollout in enumerate(group.rollouts_G):
        conversation = conversations_G[g]
        teacher_prompt_ids = None if conversation is None else tokenised[id(conversation)]
        shown = _shown_to(g, demonstrations, settings)
        room = 0 if teacher_prompt_ids is None else max(0, max_context_length - len(teacher_prompt_ids))
        samples.append(
            Sample(
                id=ids_G[g],
                prompt_ids=rollout.prompt_ids,
                response_ids_T=rollout.response_ids_T,
                rollout_logprobs_T=rollout.rollout_logprobs_T,
                loss_mask_T=rollout.loss_mask_T,
                teacher_prompt_ids=teacher_prompt_ids,
                teacher_tokens=min(room, len(rollout.response_ids_T)),
                success=group.grades_G[g].reward >= settings.success_reward_threshold,
                group_advantage=advantages_G[g],
                demonstration_id=None if shown is None else ids_G[shown],
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


def reprompt_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns of how many of a step's responses the teacher can say something, and what does not fit its context.

    `trajectories_trained` have a teacher and a token that both counts for the loss and fits the teacher's context;
    `teacher_truncated_*` are those with a teacher of which at least one token does not fit, and the tokens that do not,
    in the mean over these."""
    taught = [s for s in samples if s.teacher_prompt_ids is not None]
    lost = [len(s.response_ids_T) - s.teacher_tokens for s in taught]
    truncated = sum(n > 0 for n in lost)
    return {
        "sdpo/trajectories_total": float(len(samples)),
        "sdpo/trajectories_trained": float(sum(any(s.loss_mask_T[: s.teacher_tokens]) for s in taught)),
        "sdpo/teacher_truncated_count": float(truncated),
        "sdpo/teacher_truncated_frac": truncated / max(1, len(taught)),
        "sdpo/teacher_truncated_tokens_avg": sum(lost) / max(1, truncated),
    }


def _distinct(conversations_G: Sequence[list[Message] | None]) -> list[list[Message]]:
    return list({id(shown): shown for shown in conversations_G if shown is not None}.values())


def _demonstrations(group: Group, settings: RepromptSettings) -> dict[int, str]:
    """The successful answers by index, as they would be shown; those with nothing to show are left out."""
    texts: dict[int, str] = {}
    for g, (rollout, grade) in enumerate(zip(group.rollouts_G, group.grades_G, strict=True)):
        text = rollout.text.strip()
        if grade.reward >= settings.success_reward_threshold and text:
            texts[g] = text
    return texts


def _shown_to(g: int, demonstrations: dict[int, str], settings: RepromptSettings) -> int | None:
    """Returns which response the teacher of response `g` is shown."""
    if settings.own_success == "always" and g in demonstrations:
        return g
    for other in demonstrations:
        if other != g:
            return other
    return g if settings.own_success == "when_alone" and g in demonstrations else None
