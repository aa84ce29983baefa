"""What one learning step must give, from transformers and autograd alone, one response at a time in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_megatron.algorithm.losses import build_terms
from sdpo_megatron.algorithm.losses.base import (
    ClippedLikeliestTokens,
    LikeliestTokens,
    LossSettings,
    SampledTokens,
    WholeVocabulary,
)
from sdpo_megatron.kernels.clipped_top_k import clipped_top_k_definition
from sdpo_megatron.kernels.divergence import divergence_definition
from sdpo_megatron.kernels.top_k import top_k_definition
from sdpo_megatron.records import Sample
from tests.families import apart, named_tensors


class Expected(NamedTuple):
    loss: float
    student: list[list[float]]
    weights: list[list[float]]
    """Tokens without weight need not be computed."""
    teacher: list[list[float]]
    """0 where there is none."""
    advantages: list[list[float]]
    gradients: dict[str, Tensor]
    """By Hugging Face name."""


def plain_step(
    directory: Path,
    samples: Sequence[Sample],
    *,
    settings: LossSettings,
    temperature: float,
    weights: dict[str, Tensor] | None = None,
    old: list[list[float]] | None = None,
) -> Expected:
    """Student and teacher have the directory's weights; or the student has `weights`, and had the log-probabilities
    `old` before."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )

    reference = network
    if weights is not None:
        network = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            for name, tensor in named_tensors(network).items():
                tensor.copy_(weights.get(name, tensor))

    def logits(prompt: Sequence[int], response: Sequence[int], of: Any) -> Tensor:
        return of(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]

    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    expected = Expected(0.0, [], [], [], [], {})
    for k, sample in enumerate(samples):
        target = torch.tensor(sample.response_ids_T)
        student_TV = logits(sample.prompt_ids, sample.response_ids_T, network)
        student = (student_TV / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]
        teacher_TV, taught = student_TV.detach().clone(), torch.zeros(len(target), dtype=torch.float64)
        if sample.teacher_prompt_ids is not None and sample.teacher_tokens:
            with torch.no_grad():
                n = sample.teacher_tokens
                teacher_TV[:n], taught[:n] = (
                    logits(sample.teacher_prompt_ids, sample.response_ids_T[:n], reference),
                    1.0,
                )
        teacher = (teacher_TV / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0] * taught
        weights_T = torch.tensor(sample.loss_mask_T, dtype=torch.float64)
        if not build_terms(settings)[0].loss.uses_rewards:
            weights_T = weights_T * taught
        old_T = student.detach() if old is None else torch.tensor(old[k], dtype=torch.float64)
        with torch.no_grad():
            old_TV = logits(sample.prompt_ids, sample.response_ids_T, reference)
        loss_T, advantages = token_losses(
            sample, student, teacher, student_TV, teacher_TV, old_TV, weights_T, old_T, settings, temperature
        )
        total = total + (weights_T * loss_T).sum()
        weight_sum += float(weights_T.sum())
        expected.student.append(student.tolist())
        expected.weights.append(weights_T.tolist())
        expected.teacher.append(teacher.tolist())
        expected.advantages.append(advantages.tolist())
    mean = total / weight_sum
    mean.backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            gradients |= apart(name, parameter.grad)
    return expected._replace(loss=float(mean.detach()), gradients=gradients)


def token_losses(
    sample: Sample,
    student: Tensor,
    teacher: Tensor,
    student_TV: Tensor,
    teacher_TV: Tensor,
    old_TV: Tensor,
    weights_T: Tensor,
    old_T: Tensor,
    settings: LossSettings,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(loss per token, shown advantages)."""
    loss, values = build_terms(settings)[0].loss, settings.model_dump()
    advantages = (teacher - student.detach()) * (teacher != 0)
    rollout = torch.tensor(sample.rollout_logprobs_T, dtype=torch.float64)
    correction = torch.ones_like(rollout)
    ratio = (student - rollout).exp()
    if settings.rollout_is_cap is not None:
        correction = (old_T - rollout).exp().clamp(max=settings.rollout_is_cap)
        ratio = (student - old_T).exp()
    asked = loss.comparison
    if isinstance(asked, ClippedLikeliestTokens):
        surrogate = clipped_top_k_definition(
            student_TV, teacher_TV, old_TV, **vars(asked), temperature=temperature
        )
        return correction * surrogate, advantages
    capped = 1.0 if values["is_clip"] is None else ratio.clamp(max=values["is_clip"]).detach()
    if isinstance(asked, WholeVocabulary):
        distance = divergence_definition(student_TV, teacher_TV, alpha=asked.alpha, temperature=temperature)
        return correction * capped * distance, advantages
    if isinstance(asked, LikeliestTokens):
        return correction * top_k_definition(
            student_TV, teacher_TV, **vars(asked), temperature=temperature
        ), advantages
    assert isinstance(asked, SampledTokens)
    if loss.uses_rewards:
        weighted = 1.0
        if loss.teacher_views:  # RLSD at its first step, where the old policy is the present one
            weight = (sample_sign(sample) * (teacher - student.detach())).exp().clamp(0.8, 1.2)
            weighted = torch.where(teacher != 0, 1.0 + 0.5 * (weight - 1.0), torch.ones_like(weight))
        advantages = torch.full_like(student, sample.group_advantage).detach() * weighted
    elif loss.needs_sequence_advantages:
        mean = (advantages * weights_T).sum() / weights_T.sum().clamp(min=1.0)
        advantages = torch.full_like(advantages, float(mean)) * (teacher != 0)
    low, high = 1 - values["clip_low"], 1 + values["clip_high"]
    return -correction * torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages), advantages


def sample_sign(sample: Sample) -> float:
    return (sample.group_advantage > 0) - (sample.group_advantage < 0)
