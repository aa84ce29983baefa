"""What one learning step must give, from transformers and autograd alone, one response at a time in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_megatron.records import Sample


class Expected(NamedTuple):
    loss: float
    student: list[list[float]]
    trained: list[bool]
    """Whether any token of the response carries weight; the others need not be computed."""
    teacher: list[list[float]]
    """0 where there is none."""
    advantages: list[list[float]]
    gradients: dict[str, Tensor]
    """By Hugging Face name."""


def plain_step(
    directory: Path, samples: Sequence[Sample], *, loss: str, temperature: float, low: float, high: float
) -> Expected:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    )

    def logprobs(prompt: list[int], response: list[int]) -> Tensor:
        logits = network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    expected = Expected(0.0, [], [], [], [], {})
    for sample in samples:
        length = len(sample.response_ids_T)
        student = logprobs(sample.prompt_ids, sample.response_ids_T)
        teacher = torch.zeros(length, dtype=torch.float64)
        taught = sample.teacher_tokens if sample.teacher_prompt_ids is not None else 0
        if sample.teacher_prompt_ids is not None and taught:
            with torch.no_grad():
                teacher[:taught] = logprobs(sample.teacher_prompt_ids, sample.response_ids_T[:taught])
        weights = torch.tensor(sample.loss_mask_T, dtype=torch.float64)
        if loss == "sdpo":
            advantages = teacher - student.detach()
            advantages[taught:] = 0.0
            weights[taught:] = 0.0
        else:
            advantages = torch.full((length,), sample.group_advantage, dtype=torch.float64)
        ratio = (student - torch.tensor(sample.rollout_logprobs_T, dtype=torch.float64)).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        total = total - (weights * surrogate).sum()
        weight_sum += float(weights.sum())
        expected.student.append(student.tolist())
        expected.trained.append(bool(weights.any()))
        expected.teacher.append(teacher.tolist())
        expected.advantages.append(advantages.tolist())
    mean = total / weight_sum
    mean.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return expected._replace(loss=float(mean.detach()), gradients=gradients)
